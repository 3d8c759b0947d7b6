"""Checkpoints with experts in MXFP4: dequantised to the bit by whoever reads them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.errors import UserError
from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.base.loading import load_base
from actors.models.base.resolving import resolve_base
from actors.models.lora import adapters, merge
from actors.models.lora.merge import merged_state
from actors.models.spec import LoraSpec, ModelSpec
from actors.models.tiny import byte_tokenizer
from tests.actors.models.tiny_models import write_mxfp4

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""E2M1, of the Open Compute Project's microscaling formats; the highest bit is the sign."""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A tiny gpt-oss in MXFP4."""
    directory = tmp_path / "gpt-oss"
    directory.mkdir()
    write_mxfp4(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_each_value_is_its_number_times_its_blocks_power_of_two(published: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    files = load_file(published / "model.safetensors")
    blocks, scales = files[f"{name}_blocks"], files[f"{name}_scales"]
    found = BaseCheckpoint(published).tensor(name)
    experts, rows, groups, half = blocks.shape
    assert tuple(found.shape) == (experts, groups * 2 * half, rows)
    for expert, row, group, byte in [(0, 0, 0, 0), (3, 17, 1, 5), (7, 127, 1, 15)]:
        both = int(blocks[expert, row, group, byte])
        power = 2.0 ** (int(scales[expert, row, group]) - 127)
        for place, code in enumerate((both & 15, both >> 4)):
            value = FP4[code & 7] * (-1 if code & 8 else 1) * power
            assert float(found[expert, group * 32 + 2 * byte + place, row]) == value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_dequantised_as_it_loads_and_that_is_said(
    published: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "actors.models.base.mxfp4"):
        model = load_base(ModelSpec(base=str(published), dtype=dtype))  # type: ignore[arg-type]
    assert "experts in MXFP4 are dequantised" in caplog.text
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert getattr(model.config, "quantization_config", None) is None
    files = BaseCheckpoint(published)
    state = merged_state(model)
    assert state.keys() == files.shapes.keys()
    assert all(torch.equal(state[name], files.tensor(name).to(state[name].dtype)) for name in state)


def test_in_four_bits_it_is_quantised_from_its_dequantised_weights(published: Path) -> None:
    from actors.models.quantization.layout import Rounding

    model = load_base(ModelSpec(base=str(published), quantization="nf4"))
    files = BaseCheckpoint(published, Rounding("nf4", model.config, torch.float32))
    state = merged_state(model)
    assert all(torch.equal(state[name], files.tensor(name).float()) for name in state)


def test_a_merge_into_it_is_a_model_in_16_bits(published: Path, tmp_path: Path) -> None:
    peft = adapters.attach_lora(load_base(ModelSpec(base=str(published))), LoraSpec(r=4), "policy", seed=3)
    with torch.no_grad():
        for name, parameter in adapters.adapter_parameters(peft, "policy").items():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    adapters.save_adapter(peft, "policy", tmp_path / "adapter")
    report = merge.merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    assert report.dtype == "bfloat16"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    state, written = merged_state(peft, "policy", torch.bfloat16), BaseCheckpoint(tmp_path / "merged")
    assert all(torch.equal(written.tensor(name), state[name]) for name in state)


@pytest.mark.parametrize(
    ("method", "problem"),
    [("bitsandbytes", "leaves stacked experts in 16 bits"), ("gptq", r"quantised \(gptq\)")],
)
def test_a_base_quantised_by_another_method_is_refused(published: Path, method: str, problem: str) -> None:
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=problem):
        resolve_base(ModelSpec(base=str(published))).checked()
