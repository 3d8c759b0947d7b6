"""A process of environments, seen from the run's process; its inside is `child.py`.

A step that doesn't answer in time is the last of its sample: the process is killed and started anew, and the
other samples' environments are made again from their row, their seed and what was said to them. One that then
answers differently can't be gone on with.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from actors.errors import RunFailure
from pipeline.rewards.processes import IMPORT_S, LOOK_S, Gone, Late, LoadedCode, UserProcess, send_bytes
from pipeline.rewards.user_functions import kept, user_function

GRACE_S = 1.0
"""Seconds beyond its limit until a step counts as one that holds the whole process up: a coroutine is cut
short in the process itself."""

NOT_REPLAYED = (
    "after its process was lost it answered differently to the same row, seed and messages: what an "
    "environment does has to follow from these"
)


@dataclass(frozen=True)
class EnvironmentReply:
    """Answer of one sample's environment."""

    number: int
    value: Any = None
    problem: str = ""


@dataclass
class _Live:
    """A sample whose environment may be asked again."""

    requests: list[tuple[Any, ...]] = field(default_factory=list)
    """All that it was asked, the open one included."""
    values: list[Any] = field(default_factory=list)
    """All that it answered."""
    replayed: int = 0
    """Answers that the present process has given again."""


class EnvironmentProcess(UserProcess):
    """Environments of one class (or tools, or an agent), one object a sample. For one thread at a time."""

    ENTRY = "from pipeline.environments.child import start; start()"

    def __init__(
        self, env: str | None, tools: Sequence[str], timeout_s: float, agent: str | None = None
    ) -> None:
        """Start it, without waiting for the import."""
        self._asked = env, list(tools), agent, timeout_s
        self._timeout_s, self._agent = timeout_s, agent is not None
        self._kind: dict[str, Any] | None = None
        self._live: dict[int, _Live] = {}
        self._begun: dict[int, float] = {}
        """Samples in a step, with the time at which it began."""
        self._sent: dict[int, None] = {}
        """Samples with a request in the process, in order."""
        self._waiting: dict[int, None] = {}
        """Samples with a request that was not sent yet."""
        self._careful = False
        """One request at a time: the process was ended by one of several."""
        self._replies: list[EnvironmentReply] = []
        self._outbox: queue.SimpleQueue[tuple[Any, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True, name="environments").start()
        super().__init__(LoadedCode((agent or env or tools[0]).partition(":")[0]))

    def described(self) -> dict[str, Any] | str:
        """As `objects.described`, or a text about what is wrong."""
        if self._kind is None:
            problem = self._loaded()
            if problem:
                return f"it cannot be imported ({problem})"
            try:
                self._send(self._asked)
                kind, value = self._receive(IMPORT_S)
            except (Late, Gone) as gone:
                return str(gone) or "no answer of its module"
            if kind == "failed":
                return str(value)
            self._kind = value
        return self._kind

    # --- What is asked ----------------------------------------------------------------------------

    def reset(self, number: int, row: dict[str, Any], seed: int, *more: Any) -> None:
        """Make the environment of a new sample. `more`: of an agent, as is the next: `StageSampling`."""
        self._live[number] = _Live()
        self._ask_it(number, ("reset", number, row, seed, *more))

    def step(self, number: int, messages: Sequence[dict[str, Any]], *more: Any) -> None:
        """Answer a conversation that ends with a turn of the policy. `more`: `DrawnTurn`."""
        self._ask_it(number, ("step", number, list(messages), *more))

    def end(self, number: int) -> None:
        """Ask for the reward of a whole conversation; the sample is forgotten with its answer."""
        self._ask_it(number, ("end", number))

    def drop(self, number: int) -> None:
        """Forget a sample."""
        self._waiting.pop(number, None)
        if self._live.pop(number, None) is not None:
            self._send(("drop", number))

    @property
    def busy(self) -> bool:
        """Something was asked and not answered."""
        return bool(self._sent or self._waiting or self._replies)

    def replies(self, seconds: float) -> list[EnvironmentReply]:
        """Answers that are there; waits up to so many seconds for the first."""
        deadline = time.monotonic() + seconds
        while not self._replies and (self._sent or self._waiting):
            self._send_waiting()
            left = deadline - time.monotonic()
            try:
                self._take(self._next(max(0.0, min(left, self._patience()))))
            except Late:
                self._look_for_late()
            except Gone as gone:
                self._lost(f"{gone}, in a step of an environment")
            if left <= 0:
                break
        with suppress(Late, Gone):
            while self._sent:
                self._take(self._next(0.0))
        found, self._replies = self._replies, []
        return found

    def forget_all(self) -> None:
        """Forget all samples, those in the middle of a step too: their conversation was given up."""
        if self._sent:
            self._renew()
            self._kind = None
        else:
            for number in list(self._live):
                self.drop(number)
        self._live, self._begun, self._sent, self._waiting, self._replies = {}, {}, {}, {}, []
        self._careful = False

    # --- Inside -----------------------------------------------------------------------------------

    def _ask_it(self, number: int, request: tuple[Any, ...]) -> None:
        self._live[number].requests.append(request)
        self._waiting[number] = None
        self._send_waiting()

    def _send_waiting(self) -> None:
        for number in list(self._waiting):
            if self._careful and self._sent:
                return
            del self._waiting[number]
            self._sent[number] = None
            live = self._live[number]
            self._send(live.requests[live.replayed])

    def _take(self, message: tuple[Any, ...]) -> None:
        kind, number, *rest = message
        if kind == "begun":
            self._begun[number] = time.monotonic()
            return
        self._begun.pop(number, None)
        self._sent.pop(number, None)
        live = self._live.get(number)
        if live is None:
            return
        if kind == "failed":
            self._fail(number, rest[0])
            return
        if live.replayed < len(live.values):
            if live.values[live.replayed] != rest[0]:
                self._fail(number, NOT_REPLAYED)
                return
        else:
            live.values.append(rest[0])
        live.replayed += 1
        if live.replayed < len(live.requests):
            self._waiting[number] = None
            self._send_waiting()
            return
        if live.requests[-1][0] == "end":
            del self._live[number]
        self._replies.append(EnvironmentReply(number, rest[0]))

    def _fail(self, number: int, problem: str) -> None:
        self._replies.append(EnvironmentReply(number, None, problem))
        self.drop(number)

    def _send(self, message: tuple[Any, ...]) -> None:
        """In order, and in a thread: a process that doesn't read holds nobody up."""
        self._outbox.put((self._connection, pickle.dumps(message, pickle.HIGHEST_PROTOCOL)))

    def _write(self) -> None:
        while True:
            send_bytes(*self._outbox.get())

    def _next(self, seconds: float) -> tuple[Any, ...]:
        """The next message. Raises Late where none came, Gone where none will."""
        deadline = time.monotonic() + seconds
        try:
            while True:
                left = deadline - time.monotonic()
                if self._connection.poll(max(0.0, min(left, LOOK_S))):
                    _, message = pickle.loads(self._connection.recv_bytes())
                    return cast(tuple[Any, ...], message)
                if self._ended() and not self._connection.poll(0):
                    raise Gone(self._how_it_ended())
                if left <= 0:
                    raise Late
        except (EOFError, OSError):
            raise Gone(self._how_it_ended()) from None

    def _patience(self) -> float:
        """Seconds until the step that began last is late: if the process stands still, that one holds it."""
        since = max(self._begun.values(), default=time.monotonic())
        return since + self._timeout_s + GRACE_S - time.monotonic()

    def _look_for_late(self) -> None:
        if not self._begun or self._patience() > 0:
            return
        number = max(self._begun, key=lambda one: self._begun[one])
        suspects = len(self._begun)
        self._renew_environments()
        if suspects > 1 and self._agent:  # Any of their threads may be the one that holds it up.
            self._careful = True
            return
        self._fail(number, f"no answer within {self._timeout_s:g} s")

    def _lost(self, problem: str) -> None:
        """The process has ended. Of several steps that it was in nobody knows which one ended it: they are
        done again one at a time."""
        suspects = list(self._begun) or list(self._sent)
        self._renew_environments()
        if len(suspects) == 1:
            self._fail(suspects[0], problem)
        else:
            self._careful = True

    def _renew_environments(self) -> None:
        self._renew()
        self._kind = None
        self._waiting = dict.fromkeys([*self._sent, *self._waiting])
        self._sent, self._begun = {}, {}
        for live in self._live.values():
            live.replayed = 0
        found = self.described()
        if isinstance(found, str):
            raise RunFailure("environment", "generate", f"its process can't be started again: {found}")


class Environments:
    """Processes of one stage's environments: as many as conversations go on at once."""

    def __init__(self, env: str | None, tools: Sequence[str], timeout_s: float, agent: str | None) -> None:
        self._asked = env, tuple(tools), timeout_s, agent
        self._free: list[EnvironmentProcess] = []
        self._made = 0
        self._lock = threading.Lock()

    @contextmanager
    def process(self) -> Iterator[EnvironmentProcess]:
        """A process for one thread, with no sample in it.

        Raises:
            RunFailure: it can't be started.
        """
        with self._lock:
            if self._free:
                process = self._free.pop()
            else:
                process = kept_environment(*self._asked, number=self._made)
                self._made += 1
        found = process.described()
        if isinstance(found, str):
            raise RunFailure("environment", "generate", f"its process can't be started: {found}")
        try:
            yield process
        finally:
            process.forget_all()
            with self._lock:
                self._free.append(process)


def kept_environment(
    env: str | None, tools: Sequence[str], timeout_s: float, agent: str | None = None, number: int = 0
) -> EnvironmentProcess:
    """A process of these environments, which is kept to the end of the run."""
    user_function(agent or env or tools[0])  # Puts the working directory on the path.
    key = "environments", env, tuple(tools), timeout_s, agent, number
    return kept(key, lambda: EnvironmentProcess(env, tools, timeout_s, agent))
