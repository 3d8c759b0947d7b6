"""Engines that share a call: the same samples however many there are, and when one is killed."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batches import Request
from actors.batches.generations import Generations, SamplingSpec, sample_seed
from actors.cluster import measured_limits
from actors.cluster.measured_limits import MeasuredLimits
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, RunFailure
from actors.rollout.pool import RolloutPool
from actors.rollout.remote import ROLLOUT, rollout_group
from actors.rollout.shares import Shares
from actors.rollout.spec import EngineSpec
from actors.sync.engine_set import EngineSet

SAMPLING = SamplingSpec(temperature=1, n=2)
PROMPTS = [[i, i + 1] for i in range(48)]
SEEDS = [sample_seed(0, 7, p, s) for p in range(48) for s in range(2)]
DIED = "its process died (killed, crashed, or out of memory)"


# --- Faults, with engines that have them on purpose -----------------------------------------------

Start = Callable[..., RolloutPool]


@pytest.fixture
def start(ray_cluster: None, tmp_path: Path) -> Iterator[Start]:
    """Starts pools of fake engines at version 3, to which `replace` brings them unless a test has its own."""
    groups = []

    def starting(
        workers: int = 2,
        seconds: float = 0.0,
        generate: float | None = 60,
        replace: Any = None,
        in_flight: bool = False,
    ) -> RolloutPool:
        own = {} if generate is None else {"generate": generate}
        limits = LimitsSpec(start=60, stop=1, **own)
        group = WorkerGroup("rollout", RoleSpec(workers=workers), limits, tmp_path / "logs")
        groups.append(group)
        group.start().ready().build(
            "tests.actors.rollout.pool_engines:FakeEngine", str(tmp_path), seconds
        ).result()
        group.call("load", 3)
        replace = replace or (lambda rank: group.call_rank(rank, "load", 3))
        return RolloutPool(EngineSet(group, replace), in_flight=in_flight)

    yield starting
    for group in groups:
        group.shutdown()


def rows(made: Generations) -> list[list[int]]:
    return [ids.tolist() for ids in made.sequences()]


def restarts(pool: RolloutPool) -> list[tuple[int, str]]:
    """Engines that were lost, and why."""
    return [(one.rank, one.reason) for one in pool.group.supervision.history]


def expected(prompts: list[list[int]]) -> list[list[int]]:
    return [[seed % 97, sum(prompts[i // 2]), 3] for i, seed in enumerate(SEEDS)]


def calls(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


@pytest.mark.ray
def test_the_fast_engine_takes_what_the_slow_one_does_not_get_to(start: Start, tmp_path: Path) -> None:
    pool = start(seconds=0.004)
    made = pool.generate(PROMPTS, SAMPLING, SEEDS)
    assert rows(made) == expected(PROMPTS)
    assert (made.n, made.version, made.label) == (2, 3, "fake")
    drawn, returned = Counter[int](), Counter[int]()
    for call in calls(tmp_path):
        drawn[call["pid"]] += call["samples"]
        returned[call["pid"]] += call["returned"]
    (fast, many), (slow, few) = drawn.most_common()
    assert many + few == 96
    # Each was dealt one half, and this one has a tenth of the other's speed (less of it on a busy machine).
    assert few < 40
    assert returned[slow] == 48 - few
    assert returned[fast] == 0


@pytest.mark.ray
def test_calls_side_by_side_share_the_engines_and_the_replacement_of_a_lost_one(start: Start) -> None:
    """None of the samples is lost or made by two; engines may be at different versions."""
    pool = start(seconds=0.004, in_flight=True)
    pool.group.call_rank(0, "load", 4)
    prompts = [[1002 if i == 20 else i, i + 1] for i in range(48)]
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(pool.generate, asked, SAMPLING, SEEDS) for asked in (prompts, PROMPTS)]
        made = [one.result() for one in both]
    assert [rows(one) for one in made] == [expected(prompts), expected(PROMPTS)]
    assert {int(v) for one in made for v in one.token_versions} <= {3, 4}
    assert len(restarts(pool)) == 1


@pytest.mark.ray
def test_while_an_engine_is_replaced_the_other_goes_on(start: Start, tmp_path: Path) -> None:
    served_again: list[float] = []

    def replace(rank: int) -> None:
        time.sleep(2)
        pool.group.call_rank(rank, "load", 3)
        served_again.append(time.time())

    pool = start(seconds=0.004, replace=replace)
    prompts = [[1002, 5], *PROMPTS[1:]]
    assert rows(pool.generate(prompts, SAMPLING, SEEDS)) == expected(prompts)
    assert restarts(pool) == [(0, DIED)]
    died, (ended,) = (tmp_path / "die").stat().st_mtime, served_again
    assert any(died < call["start"] and call["end"] < ended for call in calls(tmp_path))
    assert time.time() > ended
    assert pool.group.call("load", 4) == [None, None]


@pytest.mark.ray
def test_an_engine_that_hangs_is_replaced_after_its_deadline(start: Start) -> None:
    pool = start(workers=1, generate=2)
    prompts = [[1001], *PROMPTS[1:]]
    assert rows(pool.generate(prompts, SAMPLING, SEEDS)) == expected(prompts)
    assert restarts(pool) == [(0, "no answer within 2 s (limits.generate)")]


@pytest.mark.ray
def test_a_stopped_engine_is_replaced_in_what_the_first_calls_make_of_its_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_limits, "FLOOR_S", 2.0)
    pool = start(workers=1, generate=None)
    pool.group.measured = MeasuredLimits(pool.group.limits)
    for _ in range(3):
        pool.generate(PROMPTS, SAMPLING, SEEDS)
    os.kill(pool.group.pids()[0], signal.SIGSTOP)
    began = time.monotonic()
    assert rows(pool.generate(PROMPTS, SAMPLING, SEEDS)) == expected(PROMPTS)
    late = "no answer within 2 s (limits.generate)"
    assert restarts(pool) == [(0, f"{late}: its process is stopped (SIGSTOP)")]
    assert time.monotonic() - began < 30


@pytest.mark.ray
def test_a_deadline_is_of_all_that_an_engine_was_given_and_not_of_a_slice(start: Start) -> None:
    said: list[str] = []
    pool = start(workers=1, generate=None, in_flight=True, seconds=0.005)
    pool.group.measured = MeasuredLimits(pool.group.limits, said.append)
    for _ in range(3):
        pool.generate(PROMPTS[:6], SAMPLING, SEEDS[:12])
    (line,) = said
    longest = re.search(r"longest of 3 calls \((.*) s\)", line)
    # Twelve samples of 0.05 s, in slices of 0.1.
    assert longest is not None
    assert float(longest[1]) >= 0.6


@pytest.mark.ray
def test_an_engine_that_died_between_two_calls_is_replaced(start: Start) -> None:
    pool = start()
    os.kill(pool.group.pids()[1], signal.SIGKILL)
    assert rows(pool.generate(PROMPTS, SAMPLING, SEEDS)) == expected(PROMPTS)
    assert restarts(pool) == [(1, DIED)]


@pytest.mark.ray
def test_an_engine_that_was_seen_dead_by_another_call_is_replaced_first(start: Start) -> None:
    pool = start(workers=1)
    with pytest.raises(RunFailure):
        pool.group.call("die")
    assert rows(pool.generate(PROMPTS, SAMPLING, SEEDS)) == expected(PROMPTS)
    assert restarts(pool) == [(0, DIED)]


@pytest.mark.ray
def test_an_engine_that_dies_while_it_is_replaced_is_replaced_again(start: Start, tmp_path: Path) -> None:
    def replace(rank: int) -> None:
        first = not (tmp_path / "again").exists()
        (tmp_path / "again").touch()
        pool.group.call_rank(rank, "die" if first else "load", *([] if first else [3]))

    pool = start(workers=1, replace=replace)
    prompts = [[1002, 5], *PROMPTS[1:]]
    assert rows(pool.generate(prompts, SAMPLING, SEEDS)) == expected(prompts)
    assert restarts(pool) == [(0, DIED)] * 2


@pytest.mark.ray
def test_a_prompt_that_kills_every_engine_ends_the_call_with_a_name(start: Start) -> None:
    pool = start(workers=1)
    with pytest.raises(RunFailure) as caught:
        pool.generate([[1003], *PROMPTS[1:]], SAMPLING, SEEDS)
    assert (caught.value.who, caught.value.phase) == ("rollout-0", "generate")
    assert caught.value.reason == f"{DIED}, once more after 2 restarts in one call"
    assert "rollout-0.log" in caught.value.next_step


@pytest.mark.ray
def test_an_engine_that_fails_and_lives_is_not_restarted(start: Start) -> None:
    pool = start(workers=1)
    with pytest.raises(RunFailure, match="rollout-0 failed in phase 'generate': ValueError: a kernel failed"):
        pool.generate([[1004], *PROMPTS[1:]], SAMPLING, SEEDS)
    assert restarts(pool) == []


@pytest.mark.ray
def test_a_replacement_that_goes_wrong_by_itself_ends_the_call(start: Start) -> None:
    def replace(rank: int) -> None:
        raise InvariantViolation("rollout-0", "sync", "digest differs")

    pool = start(workers=1, replace=replace)
    with pytest.raises(InvariantViolation, match="digest differs"):
        pool.generate([[1002], *PROMPTS[1:]], SAMPLING, SEEDS)


@pytest.mark.ray
def test_engines_that_serve_different_versions_are_refused(start: Start) -> None:
    pool = start()
    pool.group.call_rank(1, "load", 4)
    with pytest.raises(InvariantViolation, match=r"not of \[\('fake', 3\), \('fake', 4\)\]"):
        pool.generate(PROMPTS, SAMPLING, SEEDS)


# --- Real engines ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(
    ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerGroup]:
    """Three vLLM engines with the same model."""
    log_dir = tmp_path_factory.mktemp("pool") / "logs"
    group = rollout_group(RoleSpec(workers=3), LimitsSpec(stop=5), log_dir)
    spec = EngineSpec(max_num_seqs=64, max_model_len=256, kv_cache_gib=0.1)
    group.start().ready().build(ROLLOUT, spec).result()
    group.call("load", str(tiny_base), phase="load")
    yield group
    group.shutdown()


@pytest.mark.ray
@pytest.mark.vllm
def test_three_engines_one_killed_while_generating_draw_what_one_engine_draws(
    engines: WorkerGroup, tiny_base: Path
) -> None:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 250, size=size).tolist() for size in generator.integers(3, 40, 36)]
    sampling = SamplingSpec(temperature=1, max_tokens=150, n=4)
    seeds = [sample_seed(0, 1, p, s) for p in range(36) for s in range(4)]
    alone = engines.call_rank(0, "generate", prompts, sampling, seeds, phase="generate")
    load = functools.partial(engines.call_rank, method="load", base=str(tiny_base), phase="load")
    pool = RolloutPool(EngineSet(engines, load))
    shared = pool.generate(prompts, sampling, seeds)
    assert restarts(pool) == []
    assert rows(shared) == rows(alone)
    np.testing.assert_array_equal(shared.finish, alone.finish)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-5)

    backwards = pool.generate(prompts[::-1], sampling, np.reshape(seeds, (36, 4))[::-1].ravel().tolist())
    in_order = np.arange(144).reshape(36, 4)[::-1].ravel()
    assert [rows(backwards)[i] for i in in_order] == rows(alone)

    threading.Timer(0.4, os.kill, (engines.pids()[1], signal.SIGKILL)).start()
    assert rows(pool.generate(prompts, sampling, seeds)) == rows(alone)
    assert restarts(pool) == [(1, DIED)]
    assert rows(pool.generate(prompts[:12], sampling, seeds[:48])) == rows(alone)[:48]


@pytest.mark.ray
@pytest.mark.vllm
def test_samples_that_engines_begin_for_each_other_are_those_of_one_engine(
    engines: WorkerGroup, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine has all of them before the others come: what waits there moves, and what was begun."""
    prompts, sampling = [[5 + i, 7, 9] for i in range(24)], SamplingSpec(temperature=1, max_tokens=200, n=4)
    seeds = [sample_seed(0, 2, p, s) for p in range(24) for s in range(4)]
    began = time.monotonic()
    alone = engines.call_rank(0, "generate", prompts, sampling, seeds, phase="generate")
    late_s = (time.monotonic() - began) / 4
    moved: list[int] = []
    """Tokens that each of the samples that changed hands had."""

    def ask_back(shares: Shares, donor: int, *args: Any, **kwargs: Any) -> list[int]:
        held = dict(shares.shares[donor].held)
        found = own_ask_back(shares, donor, *args, **kwargs)
        moved.extend(held[number] for number in found)
        return found

    own_ask_back = Shares.ask_back
    monkeypatch.setattr(Shares, "ask_back", ask_back)
    for in_flight in (False, True):
        load = functools.partial(engines.call_rank, method="load", base=str(tiny_base))
        pool = RolloutPool(LateEngines(engines, load, late_s), in_flight=in_flight)
        assert rows(pool.generate(prompts, sampling, seeds)) == rows(alone)
        assert moved
        assert in_flight <= (not any(moved))
        moved.clear()


class LateEngines(EngineSet):
    """All but the first serve so many seconds later."""

    def __init__(self, group: WorkerGroup, load: Callable[..., Any], late_s: float) -> None:
        super().__init__(group, load)
        self.since = time.monotonic() + late_s

    def ready(self, rank: int, *, unproved: bool = False) -> bool:
        return (rank == 0 or time.monotonic() > self.since) and super().ready(rank, unproved=unproved)


class ThreeTurns:
    """Conversations of three turns: each goes on from what was drawn before it."""

    parsing = None

    def __init__(self, prompts: list[list[int]], seeds: list[int]) -> None:
        self.seeds, self.drawn = seeds, [[list(prompt)] for prompt in prompts]
        self.sample_of: list[int] = []
        self.ready: list[tuple[int, int | None]] = [(sample, None) for sample in range(len(prompts))]
        self.open = len(prompts)

    def waits(self) -> bool:
        return self.open > 0

    def requests(self, seconds: float) -> list[Request]:
        found = [
            Request(
                [token for turn in self.drawn[sample] for token in turn],
                self.seeds[sample] + len(self.drawn[sample]),
                8,
                sample,
                after,
            )
            for sample, after in self.ready
        ]
        self.sample_of += [sample for sample, _ in self.ready]
        self.ready = []
        return found

    def drew(self, numbers: list[int], made: Generations, said: None) -> None:
        for number, ids in zip(numbers, made.sequences(), strict=True):
            sample = self.sample_of[number]
            self.drawn[sample].append(ids.tolist())
            if len(self.drawn[sample]) == 4:
                self.open -= 1
            else:
                self.ready.append((sample, number))


@pytest.mark.ray
def test_conversations_are_the_same_by_one_engine_or_two_of_which_one_dies_between_their_turns(
    start: Start,
) -> None:
    prompts = [[1002 if i == 7 else i, i + 1] for i in range(16)]
    pool = start(seconds=0.002)
    talks = ThreeTurns(prompts, SEEDS[:16])
    assert pool.converse(talks, SAMPLING) > 0
    assert len(restarts(pool)) == 1
    for sample, (prompt, *turns) in enumerate(talks.drawn):
        context = list(prompt)
        for turn, ids in enumerate(turns, 1):
            assert ids == [(SEEDS[sample] + turn) % 97, sum(context), 3]
            context += ids
