"""Groups of real Ray actors: calls, errors with a name, deaths, overruns, and the end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batches.batch import Batch
from actors.cluster import hung, lookout, measured_limits
from actors.cluster.futures import AgreedFuture, GroupFuture
from actors.cluster.health import ProcessState
from actors.cluster.independent import bring_up
from actors.cluster.measured_limits import MeasuredLimits
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.supervision import Replaced
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, NoRoom, RunFailure, UserError

pytestmark = pytest.mark.ray

DUTY = "duties:Duty"
Start = Callable[..., WorkerGroup]


@pytest.fixture
def start(ray_cluster: None, tmp_path: Path) -> Iterator[Start]:
    """Starts groups that end with the test."""
    groups = []

    def starting(workers: int = 2, limits: LimitsSpec | None = None, cpus: float = 0.25) -> WorkerGroup:
        role = RoleSpec(workers=workers, cpus=cpus)
        group = WorkerGroup("policy", role, limits or LimitsSpec(start=60, stop=1), tmp_path / "logs")
        groups.append(group)
        return group.start()

    yield starting
    for group in groups:
        group.shutdown()


@pytest.fixture(scope="module")
def group(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    """Two ranks that live through the tests that do them no harm."""
    log_dir = tmp_path_factory.mktemp("group") / "logs"
    shared = WorkerGroup("policy", RoleSpec(workers=2), LimitsSpec(start=60, stop=1), log_dir)
    yield built(shared.start())
    shared.shutdown()


def built(group: WorkerGroup) -> WorkerGroup:
    group.ready().build(DUTY, distributed=True).result()
    return group


def gone(pid: int) -> bool:
    """True once no process of that id is running (a zombie isn't)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state in "ZX"


# --- Calls ----------------------------------------------------------------------------------------


def test_every_rank_answers_in_order_and_writes_to_its_own_log(group: WorkerGroup) -> None:
    assert group.call("greet", "Ada") == ["hello, Ada, from 0 of 2", "hello, Ada, from 1 of 2"]
    assert group.call_rank(1, "greet", "Bob") == "hello, Bob, from 1 of 2"
    assert "greeting Ada\n" in (group.log_dir / "policy-0.log").read_text()
    assert "greeting Bob\n" not in (group.log_dir / "policy-0.log").read_text()
    assert "greeting Bob\n" in (group.log_dir / "policy-1.log").read_text()


def test_every_rank_keeps_a_trace_of_what_it_was_asked(group: WorkerGroup) -> None:
    group.call("sleep", 0.05, phase="update")
    trace = [
        json.loads(line) for line in (group.log_dir / "trace" / "policy-1.jsonl").read_text().splitlines()
    ]
    assert (trace[0]["method"], trace[0]["phase"]) == ("build", "load")
    assert (trace[-1]["method"], trace[-1]["phase"]) == ("sleep", "update")
    assert 0.05 <= trace[-1]["end"] - trace[-1]["start"] < 5


def test_a_part_of_the_object_is_called_by_its_dotted_name(group: WorkerGroup) -> None:
    assert group.call_rank(0, "greeting.upper") == "HELLO"


def test_ranks_meet_over_gloo(group: WorkerGroup) -> None:
    assert group.call("gather") == [[0.0, 1.0], [0.0, 1.0]]


def test_batches_and_arrays_travel_whole(group: WorkerGroup) -> None:
    batch = Batch.from_sequences([[1, 2, 3], [4]], [[False, True, True], [False]])
    assert group.call("total", batch, twice=True) == [20, 20]
    np.testing.assert_array_equal(group.call_rank(0, "array", 5), np.arange(5))


def test_of_what_ranks_have_alike_one_copy_travels_and_a_rank_that_differs_is_named(
    group: WorkerGroup,
) -> None:
    from ray.experimental import get_object_locations

    def stored(call: GroupFuture[Any] | AgreedFuture[Any]) -> int:
        """Bytes of the answers in the object store."""
        found = get_object_locations(list(call._refs.values()))
        return sum(one.get("object_size") or 0 for one in found.values())

    every, first = group.submit("megabytes", 1), group.submit_alike("megabytes", 1, own=("seconds",))
    assert (first.result()["values"] == every.result()[1]["values"]).all()
    assert 2 * 2**20 < stored(every) < 2.1 * 2**20
    assert 2**20 < stored(first) < 1.1 * 2**20
    with pytest.raises(InvariantViolation, match=r"policy-1 .*another result of this call than policy-0's"):
        group.call_alike("megabytes", 1, differs=1, own=("seconds",))


def test_a_call_returns_at_once_and_is_waited_for_later(group: WorkerGroup) -> None:
    began = time.monotonic()
    pending = group.submit("sleep", 1.0)
    assert time.monotonic() - began < 0.5
    assert not pending.done()
    assert pending.result() == [1.0, 1.0]
    assert pending.done()


def test_a_rebuilt_object_replaces_the_old_one_in_the_same_process(group: WorkerGroup) -> None:
    pids = group.pids()
    group.build(DUTY, "good day", distributed=True).result()
    assert group.call_rank(0, "greet", "Ada") == "good day, Ada, from 0 of 2"
    assert group.pids() == pids
    built(group)


def test_actors_have_quiet_threads_and_no_telemetry(group: WorkerGroup) -> None:
    expected = {
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "0",
        "OMP_WAIT_POLICY": "passive",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert {name: group.call_rank(0, "environment", name) for name in expected} == expected


# --- Errors ---------------------------------------------------------------------------------------


def test_a_users_mistake_comes_back_as_one_with_every_problem(group: WorkerGroup) -> None:
    with pytest.raises(UserError) as caught:
        group.call("fail", "user", 1)
    assert caught.value.problems == ["first problem", "second problem"]


def test_a_broken_invariant_comes_back_with_its_type(group: WorkerGroup) -> None:
    with pytest.raises(InvariantViolation, match="the loss is NaN"):
        group.call("fail", "invariant", 1)


def test_any_other_error_names_rank_phase_last_line_and_log(group: WorkerGroup) -> None:
    with pytest.raises(RunFailure) as caught:
        group.call("fail", "other", 1, phase="update")
    assert (caught.value.who, caught.value.phase) == ("policy-1", "update")
    assert caught.value.reason == "KeyError: 'no such adapter'"
    log = group.log_dir / "policy-1.log"
    assert str(log) in caught.value.next_step
    assert "Traceback" in log.read_text()


def test_a_group_lives_on_after_an_error(group: WorkerGroup) -> None:
    with pytest.raises(UserError):
        group.call("fail", "user")
    assert len(group.call("greet", "Ada")) == 2


# --- Deaths and overruns --------------------------------------------------------------------------


def test_a_rank_killed_during_a_call_is_named_well_before_the_deadline(start: Start) -> None:
    group = built(start())
    pending = group.submit("sleep", 30.0, phase="update")
    time.sleep(0.5)
    os.kill(group_pid(group, 1), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RunFailure) as caught:
        pending.result()
    assert time.monotonic() - began < 10
    assert (caught.value.who, caught.value.phase) == ("policy-1", "update")
    assert "its process died" in caught.value.reason
    assert "run the same command again" in caught.value.next_step
    assert group.fleet.members[1].state is ProcessState.DEAD


def group_pid(group: WorkerGroup, rank: int) -> int:
    """Process id of a rank, from its log: a busy rank can't be asked."""
    first = (group.log_dir / f"policy-{rank}.log").read_text().splitlines()[0]
    return int(first.split(" pid ")[1].split()[0])


def test_the_dead_rank_is_named_not_the_one_whose_collective_lost_its_peer(start: Start) -> None:
    group = built(start())
    group.call("gather")
    with pytest.raises(RunFailure) as caught:
        group.call("gather", 1, phase="update")
    assert caught.value.who == "policy-1"
    assert "its process died" in caught.value.reason


def test_after_a_death_every_further_call_fails_at_once_with_the_reason(start: Start) -> None:
    group = built(start())
    with pytest.raises(RunFailure):
        group.call("die", 0)
    began = time.monotonic()
    with pytest.raises(RunFailure, match="policy-0 failed in phase 'save': its process died"):
        group.call("greet", "Ada", phase="save")
    assert time.monotonic() - began < 0.5


def test_an_overrun_names_the_late_rank_the_limit_and_leaves_its_stacks_in_the_log(start: Start) -> None:
    limits = LimitsSpec(start=60, update=2, stop=1)
    group = built(start(limits=limits))
    began = time.monotonic()
    with pytest.raises(RunFailure) as caught:
        group.call("sleep", 60.0, 1, phase="update")
    assert time.monotonic() - began < 5
    assert (caught.value.who, caught.value.phase) == ("policy-1", "update")
    assert "no answer within 2 s (limits.update)" in caught.value.reason
    assert "in sleep" in (group.log_dir / "policy-1.log").read_text()
    assert group.fleet.members[1].state is ProcessState.SUSPECT


def test_a_stopped_rank_is_noticed_in_what_the_first_calls_make_of_its_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_limits, "FLOOR_S", 2.0)
    group, said = built(start()), []
    group.measured = MeasuredLimits(group.limits, said.append)
    for _ in range(3):
        group.call("sleep", 0.01, phase="update")
    assert [line.split(":")[0] for line in said] == ["limits.update of policy"]
    os.kill(group.pids()[1], signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RunFailure, match=r"policy-1 .*no answer within 2 s \(limits.update\)"):
        group.call("sleep", 0.01, phase="update")
    assert time.monotonic() - began < 4


def test_a_stopped_process_that_has_nothing_to_do_is_found_by_looking_after_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_limits, "FLOOR_S", 2.0)
    group = built(start())
    group.measured = MeasuredLimits(group.limits)
    for _ in range(3):
        group.look_after(range(2))
    assert group.fleet.serving == [0, 1]
    os.kill(group.pids()[1], signal.SIGSTOP)
    began = time.monotonic()
    group.look_after(range(2))
    assert time.monotonic() - began < 4
    assert group.fleet.members[0].state is ProcessState.HEALTHY
    assert group.fleet.members[1].state is ProcessState.SUSPECT


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_stopped_rank_is_named_alone_well_before_the_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """`elsewhere`: as if it were on another machine, by a task that Ray runs there."""
    monkeypatch.setattr(hung, "STOPPED_S", 2.0)
    monkeypatch.setattr(lookout, "LOOK_S", 0.5)
    monkeypatch.setattr(lookout, "AWAY_S", 0.5)
    if where == "elsewhere":
        monkeypatch.setattr(lookout, "machine", lambda: "another")
    group = built(start())
    pending = group.submit("sleep", 100.0, phase="update")
    os.kill(group_pid(group, 1), signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RunFailure, match=r"policy-1 .*its process was stopped \(SIGSTOP\) for 2 s"):
        pending.result()
    assert time.monotonic() - began < 30
    assert group.fleet.members[0].state is ProcessState.HEALTHY
    assert group.fleet.members[1].state is ProcessState.SUSPECT


def test_a_rank_that_does_not_come_to_a_collective_is_told_from_the_one_that_waits_there(
    start: Start,
) -> None:
    group = built(start(limits=LimitsSpec(start=60, logprobs=4, stop=1)))
    assert group.call("meet") == [2.0, 2.0]
    with pytest.raises(RunFailure) as caught:
        group.call("meet", 1, phase="logprobs")
    assert caught.value.who == "policy-1"
    waits = r"rank 0 waits for it in collective \d+ of ranks 0-1 \(meet\)"
    assert re.fullmatch(rf"no answer within \d s \(limits.logprobs\): {waits}", caught.value.reason)
    assert [member.state for member in group.fleet.members] == [ProcessState.HEALTHY, ProcessState.SUSPECT]


def test_calls_that_queue_up_have_not_overrun_anything(start: Start) -> None:
    group = built(start(workers=1, limits=LimitsSpec(start=60, logprobs=2, stop=1)))
    pending = [group.submit_rank(0, "sleep", 0.8, phase="logprobs") for _ in range(4)]
    assert [one.result() for one in pending] == [0.8] * 4


def test_a_rank_that_dies_while_it_is_built_is_named(start: Start) -> None:
    group = start()
    building = group.ready().build("duties:Stillborn", distributed=True)
    with pytest.raises(RunFailure) as caught:
        building.result()
    assert (caught.value.who, caught.value.phase) == ("policy-1", "load")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_that_needs_no_others_is_replaced_when_it_is_lost_while_it_is_made(
    start: Start, tmp_path: Path, how: str
) -> None:
    group = start(limits=LimitsSpec(start=60, stop=1, load=3)).ready()
    (tmp_path / "marks").mkdir()
    replaced: list[Replaced] = []
    group.supervision.replaced = replaced.append
    bring_up(group, group.build("duties:Frail", str(tmp_path / "marks"), 1, how))
    (one,) = replaced
    assert one.reason.startswith("its process died" if how == "killed" else "no answer within 3 s")
    assert group.fleet.members[one.rank].generation == 1
    assert group.call("well") == [True, True]


def test_a_loss_is_told_at_once_and_a_process_that_never_came_up_after_the_time_of_a_start(
    start: Start, tmp_path: Path
) -> None:
    """The first one is held up in opening its log, a pipe that nobody reads; the second one dies."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "marks").mkdir()
    log = tmp_path / "logs" / "policy-0.log"
    os.mkfifo(log)
    told: list[tuple[float, str]] = []
    began = time.monotonic()

    def tell(line: str) -> None:
        told.append((time.monotonic() - began, line))
        if line.startswith("policy-0 was lost"):
            log.unlink()

    group = start(limits=LimitsSpec(start=8, stop=1, load=60))
    group.supervision.tell = tell
    bring_up(group, group.build("duties:Frail", str(tmp_path / "marks"), 1, "killed"))
    lost = [(seconds, line) for seconds, line in told if " was lost: " in line]
    assert [line.partition(";")[0] for _, line in lost] == [
        "policy-1 was lost: its process died (killed, crashed, or out of memory)",
        "policy-0 was lost: no answer within 8 s (limits.start)",
    ]
    assert 8 <= lost[1][0] < 40
    assert group.call("well") == [True, True]


@pytest.mark.parametrize(("how", "lives"), [("killed", 3), ("raises", 1)])
def test_one_that_is_lost_again_and_again_or_says_why_it_can_not_is_not_replaced_for_ever(
    start: Start, tmp_path: Path, how: str, lives: int
) -> None:
    group = start(workers=1).ready()
    (tmp_path / "marks").mkdir()
    with pytest.raises(RunFailure, match="its process died" if how == "killed" else "no such model"):
        bring_up(group, group.build("duties:Frail", str(tmp_path / "marks"), 100, how))
    assert len(list((tmp_path / "marks").iterdir())) == lives


def test_a_rank_that_dies_while_it_starts_is_named(start: Start) -> None:
    group = start(workers=1).ready()
    os.kill(group.pids()[0], signal.SIGKILL)
    with pytest.raises(RunFailure) as caught:
        group.ready()
    assert (caught.value.who, caught.value.phase) == ("policy-0", "start")


def test_processes_that_ray_cannot_place_are_said_to_be_unplaced(start: Start) -> None:
    limits = LimitsSpec(start=2, stop=1)
    start(workers=1, cpus=1.5, limits=LimitsSpec(start=60, stop=1)).ready()
    with pytest.raises(RunFailure, match=r"not placed by Ray within 2 s \(limits.start\): 1 x \(1.5 CPU\)"):
        start(workers=1, cpus=1.5, limits=limits).ready()


def test_processes_are_added_and_taken_away_and_what_there_is_no_room_for_is_said(start: Start) -> None:
    group = start(workers=2).ready()
    group.build(DUTY, "good day").result()
    first = group.pids()
    with pytest.raises(NoRoom, match=r"9.5 CPU asked for, [\d.]+ CPU free in the cluster; missing: 8"):
        group.resize(40)
    assert group.resize(4) == [2, 3]
    for rank in (3, 2):
        group.rebuild(rank)
    assert group.call("greet", "Ada") == ["good day, Ada, from 0 of 1"] * 4
    gone_now = group.pids()[1:]
    assert group.resize(1) == []
    assert group.pids() == first[:1]
    until = time.monotonic() + 20
    while not all(map(gone, gone_now)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(gone, gone_now))
    (again,) = group.resize(2)
    group.rebuild(again)
    assert len(group.call("greet", "Ada")) == 2


def test_a_dead_rank_serves_again_only_after_restart_and_build(start: Start) -> None:
    group = built(start(workers=1))
    with pytest.raises(RunFailure):
        group.call("die", 0)
    group.restart(0)
    with pytest.raises(RunFailure, match="before it was built"):
        group.call("greet", "Ada")
    built(group)
    assert group.call("greet", "Ada") == ["hello, Ada, from 0 of 1"]
    assert group.fleet.members[0].generation == 1


# --- The end --------------------------------------------------------------------------------------


def test_shutdown_ends_even_a_busy_rank_and_frees_its_share(start: Start) -> None:
    import ray

    group = built(start(workers=1, cpus=1.25))
    pid = group.pids()[0]
    group.submit("sleep", 60.0)
    group.shutdown()
    deadline = time.monotonic() + 20
    while not (gone(pid) and ray.available_resources().get("CPU", 0) >= 1.25) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(pid)
    assert ray.available_resources()["CPU"] >= 1.25
    with pytest.raises(RunFailure, match="were not started, or are shut down"):
        group.call("greet", "Ada")
