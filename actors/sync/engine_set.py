"""The engines of a rollout group: which are alive, what each serves, and the replacement of lost ones.

Pool and sync ask this; it asks neither. The states and their transitions are in `engine_state`; here they
meet processes and threads.

Locks, in the order in which they are taken:

1. `turn`: of whoever brings weights to engines. A push holds it from first to last, the loading of a
   replaced engine while it loads. Its owner waits for engines and trainer, under deadlines, and never for a
   replacement that others make.
2. `_making`, one of each rank: of whoever makes an engine in its process. Its owner waits for the process,
   under deadlines, and for nothing else.
3. `_lock`: the states. Held to read or change them, to send a call and to restart a process; nobody waits for
   an answer under it.

Whoever waits for a replacement (`Replacement.done`, `bring_back`) holds none of them. A replacement always
ends: its parts have deadlines, and it ends with an error if the engine is lost once more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from actors.cluster.futures import WorkerFuture
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure
from actors.sync.engine_state import Engine, WeightsEvent, WeightsState
from actors.sync.protocol import NO_VERSION

T = TypeVar("T")

Load = Callable[[int, int], object]
"""load(rank, generation): give an engine that was just made the weights that it has to serve."""


@dataclass(frozen=True)
class Replacement:
    """A new engine on its way to the weights that it has to serve."""

    generation: int
    """Of the new engine."""
    done: Future[None]


class EngineSet:
    """The engines of a group, by rank. Safe under several threads."""

    def __init__(self, group: WorkerGroup, load: Callable[[int], object] | None = None) -> None:
        """`load(rank)`: load an engine that was just built, for engines that the caller has loaded himself.
        Without it they serve nobody before a `WeightSync` has brought them a version."""
        self.group = group
        self.turn = threading.RLock()
        self._lock = threading.Lock()
        self._synced = load is None
        self._load: Load | None = None if load is None else lambda rank, _: load(rank)
        state = WeightsState.STARTING if self._synced else WeightsState.FRESH
        self._making = [threading.Lock() for _ in group.fleet.members]
        self._engines = [Engine(state, process=member.generation) for member in group.fleet.members]
        self._replacements: dict[int, Replacement] = {}
        """The latest of each rank."""

    # --- Questions ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """The ranks."""
        return iter(range(len(self._engines)))

    def __len__(self) -> int:
        return len(self._engines)

    def __getitem__(self, rank: int) -> Engine:
        """An engine as it is now."""
        with self._lock:
            return self._now(rank)

    def ready(self, rank: int, *, unproved: bool = False) -> bool:
        """True if an engine can be given samples; `unproved`: also between a commit and its verification."""
        engine = self[rank]
        if not self._synced:
            return engine.state is WeightsState.FRESH
        if engine.state is WeightsState.COMMITTED:
            return unproved
        holds_version = engine.version != NO_VERSION
        return holds_version and engine.state in (WeightsState.SERVING, WeightsState.STAGED)

    def lost(self) -> list[int]:
        """Ranks whose engine has to be replaced."""
        return [rank for rank in self if self[rank].state is WeightsState.LOST]

    def is_alive(self, rank: int, generation: int) -> bool:
        """True if the engine of this generation is the present one and its process serves."""
        with self._lock:
            return self._engines[rank].generation == generation and self._process_serves(rank)

    def running(self, rank: int) -> Replacement | None:
        """The replacement of an engine that is under way."""
        with self._lock:
            replacement = self._replacements.get(rank)
        return None if replacement is None or replacement.done.done() else replacement

    # --- What happens to an engine --------------------------------------------------------------

    def load_with(self, load: Load) -> None:
        """Set the function that loads an engine that is replaced in the background."""
        self._load = load

    def saw(
        self, rank: int, generation: int, event: WeightsEvent, reason: str = "", version: int = NO_VERSION
    ) -> None:
        """Note an event; of an earlier generation it changes nothing.

        Raises:
            ValueError: it can't happen in this state.
        """
        with self._lock:
            self._engines[rank] = self._engines[rank].after(event, version, reason, generation)

    def submit(self, rank: int, generation: int, call: Callable[[int], WorkerFuture[T]]) -> WorkerFuture[T]:
        """`call(rank)`, which submits a call to an engine, unless another one has taken its place.

        Raises:
            RunFailure: it was replaced, or its process is gone.
        """
        with self._lock:
            self._refuse_stale(rank, generation)
            return call(rank)

    # --- Engines that come and go -----------------------------------------------------------------

    def add(self, ranks: Sequence[int]) -> dict[int, int]:
        """Take in engines of the group behind the last one, which hold the base and have not reached the
        trainer; their generations. Nobody generates meanwhile."""
        with self._lock:
            for rank in ranks:
                if rank != len(self._engines):
                    raise ValueError(f"engine {rank} would follow engine {len(self._engines) - 1}")
                process = self.group.fleet.members[rank].generation
                self._engines.append(Engine(WeightsState.STARTING, process=process))
                self._making.append(threading.Lock())
            return {rank: self._engines[rank].generation for rank in ranks}

    def remove_from(self, size: int) -> None:
        """Forget all engines but the first `size`. Nobody generates meanwhile."""
        with self._lock:
            for rank in range(size, len(self._engines)):
                self._replacements.pop(rank, None)
            del self._engines[size:], self._making[size:]

    # --- Replacement ----------------------------------------------------------------------------

    def replace(self, rank: int, generation: int, reason: str) -> Replacement:
        """Have an engine replaced in the background that was lost in this generation, unless that was begun:
        then the replacement that was."""
        replacement, begun = self._claim(rank, generation, reason)
        if begun:
            # A daemon: a run that ends for another reason doesn't wait for an engine that nobody needs.
            threading.Thread(
                target=self._make, args=(rank, replacement, self._load), daemon=True, name=f"replace-{rank}"
            ).start()
        return replacement

    def replace_here(self, rank: int, generation: int, reason: str, load: Load) -> None:
        """Replace an engine in this thread, which holds the turn, and `load` it; nothing if it was begun
        elsewhere.

        Raises: as `WorkerGroup.rebuild` and `load`.
        """
        replacement, begun = self._claim(rank, generation, reason)
        if begun:
            self._make(rank, replacement, load)
            replacement.done.result()

    def bring_back(self, rank: int) -> None:
        """Have a lost engine replaced, unless that was begun, and wait until it serves.

        Raises: what its loading raised.
        """
        engine = self[rank]
        if engine.state is WeightsState.LOST:
            self.replace(rank, engine.generation, engine.reason)
        with self._lock:
            replacement = self._replacements.get(rank)
        if replacement is not None:
            replacement.done.result()

    # --- Inside ---------------------------------------------------------------------------------

    def _now(self, rank: int) -> Engine:
        return self._engines[rank].in_process(self.group.fleet.members[rank])

    def _refuse_stale(self, rank: int, generation: int) -> None:
        if self._engines[rank].generation != generation:
            raise RunFailure(self.group.who(rank), "call", "it was replaced", self.group.next_of(rank))

    def _process_serves(self, rank: int) -> bool:
        member = self.group.fleet.members[rank]
        return self.group.fleet.serves(rank) and member.generation == self._engines[rank].process

    def _claim(self, rank: int, generation: int, reason: str) -> tuple[Replacement, bool]:
        """The replacement of an engine, and whether it is this caller's to carry out."""
        with self._lock:
            engine = self._engines[rank].after(WeightsEvent.FAILED, reason=reason, generation=generation)
            if engine.generation != generation:
                return self._replacements[rank], False
            # One that was late may have answered another call since: it serves, and may hang all the same.
            if not self.group.fleet.sound(rank):
                self.group.restart(rank, reason=reason)
            else:
                self.group.supervision.remade(self.group.name, rank, reason)
            process = self.group.fleet.members[rank].generation
            engine = replace(engine.after(WeightsEvent.RESTARTED), process=process)
            self._engines[rank] = engine
            self._replacements[rank] = Replacement(engine.generation, Future())
            return self._replacements[rank], True

    def _make(self, rank: int, replacement: Replacement, load: Load | None) -> None:
        """Make an engine in its process and load it."""
        generation = replacement.generation
        try:
            if load is None:
                raise ValueError(f"nothing says what {self.group.who(rank)} has to be loaded with")
            with self._making[rank]:
                # An engine that is lost while it is made has a successor, which must not be made over again.
                self._refuse_stale(rank, generation)
                self.group.rebuild(rank)
            load(rank, generation)
            if not self._synced:
                self.saw(rank, generation, WeightsEvent.LOADED)
        except BaseException as error:
            self.saw(rank, generation, WeightsEvent.FAILED, self._why(rank, error))
            replacement.done.set_exception(error)
        else:
            self.group.supervision.back(self.group.name, [rank])
            replacement.done.set_result(None)

    def _why(self, rank: int, error: BaseException) -> str:
        return self.group.fleet.members[rank].reason or str(error)
