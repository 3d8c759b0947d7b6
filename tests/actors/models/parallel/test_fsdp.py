"""A base in slices: two ranks do what one does, and what they leave behind fits any split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from actors.errors import UserError
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.base.loading import load_base
from actors.models.lora.adapters import adapter_parameters, add_adapter, attach_lora
from actors.models.parallel import fsdp as sharding
from actors.models.spec import LoraSpec, ModelSpec
from actors.trainer.model_host import ModelHost
from tests.actors.models.parallel import sharding_families
from tests.actors.models.parallel import sharding_worker as worker
from tests.actors.models.tiny_models import SIZES, architectures, tiny_model
from tests.actors.rank_processes import free_address, two_ranks

Two = dict[str, Any]


@pytest.fixture(scope="module")
def one_and_two(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path, Two]:
    """Losses of one rank, the directory of both, and what two ranks report."""
    out = tmp_path_factory.mktemp("sharding")
    one = worker.trained(ModelHost(worker.spec(str(tiny_base), "none")), "policy")
    curve = worker.losses(one, 0, worker.HALF)
    one.saving.save_checkpoint(out / "one")
    addresses = [free_address() for _ in range(3)]
    with two_ranks(worker.__file__, out, str(tiny_base), str(out), *addresses) as two:
        curve += worker.losses(one, worker.HALF, worker.STEPS)
    return curve, out, two[0]


@pytest.mark.ranks
def test_two_sharded_ranks_learn_what_one_learns(one_and_two: tuple[list[float], Path, Two]) -> None:
    curve, _, two = one_and_two
    assert two["full"] == pytest.approx(curve[: worker.HALF], rel=1e-5)


@pytest.mark.ranks
def test_a_checkpoint_resumes_with_another_split_and_number_of_ranks(
    one_and_two: tuple[list[float], Path, Two], tiny_base: Path
) -> None:
    curve, out, two = one_and_two
    rest = curve[worker.HALF :]
    assert two["full after one"] == pytest.approx(rest, rel=1e-5), "one whole rank -> two sharded ones"
    assert two["base after full"] == pytest.approx(rest, rel=1e-5), "everything split -> the base alone"
    host = worker.trained(ModelHost(worker.spec(str(tiny_base), "none")), "policy")
    assert host.saving.load_checkpoint(out / "full") == worker.HALF
    assert worker.losses(host, worker.HALF, worker.STEPS) == pytest.approx(rest, rel=1e-5)


@pytest.mark.ranks
def test_what_a_sharded_policy_hands_out_is_what_an_unsharded_one_does(
    one_and_two: tuple[list[float], Path, Two], tiny_base: Path
) -> None:
    _, out, two = one_and_two
    for split in ("full", "base"):
        host = ModelHost(worker.spec(str(tiny_base), "none"))
        host.add_adapter("policy", out / f"{split}-adapter")
        assert worker.facts(host, "policy") == two[f"{split} facts"], "to the bit"


@pytest.mark.ranks
def test_full_fine_tuning_in_slices(
    one_and_two: tuple[list[float], Path, Two], tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    _, out, two = one_and_two
    host = worker.trained(ModelHost(worker.spec(str(tiny_base), "none", None)), None)
    curve = worker.losses(host, 0, worker.STEPS)
    assert two["whole"] == pytest.approx(curve, rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(out / "whole-model", dtype=torch.float32)
    host.saving.save_model(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(out / "whole-model/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=2e-5)
    assert saved.config.use_cache
    assert host.saving.load_checkpoint(out / "whole") == worker.HALF
    assert worker.losses(host, worker.HALF, worker.STEPS) == pytest.approx(curve[worker.HALF :], rel=1e-5)


@contextmanager
def rank_of_two(rank: int) -> Iterator[None]:
    """A process group without other processes: nothing can be sent, but slices are cut as for two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def two() -> DeviceMesh:
    """The ranks of the process group."""
    return init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))


# torch keeps the mesh of a process for good, so one process can be one rank only.
@pytest.mark.parametrize("model_type", architectures(set(SIZES) - {"dbrx"}))
def test_every_architecture_is_read_in_slices_of_the_whole(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    spec = ModelSpec(base=str(tmp_path), lora=None)
    whole = dict(load_base(spec).named_parameters())
    with rank_of_two(1):
        for name, parameter in load_base(spec, mesh=two(), split="layers").named_parameters():
            assert sharding.is_sharded(parameter), name
            rows = (*whole[name].chunk(2), whole[name][:0])[1]  # Of one row the other rank has nothing.
            assert torch.equal(sharding.own_slice(parameter), rows), name


def gathers(model: Any) -> int:
    """All-gathers of one pass without gradients."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as watched, torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None])
    sharding.reshard(model)
    return sum(event.count for event in watched.key_averages() if event.key == "c10d::_allgather_base_")


def test_a_layers_adapter_is_gathered_at_one_time_and_changes_no_name(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    lora = LoraSpec(r=4, targets=["attention", "experts", "router"])
    with rank_of_two(1):
        base = load_base(ModelSpec(base=str(tmp_path), lora=lora), mesh=two(), split="layers")
        layers, bare = base.config.num_hidden_layers, gathers(base)
        assert bare == layers + 2, "and the embeddings, and the head"
        peft = attach_lora(base, lora, "policy", seed=3)
        for number, name in enumerate(("policy", "critic"), 1):
            if name != "policy":
                add_adapter(peft, name, lora, trainable=True, seed=4)
            names, own = list(peft.state_dict()), adapter_parameters(peft, name)
            assert not any(sharding.is_sharded(p) for p in own.values())
            sharding.shard_with_layers(base, own)
            own = adapter_parameters(peft, name)
            assert own
            assert all(sharding.is_sharded(p) for p in own.values())
            assert list(peft.state_dict()) == names
            assert gathers(base) == bare + number * layers
            assert all(sharding.is_sharded(p) for p in peft.parameters()), "given back after the pass"


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("model_type", architectures({"qwen3_moe", "gpt_oss"}))
def test_experts_alone_are_read_or_drawn_in_slices(
    model_type: str, random_init: bool, tmp_path: Path
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    spec = ModelSpec(base=str(tmp_path), lora=None, random_init=random_init)
    whole = dict(load_base(spec).named_parameters())
    with rank_of_two(1):
        model = load_base(spec, mesh=two(), split="experts")
        for name, parameter in model.named_parameters():
            split = ".experts." in name
            assert sharding.is_sharded(parameter) == split, name
            rows = slice(4, 8) if split else ...
            assert torch.equal(sharding.own_slice(parameter), whole[name][rows]), name


def test_peft_computes_with_experts_that_are_gathered_not_with_those_of_other_ranks(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    lora = LoraSpec(r=4, expert_impl="peft")
    spec = ModelSpec(base=str(tmp_path), lora=lora)
    with rank_of_two(1):
        peft = attach_lora(load_base(spec, mesh=two(), split="layers"), lora)
        assert peft.get_base_model().config._experts_implementation == "grouped_mm"
        with pytest.raises(UserError, match=r"model\.lora\.expert_impl: auto"):
            attach_lora(load_base(spec, mesh=two(), split="experts"), lora)


def test_experts_that_can_not_be_shared_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_model("qwen3_moe", num_experts=7).save_pretrained(tmp_path / "odd")
    for name, reason in (("dense", "a llama model has no experts"), ("odd", "7 experts can't be shared")):
        with rank_of_two(1), pytest.raises(UserError, match=reason):
            load_base(ModelSpec(base=str(tmp_path / name)), mesh=two(), split="experts")


def test_an_architecture_without_a_plan_by_layer_is_refused(tmp_path: Path) -> None:
    tiny_model("dbrx").save_pretrained(tmp_path)
    with rank_of_two(1), pytest.raises(UserError, match="no plan that shards dbrx by layer"):
        load_base(ModelSpec(base=str(tmp_path)), mesh=two(), split="layers")


@pytest.mark.slow
@pytest.mark.architectures
def test_every_architecture_computes_in_slices_what_it_computes_whole(tmp_path: Path) -> None:
    every = [name for name in SIZES if name != "dbrx"] + ["llama+tied", "granitemoe+tied", "qwen3_moe+tied"]
    with two_ranks(sharding_families.__file__, tmp_path, free_address(), str(tmp_path), *every) as two:
        pass
    for family, (logits, gradient) in two[0].items():
        assert logits < 1e-5, family
        assert gradient < 1e-5, family


@pytest.mark.slow
@pytest.mark.architectures
def test_every_architecture_computes_with_experts_of_other_ranks_what_it_computes_whole(
    tmp_path: Path,
) -> None:
    rows = [ARCHITECTURES[name] for name in SIZES]
    every = [row.model_type for row in rows if row.is_moe and row.grouped_experts]
    ways = [f"{name}+experts{trains}" for name in every for trains in ("", "+all")]
    with two_ranks(sharding_families.__file__, tmp_path, free_address(), str(tmp_path), *ways) as two:
        pass
    for family, (logits, gradient) in two[0].items():
        assert logits < 1e-5, family
        # Its decays' gradients are sums that cancel: to pass one row after the other moves them as much.
        assert gradient < (1e-4 if family == "qwen3_next+experts+all" else 1e-5), family
