"""Report of one weight sync, for logs and run reports."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from actors.sync.verify import ProbeReport


@dataclass(frozen=True)
class SyncReport:
    """One version on its way to all engines."""

    version: int
    payload: str
    bytes: int
    tensors: int
    digest: str
    seconds: dict[str, float]
    """gather, pack, wire (until all had staged), load (until all had committed), verify; turn (from trainer
    to engines) where they share a device."""
    probe: ProbeReport
    """Of the engine that is farthest from the trainer."""
    share_unchanged_bf16: float | None
    """Share of the adapted weights that rounding to bfloat16 would give the base's own value; None where all
    weights are trained."""
    replaced: tuple[int, ...] = ()
    """Engines that were lost on the way and brought up again."""
    withheld: tuple[int, ...] = ()
    """Engines that had the version and did not pass it on; from here on they pass nothing on."""

    def metrics(self) -> dict[str, float]:
        """For a step's log line, in seconds and bytes."""
        share = self.share_unchanged_bf16
        return {
            "sync/version": self.version,
            "sync/bytes": self.bytes,
            **{f"sync/{part}": seconds for part, seconds in self.seconds.items()},
            "sync/seconds": sum(self.seconds.values()),
            "sync/probe_p90": self.probe.relative_p90,
            "sync/probe_max": self.probe.max,
            **({} if share is None else {"sync/unchanged_bf16": share}),
        }


@dataclass
class Stopwatch:
    """Seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def skip(self) -> None:
        """All that passed since the last part counts for none."""
        self._since = time.perf_counter()

    def part(self, name: str) -> None:
        """All that passed since the last part was this one."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
