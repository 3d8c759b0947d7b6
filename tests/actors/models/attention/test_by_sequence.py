"""Attention by sequence on a flat row equals one padded sequence at a time, values and gradients."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.algorithms import chunked_logprob as head_logprob
from actors.batches.batch import Batch
from actors.batches.gathering import Gathering
from actors.batches.packing import LayOut, in_bins, micro_batches, padded
from actors.batches.padding_free import lay_out_padding_free
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.attention.gather import Gather, picked
from actors.models.base.loading import load_base
from actors.models.spec import ModelSpec
from actors.trainer import token_scorer as scoring
from actors.trainer.token_scorer import TokenScorer
from tests.actors.models.tiny_models import architectures
from tests.architecture_results import record

PACKABLE = [t for t, row in ARCHITECTURES.items() if row.packs != "no"]


def pairs(longest: int) -> Batch:
    """Pairs with a common prompt, some beyond the length from which sequences attend alone."""
    generator = np.random.default_rng(0)
    ids, masks = [], []
    for prompt_length in (4, 11, longest - 20):
        prompt = generator.integers(3, 300, size=prompt_length).tolist()
        for answer_length in generator.integers(2, 12, size=2).tolist():
            ids.append(prompt + generator.integers(3, 300, size=answer_length).tolist())
            masks.append([False] * prompt_length + [True] * answer_length)
    return Batch.from_sequences(ids, masks, 2)


def logps_and_gradient(
    scorer: TokenScorer, batch: Batch, lay_out: LayOut
) -> tuple[torch.Tensor, torch.Tensor]:
    (micro,) = micro_batches(batch, 10**6, lay_out)
    scorer.model.zero_grad()
    logps = scorer.statistics(micro).logps
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = [p.grad.reshape(-1) for p in scorer.model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(gradients)


@pytest.mark.parametrize("model_type", architectures(PACKABLE))
@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_padding_free_row_equals_padded_sequences(model_type, share_prompts, base_of) -> None:
    scorer = TokenScorer(load_base(ModelSpec(base=str(base_of(model_type)))))
    assert scorer.by_sequence
    batch = pairs(130)
    wanted, wanted_gradient = logps_and_gradient(scorer, batch, padded)
    found, gradient = logps_and_gradient(
        scorer, batch, partial(lay_out_padding_free, share_prompts=share_prompts)
    )
    assert torch.allclose(found, wanted, atol=2e-5)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-4 * wanted_gradient.abs().max())
    record(model_type, rows=float((found - wanted).abs().max()))


@pytest.mark.parametrize("model_type", architectures(set(ARCHITECTURES) - set(PACKABLE)))
def test_padded_rows_equal_one_sequence_at_a_time(model_type, base_of) -> None:
    scorer = TokenScorer(load_base(ModelSpec(base=str(base_of(model_type)))))
    batch = pairs(150)
    found, gradient = logps_and_gradient(scorer, batch, padded)
    scorer.model.zero_grad()
    places = torch.linspace(-1, 1, len(found))
    alone = []
    for row in range(batch.n_rows):
        (micro,) = micro_batches(batch.select(np.array([row])), 10**6, padded)
        alone.append(scorer.statistics(micro).logps)
        weights = places[sum(map(len, alone[:-1])) :][: len(alone[-1])]
        (alone[-1] * weights).sum().backward()
    wanted = torch.cat(alone).detach()
    assert torch.allclose(found, wanted, atol=2e-5)
    expected = torch.cat([p.grad.reshape(-1) for p in scorer.model.parameters() if p.grad is not None])
    assert torch.allclose(gradient, expected, atol=1e-4 * expected.abs().max())
    record(model_type, rows=float((found - wanted).abs().max()))


def test_a_sliding_window_is_kept(base_of) -> None:
    model = load_base(ModelSpec(base=str(base_of("mistral"))))
    model.config.sliding_window = 16
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 16
    scorer = TokenScorer(model)
    batch = pairs(130)
    wanted, _ = logps_and_gradient(scorer, batch, padded)
    found, _ = logps_and_gradient(scorer, batch, partial(lay_out_padding_free, share_prompts=True))
    assert torch.allclose(found, wanted, atol=2e-5)
    model.config.sliding_window = None
    unlimited, _ = logps_and_gradient(scorer, batch, padded)
    assert not torch.allclose(unlimited, wanted, atol=1e-3)


def test_samples_of_one_prompt_equal_padded_ones(base_of) -> None:
    """What all prompts begin with, what some go on with, and whole prompts stand once."""
    generator = np.random.default_rng(1)
    head = generator.integers(3, 300, size=5).tolist()
    ids, masks = [], []
    for length in (4, 30, 110):
        prompt = head + generator.integers(3, 300, size=length).tolist()
        for answer in generator.integers(1, 12, size=5).tolist():
            ids.append(prompt + generator.integers(3, 300, size=answer).tolist())
            masks.append([False] * len(prompt) + [True] * answer)
    batch = Batch.from_sequences(ids, masks)
    scorer = TokenScorer(load_base(ModelSpec(base=str(base_of("qwen3_moe")))))
    shared = partial(lay_out_padding_free, share_prompts=True)
    (micro,) = micro_batches(batch, 10**6, shared)
    assert micro.n_tokens < batch.n_tokens / 3
    wanted, wanted_gradient = logps_and_gradient(scorer, batch, padded)
    found, gradient = logps_and_gradient(scorer, batch, shared)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-4 * wanted_gradient.abs().max())


def test_bins_stand_in_one_row_for_flash_attention(base_of, monkeypatch) -> None:
    """transformers tells it where sequences begin by position ids, and only where there is one row."""
    seen = []

    def flash(module, query, key, value, mask, scaling, position_ids, **kwargs):
        assert mask is None
        seen.append(query.shape[0])
        starts = (
            [*torch.where(position_ids[0] == 0)[0].tolist(), query.shape[2]] if len(query) == 1 else [0, None]
        )
        spans = list(itertools.pairwise(starts))
        return torch.cat(
            [
                sdpa_attention_forward(
                    module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, scaling=scaling
                )[0]
                for a, b in spans
            ],
            dim=1,
        ), None

    batch, spec = pairs(130), ModelSpec(base=str(base_of("qwen3_moe")))
    wanted, wanted_gradient = logps_and_gradient(TokenScorer(load_base(spec)), batch, padded)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model = load_base(spec)
    model.config._attn_implementation_internal = "flash_attention_2"
    scorer = TokenScorer(model)
    assert not scorer.by_sequence
    seen.clear()
    (micro,) = micro_batches(batch, 10**6, in_bins(128))
    assert len(micro.input_ids) > 1
    found, gradient = logps_and_gradient(scorer, batch, in_bins(128))
    assert set(seen) == {1}
    assert torch.allclose(found, wanted, atol=2e-5)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-4 * wanted_gradient.abs().max())


def test_the_gradient_of_picked_rows_adds_up_over_all_that_read_them() -> None:
    index = np.array([2, 0, 2, 3, 2])
    gather = Gather.of(Gathering.of(index, 5), torch.device("cpu"))
    assert [tuple(picks.shape) for picks in gather.readers] == [(2, 0), (2, 1), (1, 3)]
    rows = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(picked(rows, gather), rows[torch.from_numpy(index)])
    assert torch.autograd.gradcheck(lambda rows: picked(rows, gather), rows.requires_grad_())


def test_picks_of_padding_add_nothing_to_the_gradient() -> None:
    real = np.array([True, True, False])
    gather = Gather.of(Gathering.of(np.array([0, 1, 1]), 2, real), torch.device("cpu"))
    rows = torch.zeros(2, 1, requires_grad=True)
    picked(rows, gather).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("model_type", architectures(PACKABLE))
def test_logits_by_blocks_equal_whole_ones(model_type, base_of, monkeypatch) -> None:
    model = load_base(ModelSpec(base=str(base_of(model_type))))
    model.get_output_embeddings().weight.requires_grad_(False)
    scorer, whole = TokenScorer(model), partial(lay_out_padding_free, share_prompts=True)
    wanted, wanted_gradient = logps_and_gradient(scorer, pairs(130), whole)
    monkeypatch.setattr(scoring, "block_elements", lambda _: 0)
    monkeypatch.setattr(head_logprob, "HEAD_BLOCK_ELEMENTS", 3000)
    found, gradient = logps_and_gradient(scorer, pairs(130), whole)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-4 * wanted_gradient.abs().max())


@pytest.mark.parametrize("trains", [False, True])
def test_logits_that_a_model_scales_are_made_by_blocks_too(trains, base_of, monkeypatch) -> None:
    config = AutoConfig.from_pretrained(base_of("granitemoe"))
    config.logits_scaling = 6.0
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.requires_grad_(trains)
    scorer, whole = TokenScorer(model), partial(lay_out_padding_free, share_prompts=True)
    assert scorer.logit_scale == pytest.approx(1 / 6)
    wanted, wanted_gradient = logps_and_gradient(scorer, pairs(130), whole)
    monkeypatch.setattr(scoring, "block_elements", lambda _: 0)
    monkeypatch.setattr(head_logprob, "HEAD_BLOCK_ELEMENTS", 3000)
    found, gradient = logps_and_gradient(scorer, pairs(130), whole)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-4 * wanted_gradient.abs().max())
