"""Deadlines of a stage's repeated calls, from how long its first ones took; pure.

A default has to fit the largest model on the slowest machine. A process that hangs in a stage whose steps
take two seconds need not be waited for as long.

- Only what a stage does again and again is measured (`MEASURED`), each method for itself: the others happen a
  few times, and last as long as a disk or a network lets them.
- The default holds until `CALLS` calls of a method were measured. From then on the limit is `FACTOR` x the
  longest so far, at least `FLOOR_S`. Compilation is in it, since the first call is.
- Later work can be larger: answers grow while a policy learns. Where a stage says by how much at most
  (`growth`), the limit is at least `SPARE` x what that would take.
- It is the default at most, unless that is less than `SPARE` x the longest call.
- What the user has set holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from actors.cluster.spec import LimitsSpec, Phase

MEASURED: frozenset[Phase] = frozenset({"update", "evaluate", "logprobs", "generate", "call"})
CUT = frozenset({"advance"})
"""Methods that may answer after a slice of their work: who cuts it says how long all of it took."""
CALLS = 3
FACTOR = 10.0
SPARE = 3.0
FLOOR_S = 60.0


@dataclass
class MeasuredLimits:
    """Deadlines in one stage, for all groups of processes that work in it."""

    limits: LimitsSpec
    note: Callable[[str], None] = field(default=lambda line: None)
    """Gets a line whenever a limit was chosen."""
    _largest: dict[str, float] = field(default_factory=dict)
    _most: dict[str, float] = field(default_factory=dict)
    """Kind of work -> its largest amount in a call so far, and the largest that there can be."""
    _calls: dict[tuple[str, Phase, str], tuple[int, float]] = field(default_factory=dict)
    """Group, phase, method -> number of calls, seconds of the longest."""
    _said: set[tuple[str, Phase]] = field(default_factory=set)

    def saw(self, kind: str, amount: float, most: float) -> None:
        """A call had so much work of a kind ("tokens"), and others can have `most`."""
        self._largest[kind] = max(amount, self._largest.get(kind, 1.0))
        self._most[kind] = most

    @property
    def growth(self) -> float:
        """The largest amount of work that a call can have, in multiples of the largest so far."""
        return max([1.0, *(self._most[kind] / largest for kind, largest in self._largest.items())])

    def took(self, group: str, phase: Phase, method: str, seconds: float) -> None:
        """A call was answered so many seconds after it was sent."""
        key = group, phase, method
        calls, longest = self._calls.get(key, (0, 0.0))
        self._calls[key] = calls + 1, max(longest, seconds)
        limit = self.of(*key)
        chosen = calls + 1 == CALLS and phase != "call" and limit != self.limits.of(phase)
        if chosen and (group, phase) not in self._said:
            self._said.add((group, phase))
            grown = f", {SPARE:g} x for work {self.growth:.1f} x as large" if self.growth > 1.05 else ""
            self.note(
                f"limits.{phase} of {group}: {limit:.0f} s: {FACTOR:g} x the longest of {CALLS} calls "
                f"({max(longest, seconds):.1f} s){grown}, {FLOOR_S:.0f} at least"
            )

    def forget(self, group: str) -> None:
        """Measure the calls of a group anew, which has more or fewer processes now for the same work."""
        self._calls = {key: known for key, known in self._calls.items() if key[0] != group}

    def of(self, group: str, phase: Phase, method: str) -> float:
        """Deadline in seconds."""
        default = self.limits.of(phase)
        calls, longest = self._calls.get((group, phase, method), (0, 0.0))
        if phase in self.limits.model_fields_set or phase not in MEASURED or calls < CALLS:
            return default
        wanted = max(FLOOR_S, FACTOR * longest, SPARE * self.growth * longest)
        return min(wanted, max(default, SPARE * longest))
