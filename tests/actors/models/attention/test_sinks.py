"""Attention with sinks equals transformers' eager one, alone and in a model, values and gradients."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from actors.batches.batch import Batch
from actors.batches.packing import micro_batches
from actors.batches.padding_free import lay_out_padding_free
from actors.models.attention.sinks import attend_with_sinks
from actors.models.base.loading import load_base
from actors.models.spec import ModelSpec
from actors.trainer.token_scorer import TokenScorer
from tests.actors.models.tiny_models import tiny_model

L = 7
PLACE = torch.arange(L)
CAUSAL = PLACE[:, None] >= PLACE
WINDOW = CAUSAL & (PLACE[:, None] - PLACE < 3)


def tensors(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize(
    ("mask", "seen", "queries"), [(None, CAUSAL, L), (WINDOW, WINDOW, L), (None, CAUSAL[-1:], 1)]
)
def test_a_sink_is_a_position_in_front_that_brings_no_value(
    mask: torch.Tensor | None, seen: torch.Tensor, queries: int
) -> None:
    query, key, value, sinks = tensors(2, 4, queries, 8), tensors(2, 4, L, 8), tensors(2, 4, L, 8), tensors(4)
    module: Any = SimpleNamespace(num_key_value_groups=1, sinks=sinks, training=False)
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    wanted, _ = eager_attention_forward(module, query, key, value, bias, 0.3)
    # transformers adds the sinks in float32.
    found = attend_with_sinks(query, key, value, sinks, mask, 0.0, 0.3).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=0.3)
    assert (plain.transpose(1, 2) - wanted).abs().max() > 0.1
    weights = tensors(*wanted.shape).detach()
    inputs = (query, key, value, sinks)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_packed_row_of_a_model_with_sinks_equals_transformers_one_sequence_at_a_time(tmp_path) -> None:
    tiny_model("gpt_oss", sliding_window=16).save_pretrained(tmp_path)
    plain, model = (load_base(ModelSpec(base=str(tmp_path))) for _ in range(2))
    assert plain.config._attn_implementation == "eager"
    assert plain.config.layer_types == ["sliding_attention", "full_attention"]
    scorer = TokenScorer(model)
    assert scorer.by_sequence
    generator = np.random.default_rng(0)
    lengths = (40, 5, 25, 130)
    ids = [generator.integers(3, 300, size=n).tolist() for n in lengths]
    batch = Batch.from_sequences(ids, [[False] + [True] * (n - 1) for n in lengths])
    (micro,) = micro_batches(batch, 10**6, cast(Any, partial(lay_out_padding_free, share_prompts=True)))
    found = scorer.statistics(micro).logps
    wanted = torch.cat(
        [
            plain(input_ids=torch.tensor([one])).logits[0, :-1].log_softmax(-1)[range(len(one) - 1), one[1:]]
            for one in ids
        ]
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    places = torch.linspace(-1, 1, len(found))
    (found * places).sum().backward()
    (wanted * places).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=0, atol=1e-4 * float(theirs.grad.abs().max()), msg=name
        )
