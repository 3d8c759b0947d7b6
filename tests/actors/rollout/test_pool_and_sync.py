"""Pool and weight sync on the same engines, from several threads, while processes die at random moments.

The pool, the sync and the set of engines are the product's; trainer and engines are threads (`fake_groups`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from actors.batches.generations import SamplingSpec
from actors.errors import RunFailure
from actors.rollout.pool import RolloutPool
from actors.sync.engine_set import EngineSet
from actors.sync.engine_state import WeightsState
from actors.sync.spec import SyncSpec
from actors.sync.weight_sync import WeightSync
from tests.actors.sync.fake_groups import PATIENCE_S, FakeEngines, FakeTrainer, look_often, pauses

ENGINES, PUSHES, DEATHS, DOOMED = 3, 6, 3, 2
"""Of the deaths these come at any time; the doomed die while they stage a version."""
FAN_OUTS = (4, 2)
"""With the second one engine passes versions on to the others."""
PROMPTS = [[i, 7] for i in range(40)]
SEEDS = list(range(100, 140))
EXPECTED = [[seed % 97, sum(prompt)] for prompt, seed in zip(PROMPTS, SEEDS)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are looked at every few milliseconds, and without Ray."""
    look_often(monkeypatch)


class World:
    """A trainer, engines that die, and what the product makes of them."""

    def __init__(self, seed: int, in_flight: str, fan_out: int = 4) -> None:
        self.generator, self.keeps = random.Random(seed), in_flight == "keep"
        self.doomed = 0
        self.group = FakeEngines(ENGINES, pauses(seed), self.dies_staging)
        self.engines = EngineSet(self.group)  # type: ignore[arg-type]
        spec = SyncSpec(in_flight=in_flight, fan_out=fan_out)  # type: ignore[arg-type]
        trainer = FakeTrainer(self.group)
        self.sync = WeightSync(
            trainer, self.engines, spec, "base", "policy", [[1, 2, 3]]  # type: ignore[arg-type]
        )  # fmt: skip
        self.pool = RolloutPool(self.engines, in_flight=self.keeps)
        self.wrong: list[str] = []
        self.over = False
        """A push failed before its version was taken: the trainer can't send the one before again, and a run
        ends here."""

    def generate(self) -> None:
        made = self.pool.generate(PROMPTS, SamplingSpec(), SEEDS)
        if [ids.tolist() for ids in made.sequences()] != EXPECTED:
            self.wrong.append("samples are lost, or not their own")

    def push(self) -> None:
        version = self.sync.version + 1
        try:
            self.sync.push(version)
        finally:
            self.over = self.sync.version < version

    def end(self, work: Callable[[], None]) -> None:
        """Run something that a death may end, though only with a name."""
        try:
            work()
        except RunFailure as failure:
            if "died" not in failure.reason and "replaced" not in failure.reason:
                self.wrong.append(str(failure))
        except BaseException as error:
            self.wrong.append(repr(error))

    def dies_staging(self) -> bool:
        dies = self.doomed > 0 and self.generator.random() < 0.15
        self.doomed -= dies
        return dies

    def watch(self) -> None:
        """Note an engine that serves what was not verified in its own process."""
        for rank in self.engines:
            engine = self.engines[rank]
            served = (rank, engine.process, engine.version)
            if engine.state is WeightsState.SERVING and served not in self.group.log.verified:
                self.wrong.append(f"engine, process, version {served} is served, and was not verified")

    def kill(self) -> None:
        self.group.kill(self.generator.randrange(ENGINES))

    @contextmanager
    def deaths(self, number: int) -> Iterator[None]:
        """So many processes die at random moments meanwhile; all the while someone watches."""
        stop = threading.Event()
        self.doomed = DOOMED

        def work() -> None:
            left, next_at = number, time.monotonic()
            while not stop.is_set():
                self.watch()
                time.sleep(0.0005)
                if left and time.monotonic() > next_at:
                    self.kill()
                    left, next_at = left - 1, time.monotonic() + self.generator.uniform(0.005, 0.06)

        thread = threading.Thread(target=work)
        thread.start()
        yield
        stop.set()
        thread.join(PATIENCE_S)

    def check_recovered(self) -> None:
        """Without more deaths everything serves again, and all that happened was allowed."""
        for rank in self.engines:
            with pytest.raises(RunFailure) if not self.group.processes[rank].alive else _nothing():
                self.group.submit_rank(rank, "readback", 0, phase="sync").result()
        self.doomed = 0
        if self.over:
            self.wrong = [one for one in self.wrong if "acknowledged version" not in one]
        last = self.sync.version + 1
        self.sync.push(last)
        self.generate()
        assert [self.engines[rank].state for rank in self.engines] == [WeightsState.SERVING] * ENGINES
        assert [self.engines[rank].version for rank in self.engines] == [last] * ENGINES
        self.watch()
        assert self.wrong == []
        for rank, member in enumerate(self.group.fleet.members):
            assert member.generation == self.group.killed[rank], "one replacement of a process a death"
        check_protocol(self.group.log.lines)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def check_protocol(lines: list[tuple[str, int, int, int]]) -> None:
    """Nobody committed what it had not staged, nor a version that another one failed to stage meanwhile."""
    staged: dict[tuple[int, int], tuple[int, int]] = {}
    """(version, line) of what each process has staged."""
    failed: dict[int, int] = {}
    """The last line in which a version was not staged."""
    for line, (what, version, *process) in enumerate(lines):
        key = (process[0], process[1])
        assert what in ("staged", "not staged", "discarded", "committed"), what
        if what == "staged":
            staged[key] = version, line
        elif what == "discarded":
            staged.pop(key, None)
        elif what == "not staged":
            failed[version] = line
        else:
            of, since = staged.pop(key)
            assert of == version
            assert failed.get(version, -1) < since, "others failed to stage it after this one had"


def run(work: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("seed", range(20))
def test_engines_die_while_samples_are_in_flight_over_syncs(seed: int) -> None:
    world = World(seed, "keep", FAN_OUTS[seed % 2])
    world.sync.connect()
    world.sync.push(0)
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            world.end(world.generate)

    def push() -> None:
        for _ in range(PUSHES):
            world.end(world.push)
            time.sleep(0.01)
            if world.over:
                break
        stop.set()

    with world.deaths(DEATHS):
        threads = [run(generate, "one"), run(generate, "two"), run(push, "push")]
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), f"{thread.name} waits for ever"
    world.check_recovered()
    world.group.close()


@pytest.mark.parametrize("seed", range(20))
def test_engines_die_while_they_generate_and_while_they_are_synced(seed: int) -> None:
    world = World(seed, "wait", FAN_OUTS[seed % 2])
    world.sync.connect()

    def work() -> None:
        for _ in range(PUSHES):
            world.end(world.push)
            if not world.over:
                world.end(world.generate)

    with world.deaths(DEATHS):
        thread = run(work, "loop")
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the loop waits for ever"
    world.check_recovered()
    world.group.close()


def test_a_call_that_begins_while_the_only_engines_are_brought_back_waits_for_them() -> None:
    world = World(0, "keep")
    world.sync.connect()
    world.sync.push(0)
    for rank in world.engines:
        world.group.kill(rank)
    with pytest.raises(RunFailure, match="died"):
        world.group.submit_rank(0, "readback", 0, phase="sync").result()
    with world.engines.turn:  # Engines are made, and wait for their weights.
        threads = [run(lambda: world.end(world.generate), "first")]
        while world.engines[0].state is not WeightsState.STARTING:
            time.sleep(0.001)
        threads.append(run(lambda: world.end(world.generate), "second"))
        time.sleep(0.05)
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{thread.name} waits for ever"
    assert world.wrong == []
    assert [member.generation for member in world.group.fleet.members] == [1] * ENGINES
    world.group.close()


def test_a_pool_whose_engines_serve_nothing_says_so() -> None:
    world = World(0, "wait")
    with pytest.raises(RunFailure, match="no engine serves: rollout-0 is starting"):
        world.pool.generate(PROMPTS, SamplingSpec(), SEEDS)
    world.group.close()
