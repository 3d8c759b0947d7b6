"""Adapters that were trained on a quantised base: their notes, what they merge into, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.base.loading import load_base
from actors.models.facts import base_facts
from actors.models.lora import adapters, merge, merge_files
from actors.models.lora.adapter_files import base_quantization
from actors.models.lora.merge import merged_state
from actors.models.spec import LoraSpec, ModelSpec
from actors.models.twin import write_adapter_twin


@pytest.fixture
def saved(base_of: Any, randomise_b: Any, tmp_path: Path) -> Any:
    """(adapter directory, the model that it was trained in), by dtype and codec of the base."""

    def make(dtype: str = "float32", kind: str | None = "nf4", model_type: str = "mixtral") -> Any:
        spec = ModelSpec(base=str(base_of(model_type)), dtype=dtype, quantization=kind)
        peft = adapters.attach_lora(load_base(spec), LoraSpec(r=4), "policy", seed=3)
        randomise_b(peft, "policy")
        adapters.save_adapter(peft, "policy", tmp_path / "adapter")
        return tmp_path / "adapter", peft

    return make


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "nf4"), ("bfloat16", "nf4"), ("float32", "int8")])
def test_a_merge_is_the_trainers_own_to_the_bit(saved: Any, dtype: str, kind: str, tmp_path: Path) -> None:
    directory, peft = saved(dtype, kind)
    assert base_quantization(directory) == (kind, getattr(torch, dtype))
    report = merge.merge_adapter(None, directory, tmp_path / "merged", dtype)
    assert report.mean_logprob_diff is not None
    written, state = BaseCheckpoint(tmp_path / "merged"), merged_state(peft, "policy", getattr(torch, dtype))
    assert written.shapes.keys() == state.keys()
    assert all(torch.equal(written.tensor(name), state[name]) for name in state)


def test_a_base_under_older_names_is_loaded_whole_to_the_same_bits(
    saved: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory, _ = saved()
    merge.merge_adapter(None, directory, tmp_path / "by tensor", check=False)
    monkeypatch.setattr(merge_files.FileMerge, "of", staticmethod(lambda *args: None))
    merge.merge_adapter(None, directory, tmp_path / "whole", check=False)
    one, other = BaseCheckpoint(tmp_path / "by tensor"), BaseCheckpoint(tmp_path / "whole")
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.shapes)


def test_an_adapter_goes_on_only_with_the_weights_that_it_was_trained_on(saved: Any) -> None:
    directory, _ = saved()
    assert base_facts(ModelSpec(base=str(directory), quantization="nf4")).problems == []
    (problem,) = base_facts(ModelSpec(base=str(directory))).problems
    assert "was trained with model.quantization: nf4" in problem
    assert "raylign merge" in problem
    assert len(base_facts(ModelSpec(base=str(directory), quantization="int8")).problems) == 1


def test_an_adapter_of_an_unquantised_base_is_refused_on_a_quantised_one(saved: Any) -> None:
    directory, _ = saved(kind=None)
    assert base_quantization(directory) is None
    (problem,) = base_facts(ModelSpec(base=str(directory), quantization="nf4")).problems
    assert "set model.quantization: null" in problem


def test_the_twin_of_an_adapter_is_quantised_as_that_was(saved: Any, base_of: Any, tmp_path: Path) -> None:
    directory, _ = saved()
    write_adapter_twin(directory, base_of("mixtral"), tmp_path / "twin")
    assert base_quantization(tmp_path / "twin") == ("nf4", torch.float32)
