"""Checks of the online stage on numbers that are known beforehand. Pure: what to raise, not when to look.

- Before the first update of a generation the policy is the one that `old_logps` are of: every ratio is 1.
- While the policy is the reference, their KL is 0.
- Engine and trainer hold the same weights: their log-probabilities of the samples agree up to the dtype.
- A batch in which every advantage is 0 teaches nothing; several in a row mean that nothing will be learnt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from actors.errors import InvariantViolation

RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Of |log-ratio| / max(1, |log-probability|) of a token at the first update of a generation."""
RATIO_BEYOND, RATIO_BEYOND_TENTH = 0.02, 0.5
"""Shares of tokens that may be beyond the tolerance, and beyond a tenth of it: bounds of the 0.98 quantile
and of the median. Both passes are over the same weights, in other micro-batches. Seen then on the embedded
base in bfloat16, in bins with a dense mask as on GPUs: a median and a 0.9 quantile of 0, a 0.99 quantile of
.003, and one token of 22,000 off by 1.1, whose route flipped. A trajectory's ratio is a product over its
tokens and grows with them, so tokens are looked at, whatever `importance_sampling_level` is."""
KL_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of the mean k3 per token between a policy and the reference that it starts from."""
MISMATCH_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of the mean k3 per token between engine and trainer. Wrong weights give .1 and more; k3 is quadratic, so
float32's usual 1e-6 in log-probability vanishes and one flipped route in a thousand tokens stays below."""
BEYOND_2X_TOLERANCE = {"float32": 0.005, "bfloat16": 0.05}
"""Of the share of tokens whose probability differs by more than a factor of 2 between engine and trainer."""
IDLE_LIMIT = 10
"""Steps in a row without any advantage. At a success rate of 1 % a step of 16 groups of 8 is idle 28 % of the
time; ten such steps in a row come up once in 390,000."""


def check_first_ratio(metrics: Mapping[str, float], tolerance: float) -> None:
    """Hold the first update's ratios against 1.

    Args:
        metrics: of that update; `ratio/beyond` and `ratio/beyond_tenth`, shares of tokens.
        tolerance: that they were counted with.

    Raises:
        InvariantViolation: the policy that trains is not the one whose log-probabilities were stored.
    """
    far, near = metrics["ratio/beyond"], metrics["ratio/beyond_tenth"]
    if not (far <= RATIO_BEYOND and near <= RATIO_BEYOND_TENTH):
        raise InvariantViolation(
            "policy",
            "first update of a generation",
            f"every ratio is 1 there, and {far:.1%} of the tokens (at most {RATIO_BEYOND:.0%}) are more than "
            f"{tolerance:g} off their stored log-probability, as a share of it, {near:.1%} (at most "
            f"{RATIO_BEYOND_TENTH:.0%}) more than {tolerance / 10:g}: what was stored is of other weights, "
            "tokens or another temperature",
            "this is a fault of the run and not of its settings: report it with the stage's config.yaml",
        )


def check_first_kl(logps: np.ndarray, ref_logps: np.ndarray, tolerance: float) -> None:
    """Hold the KL of the untrained policy to the reference that it starts from against 0.

    Args:
        logps, ref_logps: float64 (T,), of the same samples before the stage's first update.
        tolerance: of the mean k3 per token.

    Raises:
        InvariantViolation: the reference is not what the policy started from.
    """
    found = divergence(logps, ref_logps)["k3"]
    if not found <= tolerance:
        raise InvariantViolation(
            "reference", "first step", f"policy and reference are {found:.3g} nats per token apart before "
            f"the first update (at most {tolerance:g}): the reference is not what the policy started from",
            "check `init` and `reference` of the stage",
        )  # fmt: skip


def divergence(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """Distance of log-probabilities `q` from `p` at tokens sampled from `p`; float64 (T,) each.

    Returns:
        `k1` and `k3` (means, estimates of KL(p || q) in nats per token), `max` (largest |p - q|), and
        `beyond_2x` (share of tokens with probabilities more than a factor of 2 apart). 0 for no tokens.
    """
    d = np.asarray(p, np.float64) - np.asarray(q, np.float64)
    if not len(d):
        return {"k1": 0.0, "k3": 0.0, "max": 0.0, "beyond_2x": 0.0}
    return {
        "k1": float(d.mean()),
        "k3": float((np.expm1(-d) + d).mean()),
        "max": float(np.abs(d).max()),
        "beyond_2x": float((np.abs(d) > math.log(2)).mean()),
    }


def mismatch_metrics(engine: np.ndarray, trainer: np.ndarray, prefix: str = "mismatch") -> dict[str, float]:
    """`mismatch/k1|k3|max|beyond_2x` of the engine's behaviour log-probabilities to the trainer's."""
    return {f"{prefix}/{name}": value for name, value in divergence(engine, trainer).items()}


def check_mismatch(metrics: Mapping[str, float], tolerance: float, beyond_2x: float) -> None:
    """Stop where engine and trainer disagree on the samples.

    The largest difference is not held against anything: a single flipped route moves it by .02 and more
    when all is well.

    Raises:
        InvariantViolation: mean k3 or the share beyond a factor of 2 is out of tolerance, with all figures.
    """
    k3, share = metrics["mismatch/k3"], metrics["mismatch/beyond_2x"]
    if k3 <= tolerance and share <= beyond_2x:
        return
    raise InvariantViolation(
        "rollout", "log-probabilities", f"engine and trainer disagree on the samples: k3 {k3:.3g} per token "
        f"(at most {tolerance:g}), k1 {metrics['mismatch/k1']:.3g}, largest difference "
        f"{metrics['mismatch/max']:.3g}, {share:.2%} of tokens beyond a factor of 2 (at most "
        f"{beyond_2x:.2%})",
        "the engine serves other weights, or its dtype is coarser than `mismatch_tolerance` allows",
    )  # fmt: skip


def staleness(versions: np.ndarray, step: int, allowed: int) -> np.ndarray:
    """Age of every token: how many versions the policy of `step` is ahead of the weights it came from.

    Args:
        versions: int (T,), of the weights that each token was sampled from.
        allowed: largest age.

    Returns:
        int64 (T,), 0 to `allowed`.

    Raises:
        InvariantViolation: a token is older than allowed, or of weights that are not there yet.
    """
    ages = step - np.asarray(versions, np.int64)
    wrong = (ages < 0) | (ages > allowed)
    if not wrong.any():
        return ages
    raise InvariantViolation(
        "rollout", "generate", f"{int(wrong.sum())} of {len(ages)} tokens of step {step} were drawn by other "
        f"weights than versions {max(0, step - allowed)} to {step} (the first: version "
        f"{int(np.asarray(versions)[wrong][0])})",
        "this is a fault of the run and not of its settings: report it with the stage's config.yaml",
    )  # fmt: skip


def check_finite(**arrays: np.ndarray | None) -> None:
    """Refuse NaN and infinities, naming the array and the first place.

    Raises:
        InvariantViolation: an array has one.
    """
    for name, values in arrays.items():
        if values is None or np.isfinite(values).all():
            continue
        bad = np.flatnonzero(~np.isfinite(values))
        raise InvariantViolation(
            "rollout batch", name, f"{len(bad)} of {len(values)} values are not finite; the first is "
            f"{values[bad[0]]} at {bad[0]}", "lower the learning rate, or resume from the checkpoint before",
        )  # fmt: skip


IDLE_REASONS: dict[str, tuple[str, str]] = {
    "cut": (
        "every sample was cut at max_completion_length, and mask_truncated_completions leaves such out",
        "raise max_completion_length (completions/mean_length says how long samples get), check that the "
        "policy ends its turns, or set mask_truncated_completions to false",
    ),
    "unscored": (
        "no sample had a reward: every source passed every sample over (None)",
        "look at the reward functions: for which samples do they return None; a source of weight 0 counts "
        "for none",
    ),
    "neither": (
        "no sample counted: each was cut at max_completion_length or had no reward",
        "look at completions/clipped_ratio and at the rewards in samples.jsonl",
    ),
    "equal": (
        "all samples of a prompt get the same reward",
        "look at the rewards in samples.jsonl; more samples per prompt, a higher temperature, easier "
        "prompts or a reward with more than two values help",
    ),
}
"""Reasons why a step teaches nothing: told to the user, with the advice for each."""
SIGNAL_ROUNDING = 1e-10
"""Largest |advantage| that counts as 0, as a share of the largest reward where that is below 1. The mean of
equal rewards of 0.1 is 1e-17 off, which a standard deviation of 1e-4 makes 1e-13."""


def idle_reason(
    signal: np.ndarray, rewards: np.ndarray | None = None, kept: np.ndarray | None = None
) -> str | None:
    """Key of `IDLE_REASONS` for a step that teaches nothing; None for one that does.

    Args:
        signal: float64, any length: advantages of the tokens that count, or margins of pairs.
        rewards: float64 (N,), NaN where nobody scored; None: not known.
        kept: bool (N,): samples that weren't left out for being cut; None: all that there are.
    """
    scored = np.ones(len(signal), bool) if rewards is None else ~np.isnan(rewards)
    largest = 1.0 if rewards is None else min(1.0, np.abs(rewards[scored]).max(initial=0.0))
    if np.any(np.abs(signal) > SIGNAL_ROUNDING * largest):
        return None
    kept = np.ones(len(scored), bool) if kept is None else kept
    if (scored & kept).any():
        return "equal"
    if len(kept) and not kept.any():
        return "cut"
    return "unscored" if len(scored) and not scored.any() else "neither"


@dataclass(frozen=True)
class Idle:
    """Counts steps in a row without any advantage, and for which reasons."""

    steps: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Steps by key of `IDLE_REASONS`; fewer than `steps` where a checkpoint of earlier versions was read."""

    def after(
        self, signal: np.ndarray, rewards: np.ndarray | None = None, kept: np.ndarray | None = None
    ) -> Idle:
        """After one more step; arguments as those of `idle_reason`.

        Raises:
            InvariantViolation: `IDLE_LIMIT` steps in a row taught nothing.
        """
        reason = idle_reason(signal, rewards, kept)
        if reason is None:
            return Idle()
        reasons = {**self.reasons, reason: self.reasons.get(reason, 0) + 1}
        if self.steps + 1 < IDLE_LIMIT:
            return Idle(self.steps + 1, reasons)
        often = sorted(reasons, key=lambda one: -reasons[one])
        told = [
            f"in {reasons[one]} of them " * (reasons[one] < IDLE_LIMIT) + IDLE_REASONS[one][0]
            for one in often
        ]
        raise InvariantViolation(
            "policy", "advantages", f"all advantages were 0 in {IDLE_LIMIT} steps in a row: "
            f"{'; '.join(told)}; so nothing is learnt", "; ".join(IDLE_REASONS[one][1] for one in often),
        )  # fmt: skip


def load_distance(trainer: np.ndarray, engine: np.ndarray) -> float:
    """Largest distance over layers of two expert loads: total variation of their shares, 0 to 1.

    Args:
        trainer, engine: (layers, experts), tokens that each expert got.
    """
    shares = [load / np.maximum(load.sum(axis=1, keepdims=True), 1) for load in (trainer, engine)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).max(initial=0.0) / 2)
