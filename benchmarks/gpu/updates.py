"""Updates of tiny models on the device, against the same updates on the CPU in float32."""

from __future__ import annotations

import tempfile

import numpy as np

from actors.models.base.loading import no_progress_bars
from actors.models.spec import LoraSpec, ModelSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec, OptimSpec
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.models import ROLE, batches
from tests.actors.models.tiny_models import tiny_model

Curves = dict[str, list[tuple[float, float]]]
"""Loss's name -> (loss, norm of the gradient) of each step."""

FAMILIES = ("qwen3_moe", "deepseek_v2", "gpt_oss", "mixtral")
"""Grouped attention, latent attention, sinks with transposed experts, experts under other names."""
WAYS = {
    "float32": ("float32", "auto", 1e-3),
    "float32_padded": ("float32", False, 1e-3),
    "bfloat16": ("bfloat16", "auto", 0.3),
}
"""Name -> dtype, packing, largest relative deviation. In bfloat16 a router that chooses otherwise for one
token moves all: this finds wrong code, not rounding."""
SMALLEST = 0.05
"""Deviations are shares of the right value, or of this where it is smaller: GRPO's loss begins near 0."""
VOCABULARY, PROMPT, ANSWER, ROWS = 300, 24, 12, 8


def run(check: Check) -> None:
    """Some steps of SFT, DPO and GRPO each, for each family and way."""
    wrong = []
    for family in check.cases(FAMILIES[:1] if check.tiny else FAMILIES):
        with check.case(family=family), tempfile.TemporaryDirectory(prefix="raylign-gpu-check-") as base:
            with no_progress_bars():
                tiny_model(family).save_pretrained(base)
            steps = 2 if check.tiny else 3
            right = curves(base, "cpu", "float32", "auto", steps)
            for way, (dtype, packing, limit) in WAYS.items():
                off = deviations(curves(base, str(check.device), dtype, packing, steps), right)
                check.tell(family=family, way=way, limit=limit, **off)
                wrong += [f"{family} {way} {name}: {x:.2g}" for name, x in off.items() if not x <= limit]
    if wrong:
        raise Deviation("; ".join(wrong))


def curves(base: str, device: str, dtype: str, packing: str | bool, steps: int) -> Curves:
    """What each loss does in its first steps, each from a fresh optimizer."""
    model = ModelSpec(base=base, dtype=dtype, lora=LoraSpec(r=8))  # type: ignore[arg-type]
    host = ModelHost(HostSpec(model=model, device=device, packing=packing))  # type: ignore[arg-type]
    host.add_adapter(ROLE)
    found: Curves = {}
    optimizer = OptimSpec(learning_rate=1e-3, lr_scheduler_type="constant")
    for name, (batch, loss) in batches(host, VOCABULARY, PROMPT, ANSWER, ROWS).items():
        host.updates.prepare_training(ROLE, optimizer, steps)
        metrics = [host.updates.update(batch, loss, step) for step in range(steps)]
        found[name] = [(step["loss"], step["grad_norm"]) for step in metrics]
    return found


def deviations(found: Curves, right: Curves) -> dict[str, float]:
    """Largest relative deviation of loss or gradient norm, by loss; not a number where one is none."""
    return {
        name: float(
            np.max(np.abs(np.subtract(curve, right[name])) / np.maximum(np.abs(right[name]), SMALLEST))
        )
        for name, curve in found.items()
    }
