"""Pushes and samples of a policy and engines that have one device in turns, while engines die: whoever
computes is awake, and the other side is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from actors.batches.generations import SamplingSpec
from actors.cluster.turn_plan import EngineBytes, TrainerBytes
from actors.cluster.turns import OneDevice
from actors.rollout.pool import RolloutPool
from actors.sync.engine_set import EngineSet
from actors.sync.spec import SyncSpec, backends_for
from actors.sync.weight_sync import WeightSync
from tests.actors.sync.fake_groups import FakeEngines, FakeTrainer, Process, look_often, pauses

ENGINES, STEPS = 2, 4
PROMPTS, SEEDS = [[1, 2], [3, 4], [5, 6]], [7, 8, 9]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are looked at every few milliseconds, and without Ray."""
    look_often(monkeypatch)


class Device:
    """Who is awake, by what the processes themselves did."""

    def __init__(self) -> None:
        self.policy = False
        self.engines: set[Process] = set()
        self.wrong: list[str] = []

    def computes(self, who: str, what: str) -> None:
        """Note work that was done out of turn."""
        alive = [process for process in self.engines if process.alive]
        if self.policy and alive:
            self.wrong.append(f"both awake while {who} did {what}")
        if (who == "policy") != self.policy:
            self.wrong.append(f"{who} did {what} out of turn")


class SleepyProcess(Process):
    """An engine's process whose memory is on the device from when it loads until it sleeps."""

    group: SleepyEngines

    def load(self, *args: Any) -> dict[str, float]:
        self.group.device.engines.add(self)
        return self._work("load", *args)

    def sleep(self) -> bool:
        self.group.device.engines.discard(self)
        return False

    def wake_up(self) -> bool:
        self.group.device.engines.add(self)
        return True

    def stage(self, *args: Any) -> Any:
        return self._work("stage", *args)

    def commit(self, *args: Any) -> Any:
        return self._work("commit", *args)

    def score_tokens(self, *args: Any) -> Any:
        return self._work("score_tokens", *args)

    def advance(self, *args: Any) -> Any:
        return self._work("advance", *args)

    def _work(self, method: str, *args: Any) -> Any:
        self.group.device.computes("engine", method)
        return getattr(super(), method)(*args)


class SleepyEngines(FakeEngines):
    """Engines on a `Device`."""

    def __init__(self, device: Device, seed: int, dying: random.Random) -> None:
        self.device = device
        super().__init__(ENGINES, pauses(seed), lambda: dying.random() < 0.1)

    def process(self, rank: int, generation: int) -> Process:
        return SleepyProcess(rank, generation, self)


class SleepyTrainer(FakeTrainer):
    """A trainer on a `Device`."""

    def __init__(self, engines: SleepyEngines) -> None:
        super().__init__(engines)
        self.device = engines.device
        self.device.policy = True

    def bytes(self) -> TrainerBytes:
        return TrainerBytes(1, 1, 0, 100, on_host=False)

    def park(self, moves: str) -> bool:
        self.device.policy = False
        return False

    def wake(self) -> bool:
        self.device.policy = True
        return True

    def prepare(self, version: int, *more: Any) -> Any:
        self.device.computes("policy", "prepare")
        assert more[3] is None, "parts would be merged inside of a commit"
        return super().prepare(version, *more)

    def token_logprobs(self, *args: Any) -> Any:
        self.device.computes("policy", "token_logprobs")
        return super().token_logprobs(*args)


@contextmanager
def turns_on(seed: int) -> Iterator[tuple[Device, SleepyEngines, WeightSync, RolloutPool, OneDevice]]:
    """A world in which engines die while they stage, and where a test kills them."""
    device = Device()
    group = SleepyEngines(device, seed, random.Random(seed))
    trainer, engines = SleepyTrainer(group), EngineSet(group)  # type: ignore[arg-type]
    plan = lambda rank: EngineBytes(1, 90)  # noqa: E731
    turns = OneDevice(lambda: trainer, lambda: group, "auto", plan, lambda line: None)  # type: ignore[arg-type,return-value]
    turns.policy_built()
    backends = backends_for(0, 0, one_device=True)
    sync = WeightSync(
        trainer, engines, SyncSpec(), "base", "policy", [[1, 2, 3]], backends, turns=turns  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        yield device, group, sync, RolloutPool(engines), turns
    finally:
        group.close()


@pytest.mark.parametrize("seed", range(6))
def test_whoever_computes_has_the_device_alone_whenever_engines_die(seed: int) -> None:
    dying = random.Random(seed)
    with turns_on(seed) as (device, group, sync, pool, turns):
        sync.connect()
        assert device.policy
        sync.push(0)
        for step in range(STEPS):
            turns.to_engines()
            if dying.random() < 0.5:
                group.kill(dying.randrange(ENGINES))
            assert len([*pool.generate(PROMPTS, SamplingSpec(), SEEDS).sequences()]) == len(PROMPTS)
            turns.to_policy()
            if dying.random() < 0.5:
                group.kill(dying.randrange(ENGINES))
            device.computes("policy", "update")
            sync.push(step + 1)
            assert not device.policy
            assert [sync.engines[rank].version for rank in sync.engines] == [step + 1] * ENGINES
        assert device.wrong == []
        assert sum(group.killed.values()) > 0


def test_a_schedule_that_is_not_kept_is_found_by_this_test() -> None:
    with turns_on(0) as (device, _, sync, pool, turns):
        sync.connect()
        sync.push(0)
        turns.to_policy()
        pool.generate(PROMPTS, SamplingSpec(), SEEDS)
        assert "engine did advance out of turn" in device.wrong
