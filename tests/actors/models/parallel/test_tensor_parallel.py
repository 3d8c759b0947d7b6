"""Ranks that hold one model together, beside others that do: all of them do what one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.models.architectures.tensor_parallel_sizes import TENSOR_PARALLEL
from actors.trainer.model_host import ModelHost
from tests.actors.models.parallel import tensor_parallel_families
from tests.actors.models.parallel import tensor_parallel_worker as worker
from tests.actors.models.parallel.sharding_worker import HALF, LORA, STEPS, facts, losses, trained
from tests.actors.rank_processes import forked_ranks, free_address

Found = dict[str, Any]
ALONE = 1e-5
"""Relative difference of one rank from several."""


def one_rank(base: str, out: Path) -> Found:
    """The same work on one rank, which leaves its checkpoints for the others."""
    found: Found = {}
    for name, lora in (("lora", LORA), ("full", None)):
        host = trained(ModelHost(worker.spec(base, 1, lora)), None if lora is None else "policy")
        found[name] = losses(host, 0, HALF)
        host.saving.save_checkpoint(out / f"one-{name}")
        found[f"{name} after one"] = losses(host, HALF, STEPS)
        if lora is not None:
            found |= worker.of_pairs(host)
        else:
            host.saving.save_model(out / "one-model")
    return found


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def one_and_many(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Found, list[Found], Path]:
    """What one rank finds and what each of several does, and the directory of all."""
    out = tmp_path_factory.mktemp("tensor-parallel")
    one = one_rank(str(tiny_base), out)
    addresses = (free_address(), free_address())
    many = forked_ranks(worker.__file__, out, request.param, str(tiny_base), str(out), *addresses)
    return one, many, out


@pytest.mark.ranks
@pytest.mark.parametrize("what", ["lora", "lora after one", "full", "full after one", "critic", "aot"])
def test_ranks_that_hold_a_model_together_learn_what_one_learns(
    one_and_many: tuple[Found, list[Found], Path], what: str
) -> None:
    one, many, _ = one_and_many
    for rank in many:
        assert rank[what] == pytest.approx(one[what], rel=ALONE)


@pytest.mark.ranks
def test_they_compute_what_one_computes(one_and_many: tuple[Found, list[Found], Path]) -> None:
    one, many, _ = one_and_many
    for rank in many:
        assert rank["load"] == one["load"], "tokens of rows that several ranks have count once"
        assert rank["logps"] == pytest.approx(one["logps"], abs=2e-5)
        assert rank["values"] == pytest.approx(one["values"], abs=2e-5)


@pytest.mark.ranks
def test_what_they_leave_behind_is_whole(
    one_and_many: tuple[Found, list[Found], Path], tiny_base: Path
) -> None:
    one, many, out = one_and_many
    for name, lora in (("lora", LORA), ("full", None)):
        role = None if lora is None else "policy"
        host = trained(ModelHost(worker.spec(str(tiny_base), 1, lora)), role)
        assert host.saving.load_checkpoint(out / name) == HALF
        rest = one[f"{name} after one"]
        assert losses(host, HALF, STEPS) == pytest.approx(rest, rel=ALONE)
    host = ModelHost(worker.spec(str(tiny_base), 1))
    host.add_adapter("policy", out / "adapter")
    assert facts(host, "policy") == many[0]["lora facts"], "to the bit"
    ours, theirs = (load_file(out / name / "model.safetensors") for name in ("one-model", "model"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.architectures
def test_every_architecture_computes_together_what_it_computes_alone(tmp_path: Path) -> None:
    every = sorted(TENSOR_PARALLEL)
    script = tensor_parallel_families.__file__
    two = forked_ranks(script, tmp_path, 2, free_address(), str(tmp_path), *every)
    for family, (logits, gradient) in two[0].items():
        assert logits < 1e-5, family
        assert gradient < 1e-5, family
