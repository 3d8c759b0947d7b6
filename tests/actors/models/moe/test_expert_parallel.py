"""Experts shared by ranks: tokens travel, and two ranks do what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.trainer.model_host import ModelHost
from tests.actors.models.moe import expert_parallel_worker as worker
from tests.actors.models.parallel.sharding_worker import HALF, STEPS, facts, losses, spec, trained
from tests.actors.rank_processes import free_address, two_ranks

Two = dict[str, Any]


@pytest.fixture(scope="module")
def one_and_two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Two, Path, Two]:
    """What one rank does, the directory of both, and what two ranks report."""
    out, base = tmp_path_factory.mktemp("experts"), str(tiny_base)
    one: Two = {}
    host = trained(ModelHost(spec(base, "none")), "policy")
    one["lora"] = losses(host, 0, HALF)
    host.saving.save_checkpoint(out / "one")
    addresses = [free_address() for _ in range(6)]
    with two_ranks(worker.__file__, out, base, str(out), *addresses) as two:
        one["lora"] += losses(host, HALF, STEPS)
        full = trained(ModelHost(spec(base, "none", None)), None)
        one["whole"] = losses(full, 0, STEPS)
        full.saving.save_model(out / "one-model")
    return one, out, two[0]


@pytest.mark.ranks
def test_two_ranks_that_share_the_experts_learn_what_one_learns(
    one_and_two: tuple[Two, Path, Two],
) -> None:
    one, _, two = one_and_two
    assert two["lora"] == pytest.approx(one["lora"], rel=1e-5), "its second half goes on from one rank's file"
    assert two["whole"] == pytest.approx(one["whole"], rel=1e-5), "full fine-tuning"


@pytest.mark.ranks
def test_each_rank_holds_its_experts_alone(one_and_two: tuple[Two, Path, Two]) -> None:
    held = one_and_two[2]["held"]
    assert {name.rpartition(".")[2] for name in held} == {"gate_up_proj", "down_proj"}
    assert all(own == [whole[0] // 2, *whole[1:]] for whole, own in held.values())


@pytest.mark.ranks
def test_what_ranks_that_share_the_experts_leave_behind_is_whole(
    one_and_two: tuple[Two, Path, Two], tiny_base: Path
) -> None:
    one, out, two = one_and_two
    host = ModelHost(spec(str(tiny_base), "none"))
    host.add_adapter("policy", out / "lora-adapter")
    assert facts(host, "policy") == two["lora facts"], "to the bit"
    host = trained(ModelHost(spec(str(tiny_base), "none")), "policy")
    assert host.saving.load_checkpoint(out / "lora") == HALF
    assert losses(host, HALF, STEPS) == pytest.approx(one["lora"][HALF:], rel=1e-5)
    host = trained(ModelHost(spec(str(tiny_base), "none", None)), None)
    assert host.saving.load_checkpoint(out / "whole") == HALF
    assert losses(host, HALF, STEPS) == pytest.approx(one["whole"][HALF:], rel=1e-5)
    ours, theirs = (load_file(out / f"{who}-model/model.safetensors") for who in ("one", "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("role", ["policy", None])
def test_routing_scores_and_the_reference_see_nothing_of_it(
    one_and_two: tuple[Two, Path, Two], role: str | None
) -> None:
    two = one_and_two[2]
    ours, replicas = two[f"experts {role}"], two[f"none {role}"]
    assert ours.keys() == replicas.keys()
    for what, values in replicas.items():
        assert ours[what] == (values if "load" in what else pytest.approx(values, rel=1e-5)), what
    (crowded, *_) = ours["load 1"]
    assert sum(crowded[:2]) == sum(crowded), "no token came to the second rank"
