"""The whole of Qwen3-30B-A3B with fresh weights: SFT, DPO and GRPO steps, and a plain PEFT loop's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from actors.algorithms.loss import Loss
from actors.batches import Batch
from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from benchmarks.gpu import plain_peft
from benchmarks.gpu.check import Check
from benchmarks.gpu.models import ROLE, batches, fresh_host, rows, settings

LORA = LoraSpec(r=16, expert_rank="r/top_k")
WAYS: tuple[tuple[int, str | bool], ...] = (
    (8_192, "auto"),
    (16_384, "auto"),
    (4_096, "auto"),
    (16_384, False),
)
"""Positions of a micro-batch, and packing; the first is the product's own."""
PLAIN_S = 60.0
"""Time that is kept for the plain loop: two steps, the model made anew."""
TINY_WAYS: tuple[tuple[int, str | bool], ...] = ((256, "auto"), (256, False))


def run(check: Check) -> None:
    """Time every loss by micro-batch and packing; then, the model gone, the plain loop."""
    prompt, answer, n = (12, 8, 4) if check.tiny else (700, 300, 32)
    with check.case(side="Raylign"):
        _ours(check, prompt, answer, n)
    check.free()
    vocabulary = settings(check)["vocab_size"] - 1
    for micro in check.cases((256,) if check.tiny else (8_192,)):
        with check.case(side="plain PEFT", loss="sft", micro=micro):
            batch = rows(n, prompt, answer, vocabulary, seed=0)
            seconds, gib = plain_peft.step_of(check, LORA, batch, micro)
            facts = {"side": "plain PEFT", "loss": "sft", "micro": micro}
            check.tell(
                **facts,
                tokens=batch.n_tokens,
                seconds=seconds,
                tokens_per_s=batch.n_tokens / seconds,
                gib=gib,
            )


def _ours(check: Check, prompt: int, answer: int, n: int) -> None:
    made: list[ModelHost] = []
    seconds = check.once(lambda: made.append(fresh_host(check, LORA, checkpointing=True)))
    host = made.pop()
    optimizer = OptimSpec(learning_rate=1e-4, lr_scheduler_type="constant")
    facts = host.updates.prepare_training(ROLE, optimizer, 1_000)
    parameters = host.describe()["parameters"]
    check.tell(made_s=seconds, parameters=parameters, gib=check.peak_gib(), **facts)
    steps = itertools.count()
    for micro, packing in check.cases(TINY_WAYS if check.tiny else WAYS, PLAIN_S):
        with check.case(micro=micro, packing=packing):
            host.set_batching(packing, micro)
            made_of = batches(host, settings(check)["vocab_size"] - 1, prompt, answer, n)
            for name, (batch, loss) in made_of.items():
                with check.case(side="Raylign", loss=name, micro=micro, packing=packing):
                    _step(check, host, name, batch, loss, steps)
    if check.on_cuda:
        _kernels(check, host, rows(8, prompt, answer, settings(check)["vocab_size"] - 1, seed=0), steps)


def _step(
    check: Check, host: ModelHost, name: str, batch: Batch, loss: Loss, steps: itertools.count[int]
) -> None:
    host.updates.update(batch, loss, next(steps))
    check.watch_memory()
    seconds = check.once(lambda: host.updates.update(batch, loss, next(steps)))
    _, micros = host.state.runner.shard(batch)
    floor = check.floor_s(flops(settings(check), batch))
    check.tell(
        side="Raylign",
        loss=name,
        micro=host.state.runner.max_tokens,
        packing=host.state.runner.packing,
        micro_batches=len(micros),
        tokens=batch.n_tokens,
        positions=sum(micro.input_ids.size for micro in micros),
        seconds=seconds,
        tokens_per_s=batch.n_tokens / seconds,
        share_of_rate=None if floor is None else floor / seconds,
        gib=check.peak_gib(),
    )


def _kernels(check: Check, host: ModelHost, batch: Batch, steps: itertools.count[int]) -> None:
    from actors.algorithms.sft import SftLoss

    loss = SftLoss()
    host.set_batching(*reversed(WAYS[0]))
    host.updates.update(batch, loss, next(steps))
    check.tell(loss="sft", **check.kernels(lambda: host.updates.update(batch, loss, next(steps)), most=15))


def flops(size: dict[str, Any], batch: Batch) -> float:
    """Of a step with a frozen base: three products by each active weight (forward, again for the backward
    pass, gradient by the input), two by the head's at each label; without attention's and the adapter's."""
    hidden, heads = size["hidden_size"], size["num_attention_heads"] * size["head_dim"]
    keys = size["num_key_value_heads"] * size["head_dim"]
    experts = size["num_experts_per_tok"] * 3 * hidden * size["moe_intermediate_size"]
    layer = hidden * (2 * heads + 2 * keys) + experts + hidden * size["num_experts"]
    labels = int(np.count_nonzero(batch.loss_mask))
    return (
        6.0 * size["num_hidden_layers"] * layer * batch.n_tokens + 4.0 * labels * hidden * size["vocab_size"]
    )
