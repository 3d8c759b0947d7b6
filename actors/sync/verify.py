"""Proof that weights have arrived: pure comparisons of what trainer and engine say.

The proof is exact: digests of the engine's bound tensors against the merge that the trainer computed.
Log-probabilities of probe sequences are the second witness; they see what comes after the bound tensors
(kernels that repack experts). Single tokens of a mixture of experts jump when a route flips (1.9e-2 in
float32, up to .8 in bfloat16, when all is well), so quantiles decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.sync.protocol import Expected, Offer, Readback

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.6, "float16": 0.2}
"""Of the 0.9 quantile of |difference| / max(1, |log-probability|), by dtype of the engine. Relative, because
rounding errors are: a token of log-probability -19 is off by .1 in bfloat16 when all is well. Seen when right
on the embedded base: 1e-6 in float32; in bfloat16 .01 on its own texts, .13 on random bytes, up to .26 after
training on nonsense. Without the repacking of experts: .7 to 5 in both. In 16 bits this is a coarse net."""
MEDIAN_SHARE = 0.2
"""The median has to stay below this share of the tolerance."""
DECIDABLE = 8.0
"""Smallest ratio of the trainer's change to its own noise at which nearness says anything."""
ROUNDED_AWAY = 0.5
"""Share of unchanged weights above which nearness is only reported in 16 bits: the engine is right to stay
where it was, because rounding leaves most of the update out."""
KEEP = 0.9
"""Share of the tokens that nearness looks at; flipped routes are among the rest."""


@dataclass(frozen=True)
class Reference:
    """A version by the trainer's account. Engines that are replaced later are compared with it too."""

    offer: Offer
    expected: Expected
    logps: list[np.ndarray]
    """float64, of each probe's tokens."""
    previous: list[np.ndarray] | None
    """The same of the version before."""


@dataclass(frozen=True)
class ProbeReport:
    """Engine against trainer over the probes' tokens, in |log-probability difference|."""

    max: float
    mean: float
    p50: float
    p90: float
    relative_p50: float
    """Of |difference| / max(1, |log-probability|)."""
    relative_p90: float
    tokens: int
    worst_probe: int
    """Index of the probe with the largest mean."""
    arrived: float | None
    """Share of the way from the trainer's previous version to this one that the engine went: 1 is there, 0
    has not moved. None where the change is too small to be told from noise."""
    left_base: float | None
    """The same from the base to this version."""


def compare_probes(
    engine: Sequence[np.ndarray],
    trainer: Sequence[np.ndarray],
    previous: Sequence[np.ndarray] | None = None,
    base: Sequence[np.ndarray] | None = None,
) -> ProbeReport:
    """Log-probabilities of the probes' tokens, one array per probe, by the engine and by the trainer.

    `previous`: the trainer's for the version before; `base`: the trainer's without adapter. Never an
    engine's: one repeats its own scores to the bit, and where policy and base are equal the differences of
    kernels would pass for the trainer's change.

    Raises:
        ValueError: the arrays don't have the same lengths.
    """
    sizes = [len(values) for values in trainer]
    for other in (engine, previous, base):
        if other is not None and [len(values) for values in other] != sizes:
            raise ValueError(f"probes of {sizes} tokens were scored as {[len(v) for v in other]}")
    found, right = np.concatenate(engine), np.concatenate(trainer)
    off = np.abs(found.astype(np.float64) - right)
    # A value that is no number compares as beyond any tolerance.
    off = np.where(np.isfinite(off), off, np.inf)
    bounds = np.cumsum([0, *sizes])
    means = [off[a:b].mean() for a, b in itertools.pairwise(bounds)]
    relative = off / np.maximum(1, np.abs(right))
    return ProbeReport(
        max=float(off.max()),
        mean=float(off.mean()),
        p50=_quantile(off, 0.5),
        p90=_quantile(off, 0.9),
        relative_p50=_quantile(relative, 0.5),
        relative_p90=_quantile(relative, 0.9),
        tokens=len(off),
        worst_probe=int(np.argmax(means)),
        arrived=None if previous is None else nearness(found, right, np.concatenate(previous)),
        left_base=None if base is None else nearness(found, right, np.concatenate(base)),
    )


def _quantile(values: np.ndarray, share: float) -> float:
    # "higher": no arithmetic between two values, one of which may be infinite.
    return float(np.quantile(values, share, method="higher"))


def nearness(found: np.ndarray, target: np.ndarray, origin: np.ndarray) -> float | None:
    """Position of `found` on the way from `origin` (0) to `target` (1), or None if noise hides it.

    The projection <found - origin, u> / <u, u> with u = target - origin: above 1/2 exactly if `found` is
    nearer to `target` (in the 2-norm). Its noise is |found - nearer end| / (sqrt(n) |u|).
    """
    off = np.minimum(np.abs(found - target), np.abs(found - origin))
    kept = off <= np.quantile(off, KEEP)
    found, target, origin = found[kept], target[kept], origin[kept]
    way = target - origin
    length = float(np.linalg.norm(way))
    noise = min(float(np.linalg.norm(found - target)), float(np.linalg.norm(found - origin)))
    if length == 0 or not length * np.sqrt(len(way)) > DECIDABLE * noise:
        return None
    return float((found - origin) @ way / (way @ way))


def mismatch_in_probes(
    report: ProbeReport, dtype: str, tolerance: float | None = None, unchanged: float = 0.0
) -> str | None:
    """Reason to distrust an engine's probes, or None.

    `dtype`: of the engine; `tolerance` None: by dtype; `unchanged`: share of the adapted weights that
    rounding to 16 bits leaves as in the base.
    """
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    facts = (
        f"probe {report.worst_probe} is the worst; |difference| of log-probabilities between engine and "
        f"trainer: median {report.p50:.2g}, 0.9 quantile {report.p90:.2g}, mean {report.mean:.2g}, max "
        f"{report.max:.2g} over {report.tokens} tokens"
    )
    if not (report.relative_p90 <= limit and report.relative_p50 <= MEDIAN_SHARE * limit):
        relative = f"relative: median {report.relative_p50:.2g}, 0.9 quantile {report.relative_p90:.2g}"
        return f"probes beyond {limit:g} ({relative}): {facts}"
    if dtype != "float32" and unchanged > ROUNDED_AWAY:
        return None
    for share, origin in ((report.arrived, "the previous version"), (report.left_base, "the base")):
        if share is not None and share < 0.5:
            return f"the engine is nearer to {origin} than to this one ({share:.2f} of the way): {facts}"
    return None


def mismatch_in_readback(expected: Expected, found: Readback, version: int) -> str | None:
    """Reason to distrust the tensors that an engine holds, or None."""
    if found.version != version:
        return f"read back version {found.version}, not {version}"
    if found.algorithm != expected.algorithm:
        return f"read back digests by {found.algorithm}, the trainer's are by {expected.algorithm}"
    if found.digest == expected.digest:
        return None
    missing = sorted(name for name in expected.digests if name not in found.digests)
    if missing:
        return f"{len(missing)} tensors are not bound in the engine, the first: {missing[0]}"
    wrong = sorted(name for name, digest in expected.digests.items() if found.digests[name] != digest)
    if wrong:
        return (
            f"{len(wrong)} of {len(expected.digests)} tensors in the engine differ from the trainer's, "
            f"the first: {wrong[0]}"
        )
    return None
