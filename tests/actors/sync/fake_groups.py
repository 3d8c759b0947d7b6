"""Trainer and engines of the interleaving tests: threads in place of processes, which die at any moment.

An engine notes what it is asked for. What it does with weights it does strictly: it commits only what it has
staged, and generates only with what it holds.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Overdue
from typing import Any

import numpy as np
import pytest

from actors.batches.generations import Generations
from actors.batches.slices import Asked, Progress, Work
from actors.cluster.health import Members, ProcessEvent
from actors.cluster.patient_clock import patient
from actors.cluster.spec import LimitsSpec, Phase
from actors.cluster.supervision import Supervision
from actors.cluster.supervisor import RestartBounds
from actors.errors import LinkFailure, NoRoom, RunFailure
from actors.rollout import pool as pool_module
from actors.sync import asking, weight_sync
from actors.sync.protocol import CommitReport, EngineFacts, Expected, Offer, Prepared, Readback, StageAck

PATIENCE_S = 20.0
"""Longest wait for any answer: a test that needs it has found something that waits for ever."""
TRAINER = "trainer"
"""Its address."""


class Died(Exception):
    """The process of a call is gone."""


class Log:
    """All that engines did, in order: (what, version, rank, generation of the process)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int, int]] = []
        self.verified: set[tuple[int, int, int]] = set()
        """(rank, generation of the process, version) of what was read back and scored there."""
        self._lock = threading.Lock()

    def note(self, what: str, version: int, process: Process) -> None:
        with self._lock:
            self.lines.append((what, version, process.rank, process.generation))


class Process:
    """One process with one engine, which does one thing after the other."""

    def __init__(self, rank: int, generation: int, group: FakeEngines) -> None:
        self.rank, self.generation, self.group = rank, generation, group
        self.log, self.pause = group.log, group.pause
        self.alive = True
        self.built = False
        self.version = self.staged = -2
        self.read: set[int] = set()
        self.waiting: dict[int, dict[int, list[Any]]] = {}
        """Call -> number of a sample -> prompt, seed and tokens so far."""
        self.scored: set[int] = set()
        self.wire: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.sender: Process | None = None
        """The engine at the other end of its connection; None: the trainer."""
        self.cut = False
        """The other end has dropped the connection."""
        self.work = ThreadPoolExecutor(1)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        self.pause()
        self._live()
        found = getattr(self, method.replace("weights.", ""))(*args)
        self._live()
        return found

    def build(self) -> None:
        self.built, self.version, self.staged, self.waiting = True, -2, -2, {}

    def load(
        self, base: str, adapter: str | None, label: str, updatable: bool, slots: None
    ) -> dict[str, float]:
        if not self.built:
            raise ValueError("it was asked to load before it was built")
        self.version, self.wire = -1, queue.SimpleQueue()
        return {}

    def describe(self) -> EngineFacts:
        return EngineFacts("float32", "here")

    def listen(self, engines: list[int], timeout_s: float) -> dict[int, str]:
        return dict.fromkeys(engines, f"{self.rank} {self.generation}")

    def accept(self, engines: list[int], backend: str) -> dict[int, str]:
        return {}

    def connect(self, address: str, timeout_s: float) -> None:
        self.wire, self.sender, self.cut = queue.SimpleQueue(), None, False
        if address != TRAINER:
            rank, generation = map(int, address.split())
            self.sender = self.group.processes[rank]
            self.cut = self.sender.generation != generation

    def open_channel(self, backend: str) -> None:
        return None

    def stage(self, version: int, pass_on_to: list[int]) -> StageAck:
        below = [self.group.processes[rank] for rank in pass_on_to]
        try:
            self.staged = self._received()
            if self.group.dies_staging():
                self.group.kill(self.rank)
            self._live()
        except (Died, LinkFailure):
            self.log.note("not staged", version, self)
            for process in below:
                process.cut = process.sender is self
            raise
        for process in below:
            if process.sender is self:
                process.wire.put(self.staged)
        self.log.note("staged", version, self)
        return StageAck(**vars(offer(self.staged)))

    def discard(self, version: int) -> None:
        self.log.note("discarded", version, self)
        self.staged = -2

    def commit(self, version: int, keep: bool) -> CommitReport:
        self.log.note(
            "committed" if self.staged == version else "committed what was not staged", version, self
        )
        self.version, self.staged = version, -2
        return CommitReport(version, 1, 1, {})

    def readback(self, version: int, known: str = "") -> Readback:
        self.read.add(self.version)
        self._note_proof()
        return Readback.of(version, {"weight": str(self.version)}, known)

    def score_tokens(self, token_ids: list[list[int]], starts: list[int], version: None) -> list[np.ndarray]:
        self.scored.add(self.version)
        self._note_proof()
        return logps(self.version, token_ids, starts)

    def advance(
        self, key: int, seconds: float | None, asked: Asked | None = None, give_back: Sequence[int] = ()
    ) -> Progress:
        """A token of up to two each, of a few samples a slice."""
        if self.version < 0:
            self.log.note("generated with nothing", self.version, self)
        self.pause()
        waiting = self.waiting.setdefault(key, {})
        returned = [number for number in give_back if waiting.pop(number, None)]
        if asked is not None:
            waiting |= {n: [p, s, 0] for n, p, s in zip(asked.numbers, asked.prompts, asked.seeds)}
        ended, drawn = {}, len(waiting)
        for number in list(waiting)[:8]:
            waiting[number][2] += 1
            if waiting[number][2] == 2:
                prompt, seed, _ = waiting.pop(number)
                ended[number] = ([seed % 97, sum(prompt)], [-0.5] * 2, "stop")
        made = Generations.of(list(ended.values()), 1, "fake", 0.0, self.version) if ended else None
        so_far = {number: tokens for number, (_, _, tokens) in waiting.items()}
        return Progress(list(ended), made, so_far, returned, 0.0, Work(1, drawn, 0.2 * drawn))

    def _note_proof(self) -> None:
        """A version is verified once it was read back and scored, in any order."""
        if self.version in self.read & self.scored:
            self.log.verified.add((self.rank, self.generation, self.version))

    def _received(self) -> int:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            self._live()
            try:
                return self.wire.get(timeout=0.002)
            except queue.Empty:
                if self.cut or (self.sender is not None and not self.sender.alive):
                    raise LinkFailure("channel", "sync", "the other end is gone") from None
        raise ValueError("nothing was sent")

    def _live(self) -> None:
        if not self.alive:
            raise Died


class Answer:
    """A call that was submitted."""

    def __init__(self, group: FakeEngines, process: Process, phase: str, future: Future[Any]) -> None:
        self._group, self._process, self._phase, self._future = group, process, phase, future

    def done(self) -> bool:
        return self._future.done()

    def result(self, since: float | None = None) -> Any:
        rank, limit = self._process.rank, self._group.deadline_s
        left = PATIENCE_S if limit is None else max(0.0, (since or patient()) + limit - patient())
        try:
            return self._future.result(left)
        except Died:
            self._group.saw(self._process, ProcessEvent.DIED)
            raise RunFailure(self._group.who(rank), self._phase, "its process died") from None
        except Overdue:
            if limit is not None:
                self._group.saw(self._process, ProcessEvent.OVERDUE)
                raise RunFailure(self._group.who(rank), self._phase, "no answer") from None
            raise AssertionError(f"{self._phase} of engine {rank} never came back") from None


class FakeEngines:
    """A `WorkerGroup` of engines."""

    name, next_step, measured = "rollout", "again", None
    room = 5
    """Most processes that there can be."""
    deadline_s: float | None = None
    """Of every call; None: a call that never comes back is the test's failure."""

    def __init__(
        self, size: int, pause: Callable[[], None], dies_staging: Callable[[], bool] = lambda: False
    ) -> None:
        """`dies_staging`: asked by an engine that has received a version."""
        self.size, self.limits, self.log, self.pause = size, LimitsSpec(), Log(), pause
        self.fleet, self.dies_staging = Members.of(size), dies_staging
        self.processes = [self.process(rank, 0) for rank in range(size)]
        for process in self.processes:
            process.build()
        self.killed: Counter[int] = Counter()
        self.supervision = Supervision(RestartBounds(1000, 1.0))
        self.channels: dict[int, Process] = {}
        self._lock = threading.Lock()

    def process(self, rank: int, generation: int) -> Process:
        return Process(rank, generation, self)

    def kill(self, rank: int) -> None:
        process = self.processes[rank]
        if process.alive:
            process.alive = False
            self.killed[rank] += 1

    def saw(self, process: Process, event: ProcessEvent) -> None:
        with self._lock:
            self.fleet = self.fleet.after([process.rank], event, "its process died", process.generation)

    def submit_rank(self, rank: int, method: str, *args: Any, phase: str, **kwargs: Any) -> Answer:
        process = self.processes[rank]
        if rank not in self.fleet.serving:
            raise RunFailure(self.who(rank), phase, "its process died")
        return Answer(self, process, phase, process.work.submit(process.call, method, args))

    def restart(self, rank: int, reason: str = "") -> None:
        self.supervision.lost(self.name, self.size, {rank: reason})
        with self._lock:
            self.fleet = self.fleet.after([rank], ProcessEvent.RESTARTED)
            generation = self.fleet.members[rank].generation
            self.processes[rank] = self.process(rank, generation)

    def resize(self, size: int) -> list[int]:
        if size > self.room:
            raise NoRoom("the cluster", "start", "missing: 1 GPU")
        had = self.size
        for process in self.processes[size:]:
            process.alive = False
        self.processes = [
            *self.processes[:size], *(self.process(rank, 0) for rank in range(had, size))
        ]  # fmt: skip
        self.size, self.fleet = size, self.fleet.resized(size)
        return [*range(had, size)]

    def rebuild(self, rank: int) -> float:
        self.submit_rank(rank, "build", phase="load").result()
        return 0.0

    def limit(self, phase: Phase, method: str) -> float:
        return self.limits.of(phase)

    def lost(self, calls: Iterable[int], since: float, phase: Phase) -> dict[int, RunFailure]:
        """None stands still here."""
        return {}

    def look_after(self, ranks: Iterable[int]) -> None:
        """The dead are seen by those who call them."""
        list(ranks)

    def overrun(self, rank: int, phase: str, seconds: float) -> RunFailure:
        raise AssertionError(f"engine {rank} did not answer in {seconds:.0f} s")

    def who(self, rank: int) -> str:
        return f"rollout-{rank}"

    def next_of(self, rank: int) -> str:
        return self.next_step

    def close(self) -> None:
        for process in self.processes:
            process.alive = False
            process.work.shutdown(wait=False)


class Now:
    """A call of the trainer, which answers at once."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self._value


class FakeTrainer:
    """A `WorkerGroup` of one policy rank, whose version is the one that was prepared last."""

    lives = 0

    def __init__(self, engines: FakeEngines) -> None:
        self.engines, self.version = engines, -1

    def submit(self, method: str, *args: Any, phase: str) -> Now:
        return Now([getattr(self, method.rpartition(".")[2])(*args)])

    def submit_alike(self, method: str, *args: Any, phase: str) -> Now:
        return Now(self.submit(method, *args, phase=phase).result()[0])

    def submit_rank(self, rank: int, method: str, *args: Any, phase: str) -> Now:
        return Now(getattr(self, method.rpartition(".")[2])(*args))

    def listen(self, engines: list[int], timeout_s: float) -> dict[int, str]:
        for engine in engines:
            self.disconnect(engine)
        return dict.fromkeys(engines, TRAINER)

    def accept(self, engines: list[int], backend: str) -> dict[int, str]:
        self.engines.channels |= {engine: self.engines.processes[engine] for engine in engines}
        return {}

    def prepare(self, version: int, *_: Any) -> Prepared:
        self.version = version
        return Prepared(offer(version), {"gather": 0.0, "pack": 0.0}, Expected({"weight": str(version)}, 0.0))

    def send(self, ranks: list[int]) -> dict[int, str]:
        unreached = {}
        for rank in ranks:
            process = self.engines.channels.get(rank)
            if process is None or not process.alive:
                unreached[rank] = "it is not connected"
            else:
                process.wire.put(self.version)
        return unreached

    def disconnect(self, engine: int) -> None:
        self.engines.channels.pop(engine, None)

    def token_logprobs(self, batch: Any, role: str | None, temperature: float) -> np.ndarray:
        version = -1 if role is None else self.version
        return np.full(sum(batch.label_counts), value_of(version))


def first_done(calls: Mapping[int, Answer], limit_s: float) -> list[int]:
    """In place of `actors.cluster.futures.first_done`."""
    until = time.monotonic() + limit_s
    while calls and time.monotonic() < until and not any(call.done() for call in calls.values()):
        time.sleep(0.0005)
    return [rank for rank, call in calls.items() if call.done()]


def offer(version: int) -> Offer:
    return Offer(version, 1, 1, f"digest {version}", "manifest")


def value_of(version: int) -> float:
    """Log-probability of every token with these weights."""
    return -1.0 - 0.1 * version


def logps(version: int, token_ids: list[list[int]], starts: list[int]) -> list[np.ndarray]:
    return [np.full(len(ids) - start, value_of(version)) for ids, start in zip(token_ids, starts)]


def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are looked at every few milliseconds, and without Ray."""
    for module in (pool_module, asking):
        monkeypatch.setattr(module, "first_done", first_done)
    for module in (pool_module, weight_sync, asking):
        monkeypatch.setattr(module, "POLL_S", 0.01)


def pauses(seed: int) -> Callable[[], None]:
    """Random short waits, so that threads meet in ever other orders."""
    generator = random.Random(seed)
    return lambda: time.sleep(generator.choice((0.0, 0.0, 0.0005, 0.002)))
