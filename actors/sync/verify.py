"""Did the weights arrive? Pure comparisons of what trainer and engine say.

The proof is exact: digests of the engine's bound tensors against the merge that the trainer computed.
Log-probabilities of probe sequences are the second witness; they see what comes after the bound tensors
(kernels that repack experts). Single tokens of a mixture of experts jump when a route flips (1.9e-2 in
float32, up to .4 in bfloat16, when all is well), so quantiles decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.sync.protocol import Readback

TOLERANCE = {"float32": 5e-4, "bfloat16": 0.15, "float16": 0.05}
"""Of the 0.9 quantile of |log-probability difference|. Seen when right: 2e-5 in float32 at 1 M parameters,
a mean of .005 in bfloat16; experts that were not repacked: .07 to 1.7."""
MEDIAN_SHARE = 0.2
"""The median has to stay below this share of the tolerance."""
DECIDABLE = 8.0
"""How many times its own noise the trainer's change must be before nearness says anything."""
KEEP = 0.9
"""Share of the tokens that nearness looks at; flipped routes are among the rest."""


@dataclass(frozen=True)
class ProbeReport:
    """Engine against trainer over the probes' tokens, in |log-probability difference|."""

    max: float
    mean: float
    p50: float
    p90: float
    p99: float
    tokens: int
    worst_probe: int
    """Index of the probe with the largest mean."""
    arrived: float | None
    """How far the engine went from the trainer's previous version to this one: 1 is there, 0 has not moved.
    None where the change is too small to be told from noise."""
    left_base: float | None
    """The same from the base to this version."""


def compare_probes(
    engine: Sequence[np.ndarray],
    trainer: Sequence[np.ndarray],
    previous: Sequence[np.ndarray] | None = None,
    base: Sequence[np.ndarray] | None = None,
    floor: float = 0.0,
) -> ProbeReport:
    """Log-probabilities of the probes' tokens, one array per probe, by the engine and by the trainer.

    `previous`: the trainer's for the version before; `base`: those of the base, by an engine; `floor`: as of
    `nearness`.

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
    p50, p90, p99 = (float(np.quantile(off, q, method="higher")) for q in (0.5, 0.9, 0.99))
    return ProbeReport(
        max=float(off.max()),
        mean=float(off.mean()),
        p50=p50,
        p90=p90,
        p99=p99,
        tokens=len(off),
        worst_probe=int(np.argmax(means)),
        arrived=None if previous is None else nearness(found, right, np.concatenate(previous), floor),
        left_base=None if base is None else nearness(found, right, np.concatenate(base), floor),
    )


def noise_floor(dtype: str, tolerance: float | None = None) -> float:
    """What right engines may differ by in the median: a smaller change of the trainer proves nothing."""
    return MEDIAN_SHARE * (TOLERANCE[dtype] if tolerance is None else tolerance)


def nearness(found: np.ndarray, target: np.ndarray, origin: np.ndarray, floor: float = 0.0) -> float | None:
    """Where `found` lies on the way from `origin` (0) to `target` (1), or None if noise hides it.

    `floor`: root mean square of target - origin up to which nothing is said. An engine that serves the base
    scores like itself to the bit, so that its own noise can't be seen where a policy starts as the base.

    The projection <found - origin, u> / <u, u> with u = target - origin: above 1/2 exactly if `found` is
    nearer to `target` (in the 2-norm). Its noise is |found - nearer end| / (sqrt(n) |u|).
    """
    off = np.minimum(np.abs(found - target), np.abs(found - origin))
    kept = off <= np.quantile(off, KEEP)
    found, target, origin = found[kept], target[kept], origin[kept]
    way = target - origin
    length = float(np.linalg.norm(way))
    noise = min(float(np.linalg.norm(found - target)), float(np.linalg.norm(found - origin)))
    if length <= floor * np.sqrt(len(way)) or not length * np.sqrt(len(way)) > DECIDABLE * noise:
        return None
    return float((found - origin) @ way / (way @ way))


def objection_to_probes(report: ProbeReport, dtype: str, tolerance: float | None = None) -> str | None:
    """What is wrong with an engine's probes, or None. `tolerance` None: by dtype of the engine."""
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    facts = (
        f"probe {report.worst_probe} is the worst; |difference| of log-probabilities between engine and "
        f"trainer: median {report.p50:.2g}, 0.9 quantile {report.p90:.2g}, mean {report.mean:.2g}, max "
        f"{report.max:.2g} over {report.tokens} tokens"
    )
    if not (report.p90 <= limit and report.p50 <= noise_floor(dtype, tolerance)):
        return f"probes beyond {limit:g}: {facts}"
    for share, origin in ((report.arrived, "the previous version"), (report.left_base, "the base")):
        if share is not None and share < 0.5:
            return f"the engine is nearer to {origin} than to this one ({share:.2f} of the way): {facts}"
    return None


def objection_to_readback(expected: Mapping[str, str], found: Readback, version: int) -> str | None:
    """What is wrong with the tensors that an engine holds, or None."""
    if found.version != version:
        return f"read back version {found.version}, not {version}"
    missing = sorted(name for name in expected if name not in found.digests)
    if missing:
        return f"{len(missing)} tensors are not bound in the engine, the first: {missing[0]}"
    wrong = sorted(name for name, digest in expected.items() if found.digests[name] != digest)
    if wrong:
        return (
            f"{len(wrong)} of {len(expected)} tensors in the engine differ from the trainer's merge, "
            f"the first: {wrong[0]}"
        )
    return None
