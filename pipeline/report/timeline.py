"""Work and waiting of each process over time, from the traces of the actors' calls. Pure.

A lane is one process, e.g. `policy-0`. Between its calls it counts as waiting for the roles that work
meanwhile; inside a call as working, even while the call waits for another rank.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low
from typing import Any

from pipeline.report.tolerant_reading import as_count, as_number

KINDS = {
    "generate": "generate",
    "update": "update",
    "logprobs": "log-probabilities, values, scores",
    "sync": "sync",
}
"""Phases with a colour of their own -> their names in the legend."""

OTHER = "other"
"""Loading, saving, small calls."""

DRIVER = "driver"
"""Waited for while no process of a role works: the driver itself, or something that is no call."""

LANES = 12
"""Lanes drawn; of a larger run the first of each role."""

DETAIL_STEPS = 3
"""Steps of an online stage that are drawn large."""

SLACK_S = 10.0
"""A run's own count of its seconds ends a little before its processes do."""


LATEST_S = 1e11
"""Seconds since the epoch, in the year 5138: what is later is no time, and sums of it overflow."""


@dataclass(frozen=True)
class Call:
    """One call of a process; `start` and `end` are seconds since the epoch."""

    lane: str
    method: str
    phase: str
    start: float
    end: float
    step: int | None = None
    role: str = ""
    """The role that a shared worker worked for, where the call named one."""
    peak_rss: int | None = None
    """Bytes: the most memory that the process had had by the call's end."""

    @property
    def kind(self) -> str:
        """Kind of work in the drawing: a value of KINDS, or OTHER."""
        return KINDS.get(self.phase, OTHER)


@dataclass(frozen=True)
class Bar:
    """Calls of one kind that touch at the drawing's resolution."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Waiting:
    """One process's time in a window: the share at work, and the shares idle while each role worked."""

    lane: str
    busy: float
    waits: dict[str, float]
    """Role -> share, largest first; DRIVER for the time in which no process worked."""


def to_calls(lane: str, rows: Sequence[Mapping[str, Any]]) -> list[Call]:
    """The rows of one process's trace that have both times, by their start."""
    calls = []
    for row in rows:
        start, end = as_number(row.get("start")), as_number(row.get("end"))
        step, peak = as_number(row.get("step")), as_count(row.get("peak_rss"))
        if start is None or end is None or not 0 <= start <= end <= LATEST_S:
            continue
        calls.append(
            Call(
                lane,
                str(row.get("method") or "?"),
                str(row.get("phase") or ""),
                start,
                end,
                None if step is None else int(step),
                str(row.get("role") or ""),
                peak or None,
            )
        )
    return sorted(calls, key=lambda call: call.start)


def last_execution(calls: Sequence[Call], began: float | None, seconds: float | None) -> list[Call]:
    """Calls of the last execution alone: a directory that was resumed or evaluated again holds several."""
    if began is None:
        return list(calls)
    end = began + seconds + SLACK_S if seconds else float("inf")
    return [call for call in calls if began <= call.start <= end] or list(calls)


def role_of(lane: str) -> str:
    """`policy-0` -> `policy`."""
    return lane.rsplit("-", 1)[0]


def lanes(calls: Sequence[Call]) -> list[str]:
    """Processes, role by role, in the order in which the roles were first asked for anything."""
    first: dict[str, float] = {}
    for call in calls:
        first[role_of(call.lane)] = min(call.start, first.get(role_of(call.lane), call.start))
    return sorted({call.lane for call in calls}, key=lambda lane: (first[role_of(lane)], _rank(lane)))


def shown_lanes(calls: Sequence[Call]) -> list[str]:
    """All lanes, or the first of each role where that would be more than LANES."""
    found = lanes(calls)
    firsts = {role_of(lane): lane for lane in reversed(found)}
    return found if len(found) <= LANES else [lane for lane in found if firsts[role_of(lane)] == lane]


def _rank(lane: str) -> tuple[int, str]:
    tail = lane.rsplit("-", 1)[-1]
    return (int(tail) if tail.isdigit() else 0, lane)


def bars(calls: Sequence[Call], gap: float) -> list[Bar]:
    """One lane's calls, those of a kind joined where less than `gap` seconds lie between them."""
    joined: list[Bar] = []
    for call in calls:
        last = joined[-1] if joined else None
        if last is not None and last.kind == call.kind and call.start - last.end < gap:
            joined[-1] = Bar(last.kind, last.start, max(last.end, call.end))
        else:
            joined.append(Bar(call.kind, call.start, call.end))
    return joined


def syncs(calls: Sequence[Call]) -> list[tuple[float, float]]:
    """Start and end of each weight sync: calls of phase `sync` with no generation between them."""
    groups: list[list[Call]] = [[]]
    for call in sorted(calls, key=lambda call: call.start):
        if call.phase == "sync":
            groups[-1].append(call)
        elif call.phase == "generate" and groups[-1]:
            groups.append([])
    return [(group[0].start, max(call.end for call in group)) for group in groups if group]


def online_window(calls: Sequence[Call]) -> tuple[float, float] | None:
    """Window from the first weight sync's end to the last one's: whole steps of the online stages."""
    found = syncs(calls)
    return (found[0][1], found[-1][1]) if len(found) > 1 else None


def detail_window(calls: Sequence[Call]) -> tuple[float, float] | None:
    """A few whole steps, from the end of a sync, around the step of median length; None without two."""
    ends = [end for _, end in syncs(calls)]
    if len(ends) < 3:
        return None
    lengths = [later - sooner for sooner, later in pairwise(ends)]
    middle = lengths.index(median_low(lengths))
    first = max(0, min(middle - DETAIL_STEPS // 2, len(lengths) - DETAIL_STEPS))
    return ends[first], ends[min(first + DETAIL_STEPS, len(lengths))]


def within(calls: Sequence[Call], window: tuple[float, float]) -> list[Call]:
    """Calls that overlap a window."""
    return [call for call in calls if call.end > window[0] and call.start < window[1]]


def waiting(calls: Sequence[Call], window: tuple[float, float]) -> list[Waiting]:
    """Each process's time in the window. Time in which several roles worked is shared between them."""
    length = window[1] - window[0]
    names = shown_lanes(calls)
    busy = dict.fromkeys(names, 0.0)
    waits: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in names}
    for start, end, working in _segments(calls, window):
        roles = sorted({role_of(lane) for lane in working}) or [DRIVER]
        for name in names:
            if name in working:
                busy[name] += end - start
                continue
            for role in roles:
                waits[name][role] += (end - start) / len(roles)
    return [Waiting(name, busy[name] / length, _shares(waits[name], length)) for name in names]


def _shares(seconds: Mapping[str, float], length: float) -> dict[str, float]:
    ranked = sorted(seconds.items(), key=lambda one: -one[1])
    return {role: value / length for role, value in ranked}


def _segments(
    calls: Sequence[Call], window: tuple[float, float]
) -> list[tuple[float, float, frozenset[str]]]:
    """The window cut wherever a call starts or ends: (start, end, lanes at work)."""
    edges = []
    for call in within(calls, window):
        edges.append((max(call.start, window[0]), 1, call.lane))
        edges.append((min(call.end, window[1]), -1, call.lane))
    edges.sort(key=lambda edge: edge[0])
    depth: Counter[str] = Counter()
    segments = []
    at = window[0]
    for time, change, lane in [*edges, (window[1], 0, "")]:
        if time > at:
            segments.append((at, time, frozenset(name for name, count in depth.items() if count > 0)))
            at = time
        depth[lane] += change
    return segments


def chrome_trace(calls: Sequence[Call]) -> dict[str, Any]:
    """The calls in the trace event format (chrome://tracing, Perfetto): a process a role, a thread a rank."""
    roles = list(dict.fromkeys(role_of(lane) for lane in lanes(calls)))
    origin = min((call.start for call in calls), default=0.0)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": role}}
        for pid, role in enumerate(roles)
    ]
    for lane in lanes(calls):
        place = {"pid": roles.index(role_of(lane)), "tid": _rank(lane)[0]}
        events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": lane}})
    for call in calls:
        known = {"step": call.step, "role": call.role or None}
        events.append(
            {
                "ph": "X",
                "name": call.method,
                "cat": call.phase,
                "ts": round(1e6 * (call.start - origin)),
                "dur": round(1e6 * (call.end - call.start)),
                "pid": roles.index(role_of(call.lane)),
                "tid": _rank(call.lane)[0],
                "args": {key: value for key, value in known.items() if value is not None},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
