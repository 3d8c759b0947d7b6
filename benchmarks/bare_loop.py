"""The yardstick of our own overhead: one PyTorch loop that does only what training needs.

Packed bins, logits at answer positions, expert LoRA beside the grouped product, fused AdamW. No
processes, no metrics, no checks. Written against PEFT and transformers alone, so that it shares no code
with what it measures.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward

from benchmarks.meter import Effort, Meter, Reading, peak_rss_bytes
from benchmarks.workloads import BETA, LEARNING_RATE, LORA_ALPHA, LORA_R, Row, Workload, make_rows

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IMPLEMENTATION = "bare_loop_lora"


class BesideWrapper(ParamWrapper):
    """Leaves A and B on the experts module for `experts_forward`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        experts, n = self.get_base_layer(), self.num_experts
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        factors = experts.__dict__.setdefault("factors", {})
        factors[self.parameter_name] = (
            a.view(n, -1, a.shape[-1]), b.view(b.shape[0], -1, n).permute(2, 0, 1).contiguous(),
            self.scaling["default"],
        )  # fmt: skip
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            factors.pop(self.parameter_name)


def experts_forward(
    self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """transformers' grouped product plus s B (A x) per expert."""
    factors = self.__dict__.get("factors")
    if not factors:
        return grouped_mm_experts_forward(self, hidden, index, weights)
    n, k = index.shape
    experts, order = torch.sort(index.reshape(-1))
    ends = torch.histc(experts.float(), self.num_experts, 0, self.num_experts - 1).cumsum(
        0, dtype=torch.int32
    )

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        a, b, scaling = factors[name]
        low = _grouped_linear(x, a, ends)
        return _grouped_linear(x, getattr(self, name), ends) + _grouped_linear(low * scaling, b, ends)

    y = linear(self._apply_gate(linear(hidden[order // k], "gate_up_proj")), "down_proj")
    y = y * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return y[back].view(n, k, -1).sum(1)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def load(base: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    config = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=ATTENTION, target_parameters=EXPERTS)
    model = get_peft_model(model, config)
    for module in model.modules():
        if type(module) is ParamWrapper:
            module.__class__ = BesideWrapper
    model.get_base_model().set_experts_implementation(IMPLEMENTATION)
    return model.train()


def pack(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, position_ids, predictors, labels, sequence) in bins as long as the longest sequence."""
    sequences = [(row.prompt, answer) for row in rows for answer in row.answers]
    lengths = [len(p) + len(a) for p, a in sequences]
    size = max(lengths)
    rooms: list[int] = []
    members: list[list[tuple[int, int]]] = []
    for s in sorted(range(len(sequences)), key=lambda s: -lengths[s]):
        fitting = [b for b, room in enumerate(rooms) if room >= lengths[s]]
        chosen = min(fitting, key=lambda b: rooms[b]) if fitting else len(rooms)
        if not fitting:
            rooms.append(size)
            members.append([])
        members[chosen].append((s, size - rooms[chosen]))
        rooms[chosen] -= lengths[s]
    ids, positions = np.zeros((len(rooms), size), np.int64), np.zeros((len(rooms), size), np.int64)
    predictors, labels, owners = [], [], []
    for b, inside in enumerate(members):
        for s, start in inside:
            prompt, answer = sequences[s]
            ids[b, start : start + lengths[s]] = prompt + answer
            positions[b, start:] = np.arange(size - start)
            first = b * size + start + len(prompt) - 1
            predictors.append(np.arange(first, first + len(answer)))
            labels.append(answer)
            owners.append(np.full(len(answer), s))
    flat = (np.concatenate(x) for x in (predictors, labels, owners))
    return (torch.from_numpy(ids), torch.from_numpy(positions), *(torch.from_numpy(x) for x in flat))


def token_logps(model: Any, packed: tuple[torch.Tensor, ...]) -> torch.Tensor:
    ids, positions, predictors, labels, _ = packed
    lm = model.get_base_model()
    hidden = lm.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return -F.cross_entropy(lm.lm_head(hidden.flatten(0, 1)[predictors]), labels, reduction="none")


def sums(logps: torch.Tensor, sequence: torch.Tensor, n: int) -> torch.Tensor:
    return logps.new_zeros(n).index_add(0, sequence, logps)


def run(workload: Workload, base: Path, effort: Effort, threads: int) -> dict[str, Any]:
    """SFT, or DPO with the reference's log-probabilities at hand."""
    torch.set_num_threads(threads)
    model: Any = load(base)
    rows = make_rows(workload, effort.batches * workload.batch_rows, base)
    steps = [rows[i : i + workload.batch_rows] for i in range(0, len(rows), workload.batch_rows)]
    # With this start the reference equals the policy: any constant does for speed.
    reference = torch.zeros(workload.batch_rows * workload.sequences_per_row)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    meter = Meter(effort)

    def step(batch: list[Row]) -> None:
        packed = pack(batch)
        logps = token_logps(model, packed)
        if workload.objective == "sft":
            loss = -logps.mean()
        else:
            margin = sums(logps, packed[-1], len(reference)) - reference
            loss = -F.logsigmoid(BETA * (margin[0::2] - margin[1::2])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    reading = _measure(step, steps, meter)
    name = "train" if workload.objective == "sft" else "warm"
    return {"readings": {name: reading}, "peak_rss_bytes": peak_rss_bytes([os.getpid()])}


def _measure(step: Any, steps: list[list[Row]], meter: Meter) -> Reading:
    number, enough = 0, False
    while not enough:
        if number == meter.effort.warm_up_steps:
            meter.start()
        batch = steps[number % len(steps)]
        step(batch)
        if number >= meter.effort.warm_up_steps:
            enough = meter.step(sum(row.n_tokens for row in batch))
        number += 1
    return meter.reading
