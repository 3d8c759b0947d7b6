"""Attention of all sequences in one call of torch's varlen attention equals a call for each group.

Where there is no GPU the slow attention stands in for its kernels, behind torch's own function and backward
pass."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.batches.attention_plan import AttentionPlan
from actors.batches.packing import padded
from actors.batches.padding_free import lay_out_padding_free
from actors.models.attention import by_sequence, varlen
from actors.models.attention.grouped import GroupedSequences
from actors.models.attention.varlen import VarlenSequences, runs_varlen
from actors.models.base.loading import load_base
from actors.models.spec import ModelSpec
from actors.trainer.token_scorer import TokenScorer
from tests.actors.models.attention import slow_attention
from tests.actors.models.attention.test_by_sequence import logps_and_gradient, pairs
from tests.actors.models.tiny_models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    slow_attention.register_kernels()


def plan(share: bool) -> AttentionPlan:
    batch = pairs(60)
    attention = lay_out_padding_free(batch, np.arange(batch.n_rows), share_prompts=share).attention
    assert attention is not None
    assert bool(attention.shared.any()) is share
    return attention


def tensors(
    rows: int, kv_heads: int, size: int, of_values: int, dtype: torch.dtype, device: str
) -> list[Any]:
    """Query, key, value, sinks; 4 heads."""
    generator = torch.Generator().manual_seed(rows + size)
    shapes = (rows, 4, size), (rows, kv_heads, size), (rows, kv_heads, of_values), (4,)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def output_and_gradients(
    sequences: Any, inputs: list[Any], window: int | None, with_sinks: bool
) -> list[torch.Tensor]:
    query, key, value, sinks = inputs
    found = sequences.attend(query, key, value, 0.0, None, window, sinks if with_sinks else None)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape).to(found)
    wanted = inputs if with_sinks else inputs[:3]
    return [found, *torch.autograd.grad((found * weights).sum(), wanted)]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("kv_heads", "size", "of_values"), [(4, 16, 16), (2, 20, 20), (4, 24, 16)])
def test_one_call_equals_a_call_for_each_group(
    kv_heads: int, size: int, of_values: int, share: bool, window: int | None, with_sinks: bool
) -> None:
    """With fewer heads for keys than for queries, sizes that the kernel lacks, and latent attention's."""
    attention = plan(share)
    rows = int((attention.lengths - attention.shared).sum())
    inputs = tensors(rows, kv_heads, size, of_values, torch.float32, "cpu")
    found, wanted = (
        output_and_gradients(form.of(attention, CPU), inputs, window, with_sinks)
        for form in (VarlenSequences, GroupedSequences)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_a_model_in_one_call_equals_padded_sequences(model_type: str, tmp_path: Any) -> None:
    settings = {"sliding_window": 16} if model_type == "gpt_oss" else {}
    tiny_model(model_type, **settings).save_pretrained(tmp_path)
    scorer = TokenScorer(load_base(ModelSpec(base=str(tmp_path))))
    scorer.sequences = VarlenSequences
    wanted, wanted_gradient = logps_and_gradient(scorer, pairs(130), padded)
    found, gradient = logps_and_gradient(
        scorer, pairs(130), partial(lay_out_padding_free, share_prompts=True)
    )
    assert torch.allclose(found, wanted, atol=2e-5)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-4 * wanted_gradient.abs().max())


def test_the_kernel_is_taken_on_cuda_in_16_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "largest_head", lambda device: 192)

    def runs(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **config: Any) -> bool:
        sizes = {"hidden_size": 256, "num_attention_heads": 4, **config}
        text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))
        model: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, config=text)
        return runs_varlen(model)

    assert runs()
    assert runs(dtype=torch.float16)
    assert not runs("cpu")
    assert not runs(dtype=torch.float32)
    assert not runs(attention_dropout=0.1)
    assert runs(head_dim=192)
    assert not runs(head_dim=200)
    assert runs(head_dim=64, qk_nope_head_dim=128, qk_rope_head_dim=64)
    assert not runs(head_dim=64, qk_nope_head_dim=128, qk_rope_head_dim=128)


@pytest.mark.parametrize(
    ("capability", "largest"), [((7, 5), 0), ((8, 0), 256), ((8, 6), 192), ((8, 9), 192), ((9, 0), 256)]
)
def test_older_cards_have_no_such_kernel(
    capability: tuple[int, int], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen.largest_head.__wrapped__(torch.device("cuda")) == largest


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.bfloat16, VarlenSequences), (torch.float32, GroupedSequences)]
)
def test_a_model_on_cuda_is_told_where_sequences_begin(
    dtype: torch.dtype, form: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "largest_head", lambda device: 256)
    model = tiny_model("qwen3_moe").to(dtype)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    assert by_sequence.use_by_sequence(model) is form


@pytest.mark.gpu
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("kv_heads", "size", "of_values"), [(4, 64, 64), (2, 80, 80), (4, 96, 64)])
def test_the_real_kernel_equals_the_slow_attention(
    kv_heads: int, size: int, of_values: int, window: int | None, with_sinks: bool
) -> None:
    attention = plan(share=True)
    rows = int((attention.lengths - attention.shared).sum())
    device = torch.device("cuda")
    inputs = tensors(rows, kv_heads, size, of_values, torch.bfloat16, "cuda")
    found = output_and_gradients(VarlenSequences.of(attention, device), inputs, window, with_sinks)
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    wanted = output_and_gradients(GroupedSequences.of(attention, CPU), exact, window, with_sinks)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            mine.float().cpu(), theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())
        )
