"""Run-time checks of what is known before a stage starts: the first loss, the first rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping

from actors.errors import InvariantViolation
from pipeline.stages.spec import DpoStage

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""On a loss of about 1. The policy and its reference see the same tokens packed differently, which moves
a sequence's log-probability by 1e-6 in float32 and a few 1e-2 in bfloat16."""


def first_dpo_loss(spec: DpoStage) -> float | None:
    """Loss of a policy that equals its reference (every log-ratio 0); None where data decides it.

    sigmoid, cdpo and robust give ln 2 (Rafailov et al. 2023, eq. 7, at log-ratio 0).
    """
    if spec.use_weighting or "sft" in spec.loss_type:
        return None
    half = 1 / (2 * spec.beta)
    eps = spec.label_smoothing
    at_zero = {
        "hinge": 1.0,
        "ipo": half**2,
        "nca_pair": 2 * math.log(2),
        "bco_pair": 2 * math.log(2),
        "sppo_hard": 2 * half**2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": 0.5 * math.log(2) + 0.5,
    }
    if "exo_pair" in spec.loss_type:
        at_zero["exo_pair"] = -math.log(2) - 0.5 * (math.log1p(-eps) + math.log(eps))
    weights = spec.loss_weights or [1.0] * len(spec.loss_type)
    return sum(w * at_zero.get(kind, math.log(2)) for w, kind in zip(weights, spec.loss_type))


def check_first_dpo_step(
    stage: str, spec: DpoStage, metrics: Mapping[str, float], dtype: str, aux_loss_coef: float
) -> None:
    """The first update of a policy that starts as its own reference must see log-ratios of zero.

    Raises:
        InvariantViolation: a reward or the loss is not where it must start.
    """
    tolerance = TOLERANCE[dtype]
    next_step = (
        "the reference is not the policy that this stage starts from: remove the cached reference "
        "log-probabilities (--fresh) and check `init`, `reference` and the adapter of the reference role"
    )
    for name in ("rewards/chosen", "rewards/rejected"):
        value = metrics.get(name, 0.0)
        if abs(value) > tolerance:
            raise InvariantViolation(
                "policy", f"first step of {stage}", f"{name} is {value:.6f} and must be 0", next_step
            )
    expected = first_dpo_loss(spec)
    if expected is None:
        return
    expected += aux_loss_coef * metrics.get("aux_loss", 0.0)
    if abs(metrics["loss"] - expected) > tolerance * max(1.0, expected):
        raise InvariantViolation(
            "policy",
            f"first step of {stage}",
            f"the loss is {metrics['loss']:.6f} and must start at {expected:.6f} for "
            f"{' + '.join(spec.loss_type)}",
            next_step,
        )


def check_unmoved(stage: str, before: str, after: str) -> None:
    """Frozen parameters must be the same bytes after a stage as before it.

    Raises:
        InvariantViolation: their digest changed.
    """
    if before != after:
        raise InvariantViolation(
            "policy",
            f"end of {stage}",
            f"frozen parameters changed while training (digest {before[:12]} -> {after[:12]})",
            "the adapter that came out must not be used; run again with --fresh and report this",
        )
