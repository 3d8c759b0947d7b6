"""Models and batches that sections share: Qwen3-30B-A3B with fresh weights, and rows of random tokens."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.loss import Loss
from actors.algorithms.policy import PolicyLoss
from actors.algorithms.sft import SftLoss
from actors.batches import Batch
from actors.models.spec import LoraSpec, ModelSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec
from benchmarks.gpu.check import Check

ROLE = "policy"
SAMPLES_PER_PROMPT = 4
"""Of the GRPO batch."""

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "initializer_range": 0.02,
}
"""Its published config.json, as far as shapes and arithmetic go."""
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "vocab_size": 2048,
}
"""What `--tiny` puts in its place."""


def settings(check: Check, **overrides: Any) -> dict[str, Any]:
    """Fields of the large base's config.json."""
    return QWEN3_30B_A3B | (TINY if check.tiny else {}) | overrides


@contextlib.contextmanager
def config_directory(check: Check, **overrides: Any) -> Iterator[str]:
    """A base that is only a config, for fresh weights."""
    with tempfile.TemporaryDirectory(prefix="raylign-gpu-check-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(settings(check, **overrides)))
        yield directory


def fresh_host(check: Check, lora: LoraSpec, checkpointing: bool = False, **overrides: Any) -> ModelHost:
    """The large base in bfloat16 with weights drawn on the device: on a CPU 30 B normal numbers take minutes.

    It has an adapter, `ROLE`. `overrides`: of its config, such as fewer layers.
    """
    with config_directory(check, **overrides) as base, check.device:
        model = ModelSpec(
            base=base, dtype="bfloat16", random_init=True, lora=lora, gradient_checkpointing=checkpointing
        )
        host = ModelHost(HostSpec(model=model, device=str(check.device)))
    host.add_adapter(ROLE)
    return host


def stir(host: ModelHost, seed: int = 0) -> None:
    """Give a fresh adapter a B that is not zero, so that it changes the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in host.state.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def rows(
    n: int, prompt: int, answer: int, vocabulary: int, seed: int, sequences: int = 1, share_prompt: int = 1
) -> Batch:
    """n rows of random tokens, lengths vary by a third; `share_prompt` rows after each other begin alike."""
    generator = np.random.default_rng(seed)

    def tokens(mean: int) -> list[int]:
        return generator.integers(3, vocabulary, max(2, int(generator.normal(mean, mean / 3)))).tolist()

    ids, masks = [], []
    begins: list[int] = []
    for row in range(n):
        begins = tokens(prompt) if row % share_prompt == 0 else begins
        for _ in range(sequences):
            ends = tokens(answer)
            ids.append(begins + ends)
            masks.append([False] * len(begins) + [True] * len(ends))
    return Batch.from_sequences(ids, masks, sequences)


def batches(
    host: ModelHost, vocabulary: int, prompt: int, answer: int, n: int
) -> dict[str, tuple[Batch, Loss]]:
    """A batch of SFT, DPO and GRPO, with what their losses read of the reference and the old policy."""
    pairs = rows(n, prompt, answer, vocabulary, seed=1, sequences=2)
    reference = host.scores.logprobs(pairs, None).reshape(-1, 2)
    pairs = pairs.with_columns(ref_chosen_logps=reference[:, 0], ref_rejected_logps=reference[:, 1])
    drawn = rows(n, prompt, answer, vocabulary, seed=2, share_prompt=SAMPLES_PER_PROMPT)
    advantages = np.repeat(np.random.default_rng(3).normal(size=n), drawn.label_counts)
    drawn = drawn.with_token_columns(advantages=advantages, old_logps=host.scores.token_logprobs(drawn, ROLE))
    return {
        "sft": (rows(n, prompt, answer, vocabulary, seed=0), SftLoss()),
        "dpo": (pairs, DpoLoss()),
        "grpo": (drawn, PolicyLoss(loss_type="bnpo")),
    }
