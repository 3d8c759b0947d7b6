"""Run-time checks of what is known before a stage starts: the first loss, the first rewards."""

from __future__ import annotations

from collections.abc import Mapping

from actors.algorithms import DpoLoss, KtoLoss
from actors.errors import InvariantViolation

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""On a loss of about 1. The policy and its reference see the same tokens packed differently, which moves
a sequence's log-probability by 1e-6 in float32 and a few 1e-2 in bfloat16."""


def check_first_step(stage: str, loss: DpoLoss | KtoLoss, metrics: Mapping[str, float], dtype: str) -> None:
    """The first update of a policy that starts as its own reference must see log-ratios of zero.

    Raises:
        InvariantViolation: a reward or the loss is not where it must start.
    """
    tolerance = TOLERANCE[dtype]
    for name in ("rewards/chosen", "rewards/rejected", "kl"):
        if name in metrics and not abs(metrics[name]) <= tolerance:
            raise InvariantViolation(
                "policy",
                f"first step of {stage}",
                f"{name} is {metrics[name]:.6f} and must be 0",
                "the reference is not the policy that this stage starts from: run with --fresh, which also "
                "ignores kept reference log-probabilities, and check `init` and `reference`",
            )
    if isinstance(loss, DpoLoss):
        loss.check_start(dict(metrics), tolerance)


def check_unmoved(stage: str, before: str, after: str, who: str = "policy") -> None:
    """Frozen parameters of a host must be the same bytes after a stage as before it.

    Raises:
        InvariantViolation: their digest changed.
    """
    if before != after:
        raise InvariantViolation(
            who,
            f"end of {stage}",
            f"frozen parameters changed while training (digest {before[:12]} -> {after[:12]})",
            "the adapter that came out must not be used; run again with --fresh and report this",
        )
