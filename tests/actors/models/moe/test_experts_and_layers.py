"""Experts shared by ranks and the rest split among them: four ranks do what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.trainer.model_host import ModelHost
from tests.actors.models.moe import experts_and_layers_worker as worker
from tests.actors.models.parallel.sharding_worker import HALF, LORA, STEPS, facts, losses, spec, trained
from tests.actors.rank_processes import forked_ranks, free_address

pytestmark = pytest.mark.ranks

Found = dict[str, Any]


@pytest.fixture(scope="module")
def one_and_four(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Found, list[Found], Path]:
    """What one rank finds and what each of four does, and the directory of all."""
    out, one = tmp_path_factory.mktemp("experts-and-layers"), dict[str, Any]()
    for name, lora in (("lora", LORA), ("all", None)):
        host = trained(ModelHost(spec(str(tiny_base), "none", lora)), None if lora is None else "policy")
        first = losses(host, 0, HALF)
        host.saving.save_checkpoint(out / f"one-{name}")
        one[name] = {"first": first, "second": losses(host, HALF, STEPS)}
    host.saving.save_model(out / "one-model")
    addresses = [free_address() for _ in worker.CASES]
    four = forked_ranks(worker.__file__, out, 4, str(tiny_base), str(out), *addresses)
    return one, four, out


@pytest.mark.parametrize("case", worker.CASES)
def test_four_ranks_learn_what_one_learns(one_and_four: tuple[Found, list[Found], Path], case: str) -> None:
    one, four, _ = one_and_four
    alone = one["lora" if worker.CASES[case][2] else "all"]
    for rank in four:
        assert rank[case]["first"] == pytest.approx(alone["first"], rel=1e-5)
        assert rank[case]["second"] == pytest.approx(alone["second"], rel=1e-5), "from one rank's checkpoint"


@pytest.mark.parametrize(
    ("case", "experts", "rows"), [("base of four", 2, 32), ("all of two and two", 4, 64)]
)
def test_each_rank_holds_some_experts_and_rows_of_the_rest(
    one_and_four: tuple[Found, list[Found], Path], case: str, experts: int, rows: int
) -> None:
    for rank in one_and_four[1]:
        of_experts, of_rest = rank[case]["held"]["experts"], rank[case]["held"]["o_proj"]
        assert [shape[0] for shape in of_experts] == [8, experts]
        assert [shape[0] for shape in of_rest] == [128, rows]


@pytest.mark.parametrize("case", ["base of four", "full of two and two"])
def test_an_adapter_of_four_is_what_one_rank_would_sync(
    one_and_four: tuple[Found, list[Found], Path], case: str, tiny_base: Path
) -> None:
    one, four, out = one_and_four
    host = ModelHost(spec(str(tiny_base), "none"))
    host.add_adapter("policy", out / f"{case}-adapter")
    assert facts(host, "policy") == four[0][case]["facts"], "to the bit"
    host = trained(ModelHost(spec(str(tiny_base), "none")), "policy")
    assert host.saving.load_checkpoint(out / case) == HALF
    assert losses(host, HALF, STEPS) == pytest.approx(one["lora"]["second"], rel=1e-5)


@pytest.mark.parametrize("case", ["all of two and two", "experts of two and two"])
def test_a_model_of_four_is_written_whole(
    one_and_four: tuple[Found, list[Found], Path], case: str, tiny_base: Path
) -> None:
    one, _, out = one_and_four
    ours, theirs = (load_file(out / f"{who}-model/model.safetensors") for who in ("one", case))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=2e-5)
    host = trained(ModelHost(spec(str(tiny_base), "none", None)), None)
    assert host.saving.load_checkpoint(out / case) == HALF
    assert losses(host, HALF, STEPS) == pytest.approx(one["all"]["second"], rel=1e-5)
