"""Waiting for ranks: with a deadline, and with the culprit's name when it goes wrong.

Decides nothing about Ray's scheduling; it only turns references into results, or into one RunFailure
that says which rank, in which phase, and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from actors.cluster.connection import ray_lost
from actors.cluster.patient_clock import patient
from actors.cluster.spec import Phase
from actors.errors import InvariantViolation, RunFailure, UserError

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")

CULPRIT_GRACE_S = 3.0
"""After the first error of a group: how long to look for a dead rank. When one rank dies, the others fail
within milliseconds in their collective ("connection closed by peer"), often before Ray reports the death;
the dead one is the one to name."""

TIMED_OUT = (
    "Timed out waiting", "Watchdog caught collective operation timeout",
    "seconds waiting for clients", "while trying to connect to", "wait timeout after",
)  # fmt: skip
"""In errors of torch's: of gloo, of NCCL, and of the store at which ranks meet."""

POLL_S = 0.5
"""Longest stretch inside Ray without a look at signals."""


_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextlib.contextmanager
def looking_up(check: Callable[[], None]) -> Iterator[None]:
    """While it lasts, this thread calls `check`, which may raise, every `POLL_S` while it waits for answers;
    not in waits of `check` itself."""
    before = _check.set(check)
    try:
        yield
    finally:
        _check.reset(before)


def look_up() -> None:
    """Call what `looking_up` was given."""
    check = _check.get()
    if check is None:
        return
    before = _check.set(None)
    try:
        check()
    finally:
        _check.reset(before)


@dataclass(frozen=True)
class Fault:
    """An error of one rank, or its death."""

    rank: int
    error: BaseException
    died: bool


@dataclass
class Answers:
    """Values and faults that a wait brought, by rank; ranks in neither had not answered by the deadline."""

    values: dict[int, object] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    """Ranks that were waited for no longer, and why."""

    @property
    def culprit(self) -> Fault | None:
        """The fault to report: a death before an own error before a collective that lost its peer."""
        if not self.faults:
            return None
        return min(self.faults, key=_precedence)


def _precedence(fault: Fault) -> tuple[int, int]:
    kinds = (UserError, InvariantViolation)
    if fault.died:
        return 0, fault.rank
    return (1, fault.rank) if isinstance(fault.error, kinds) else (2, fault.rank)


def wait(
    refs: Mapping[int, ObjectRef],
    limit_s: float,
    look: Callable[[list[int]], Mapping[int, str]] = lambda ranks: {},
) -> Answers:
    """Wait for one reference per rank, at most `limit_s` seconds; a fault ends the wait early. What is there
    already is taken in any case.

    `look`: says which of these ranks nobody has to wait for any longer, and why.

    Raises:
        RunFailure: Ray is lost.
    """
    import ray

    answers = Answers()
    rank_of = {ref: rank for rank, ref in refs.items()}
    open_refs = list(rank_of)
    deadline = patient() + limit_s
    while open_refs:
        refuse_lost_ray()
        look_up()
        left = deadline - patient()
        done, open_refs = ray.wait(open_refs, num_returns=1, timeout=max(0.0, min(POLL_S, left)))
        if not done and left <= 0:
            break
        if open_refs:
            # All that came meanwhile at once: each look at n references costs as much as n of them.
            more, open_refs = ray.wait(open_refs, num_returns=len(open_refs), timeout=0)
            done += more
        _take_all(answers, {rank_of[ref]: ref for ref in done})
        if any(fault.died for fault in answers.faults):
            break
        if answers.faults and done:
            deadline = min(deadline, patient() + CULPRIT_GRACE_S)
        answers.lost = dict(look([rank_of[ref] for ref in open_refs]))
        if answers.lost:
            break
    return answers


def _take_all(answers: Answers, done: Mapping[int, ObjectRef]) -> None:
    """Values or faults of calls that are back: all at once, unless one of them failed."""
    import ray

    if len(done) > 1:
        with contextlib.suppress(Exception):
            answers.values.update(zip(done, ray.get(list(done.values())), strict=True))
            return
    for rank, ref in done.items():
        _take(answers, rank, ref)


def _take(answers: Answers, rank: int, ref: ObjectRef) -> None:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        answers.values[rank] = ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        died = isinstance(cause, RayActorError)
        answers.faults.append(Fault(rank, cause, died))
    except RayActorError as error:
        answers.faults.append(Fault(rank, error, died=True))
    except RayError as error:
        answers.faults.append(Fault(rank, error, died=False))


class _Call(Generic[T]):
    """A call that was sent. The deadline runs from the moment when someone waits for it: calls queue up
    behind each other on purpose, and a queued call has not overrun anything."""

    def __init__(
        self,
        refs: dict[int, ObjectRef],
        phase: Phase,
        finish: Callable[[dict[int, ObjectRef], Phase, float | None], list[T]],
    ) -> None:
        self._refs, self._phase, self._finish = refs, phase, finish
        self._values: list[T] | None = None

    def _all(self, since: float | None = None) -> list[T]:
        if self._values is None:
            self._values = self._finish(self._refs, self._phase, since)
        return self._values

    def done(self) -> bool:
        """True if `result` would not wait."""
        import ray

        if self._values is not None:
            return True
        refs = list(self._refs.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return len(ready) == len(refs)


class GroupFuture(_Call[T]):
    """A call that was sent to every rank of a group; each answers with a T."""

    def result(self) -> list[T]:
        """The value of each rank, in rank order.

        Raises:
            UserError, InvariantViolation: a rank raised it.
            RunFailure: a rank died, failed, or overran the phase's deadline.
        """
        return self._all()

    def each(self) -> dict[int, WorkerFuture[T]]:
        """The call of each rank, for whoever waits for them one by one."""
        refs = self._refs.items()
        return {rank: WorkerFuture({rank: ref}, self._phase, self._finish) for rank, ref in refs}


class AgreedFuture(_Call[T]):
    """A call that was sent to every rank of a group, and whose result all of them have alike."""

    def result(self) -> T:
        """The value; raises as `GroupFuture.result`, and InvariantViolation where ranks differ."""
        return self._all()[0]


class WorkerFuture(_Call[T]):
    """A call that was sent to one rank, which answers with a T."""

    @property
    def ref(self) -> ObjectRef:
        """Ray's reference to the value."""
        (ref,) = self._refs.values()
        return ref

    def result(self, since: float | None = None) -> T:
        """That rank's value; raises as `GroupFuture.result`. `since` (`patient()`): when the deadline
        began, for whoever waits for several calls one after the other."""
        return self._all(since)[0]


def first_done(calls: Mapping[int, WorkerFuture], limit_s: float) -> list[int]:
    """Ranks whose answer is there (or whose process is gone); waits for one at most `limit_s` seconds.

    Raises:
        RunFailure: Ray is lost.
    """
    import ray

    refuse_lost_ray()
    look_up()
    refs = [call.ref for call in calls.values()]
    if not refs:
        return []
    ray.wait(refs, num_returns=1, timeout=limit_s)
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
    there = set(done)
    return [rank for rank, call in calls.items() if call.ref in there]


def waited_in_vain(fault: Fault) -> bool:
    """True if a rank failed since others did not come to a collective within its deadline."""
    return not fault.died and any(words in str(fault.error) for words in TIMED_OUT)


def refuse_lost_ray(now: bool = False) -> None:
    """Raises: RunFailure: Ray can't go on, which is behind whatever fails next. `now`: of `ray_lost`."""
    lost = ray_lost(now)
    if lost is not None:
        raise lost


def explain_death(error: BaseException) -> str:
    """One line on why Ray says that an actor is gone."""
    text = str(error)
    lowered = text.lower()
    if "memory monitor" in lowered or "low on memory" in lowered or "outofmemory" in lowered:
        return "its process was killed because the node ran out of memory"
    if "node" in lowered and ("died" in lowered or "dead" in lowered) and "worker process" not in lowered:
        return "the node that it ran on is gone"
    if "__init__" in lowered and "creation" in lowered:
        return "its process could not be set up: " + text.strip().splitlines()[-1]
    return "its process died (killed, crashed, or out of memory)"


def as_failure(error: BaseException, who: str, phase: str, next_step: str) -> BaseException:
    """The error to raise for one that a rank reported."""
    if isinstance(error, UserError | RunFailure):
        return error
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return RunFailure(who, phase, lines[-1], next_step)
