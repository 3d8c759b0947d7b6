"""Ranks that share out the positions of rows do what one rank does: losses, gradients, routing, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.actors.models.parallel import sequence_parallel_worker as worker
from tests.actors.rank_processes import forked_ranks, free_address

Found = dict[str, Any]
ALONE = 1e-5
"""Relative difference of one rank from several."""


@pytest.fixture(scope="module")
def one(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    out = tmp_path_factory.mktemp("one-rank")
    return worker.run(str(tiny_base), 1, 0, 1, [None] * len(worker.HOSTS), out), out


@pytest.mark.ranks
@pytest.mark.parametrize(("number", "size"), [(2, 2), (4, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_ranks_that_share_out_positions_do_what_one_does(
    number: int, size: int, one: tuple[Found, Path], tiny_base: Path, tmp_path: Path
) -> None:
    wanted, alone = one
    addresses = [free_address() for _ in worker.HOSTS]
    many = forked_ranks(
        worker.__file__, tmp_path, number, str(size), str(tiny_base), str(tmp_path), *addresses
    )
    for found in many:
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            if number > size and name.startswith("whole"):
                continue  # the auxiliary loss is one of each group's rows
            if name.endswith("load"):
                assert found[name] == values, "each token counts once"
            else:
                assert found[name] == pytest.approx(values, rel=ALONE, abs=2e-6), name
    for path in alone.glob("*-0.pt"):
        if number > size and path.name.startswith("whole"):
            continue
        whole = torch.load(path)
        for rank in range(number):
            part = torch.load(tmp_path / path.name.replace("-0", f"-{rank}"))
            torch.testing.assert_close(part, whole, rtol=ALONE, atol=ALONE * float(whole.abs().max()))
