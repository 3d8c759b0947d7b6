"""Two gloo ranks do the same steps as one: losses, gradients, metrics, log-probabilities (1e-5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.actors.rank_processes import free_address, two_ranks
from tests.actors.trainer import rank_worker


@pytest.mark.ranks
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_equal_one(sharding: str, tiny_base: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_base), free_address(), str(tmp_path), sharding]
    with two_ranks(rank_worker.__file__, tmp_path, *arguments) as two:
        one = rank_worker.scenarios(str(tiny_base), tmp_path / "one")
    assert two[0] == two[1], "every rank reports the global figures and holds the same weights"
    for name, values in one.items():
        if name != "digest":
            # Margins are differences of sums over answers: what float32 leaves of those is absolute.
            allowed = 5e-6 if name.endswith("margins") else 2e-6
            assert two[0][name] == pytest.approx(values, rel=1e-5, abs=allowed), name
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
