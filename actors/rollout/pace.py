"""Times of an engine's decoding steps, as a line over the size of the batch; pure."""

from __future__ import annotations

from dataclasses import dataclass

from actors.batches.slices import Work

KEEP = 0.98
"""Weight of what was measured before, at each new slice: about the last fifty count."""
DISTINCT = 1e-3
"""Batches of nearly one size don't tell a step's own time from its samples': below this share of the largest
possible determinant all of the time is taken for the steps' own."""


@dataclass(frozen=True)
class Pace:
    """A step of b samples takes `step + b x sample` seconds: least squares over slices of time.

    On a GPU the first part is nearly all of it up to hundreds of samples, on a CPU the second."""

    ss: float = 0.0
    st: float = 0.0
    tt: float = 0.0
    sw: float = 0.0
    tw: float = 0.0
    """Sums of products of steps (s), tokens (t) and seconds (w)."""

    @property
    def known(self) -> bool:
        return self.ss > 0

    def after(self, work: Work) -> Pace:
        """The pace once a slice was seen in which no sample began: the computation of a prompt is no decoding
        step."""
        s, t, w = work.steps, work.tokens, work.seconds
        old, new = (self.ss, self.st, self.tt, self.sw, self.tw), (s * s, s * t, t * t, s * w, t * w)
        return Pace(*(KEEP * before + now for before, now in zip(old, new, strict=True))) if s else self

    def line(self) -> tuple[float, float]:
        """Seconds of a step, and of each sample in it; neither is negative. (0, 1) before anything was
        measured: all that counts is the number of tokens."""
        if not self.known:
            return 0.0, 1.0
        determinant = self.ss * self.tt - self.st**2
        if determinant <= DISTINCT * self.ss * self.tt:
            return self.sw / self.ss, 0.0
        step = (self.sw * self.tt - self.tw * self.st) / determinant
        sample = (self.tw * self.ss - self.sw * self.st) / determinant
        if step < 0:
            return 0.0, self.tw / self.tt
        if sample < 0:
            return self.sw / self.ss, 0.0
        return step, sample
