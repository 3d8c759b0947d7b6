"""A process that hangs is told from those that wait for it, and from those that only take long."""

from __future__ import annotations

import socket
from dataclasses import replace
from datetime import timedelta

import pytest

from actors.cluster.futures import Fault, waited_in_vain
from actors.cluster.hung import CONNECTED_S, FROZEN_S, STILL_S, STOPPED_S, Look, Seen, hung
from actors.cluster.meeting_point import open_meeting_point

ALIVE = Look(cpu_s=1.0, beats=10, doing="updates.update, step 7", entered={"0-1": 40})


def looks(*each: tuple[float, Look]) -> Seen:
    """What looks at these times have shown."""
    (at, first), *more = each
    seen = Seen.first(first, at)
    for at, look in more:
        seen = seen.after(look, at)
    return seen


def every(seconds: float, until: float, *, cpu: float = 0.0, beats: float = 0.0, **same: object) -> Seen:
    """Looks at one whose CPU seconds and beats grow by so much a second."""
    times = [seconds * n for n in range(int(until / seconds) + 1)]
    grown = [(t, replace(ALIVE, cpu_s=1 + cpu * t, beats=10 + int(beats * t), **same)) for t in times]
    return looks(*grown)


def test_one_that_is_stopped_is_lost_after_half_a_minute_and_not_before() -> None:
    assert every(5, STOPPED_S - 5, stopped=True).lost() is None
    assert every(5, STOPPED_S, stopped=True).lost() == "its process was stopped (SIGSTOP) for 30 s"


def test_one_that_goes_on_or_was_not_looked_at_meanwhile_has_not_been_stopped_all_the_time() -> None:
    stopped = replace(ALIVE, stopped=True)
    went_on = looks(*[(5.0 * n, ALIVE if n == 4 else stopped) for n in range(8)])
    assert went_on.lost() is None
    assert looks((0, stopped), (CONNECTED_S + 1, stopped)).lost() is None


def test_one_that_computes_for_long_with_the_interpreter_held_is_not_lost() -> None:
    assert every(5, 10 * FROZEN_S, cpu=0.002).lost() is None


def test_one_that_waits_for_a_disk_is_not_lost_as_it_has_a_pulse() -> None:
    assert every(5, 10 * FROZEN_S, beats=2).lost() is None


def test_one_that_gets_no_turn_at_all_is_lost_unless_a_debugger_holds_it() -> None:
    assert "got no CPU time for 60 s" in str(every(5, FROZEN_S).lost())
    assert every(5, 10 * FROZEN_S, traced=True).lost() is None
    assert every(5, 10 * FROZEN_S, beats=0).last.beats == 10


def test_one_that_others_wait_for_in_a_collective_is_named_alone_with_what_they_wait_for() -> None:
    seen = {0: every(5, 60, beats=2, entered={"0-1": 41}), 1: every(5, 60, beats=2)}
    reason = "rank 0 waits for it in collective 41 of ranks 0-1 (updates.update, step 7)"
    assert hung(seen, [0, 1]) == {1: reason}


def test_one_that_waits_itself_in_another_group_is_not_named() -> None:
    """0 waits for 1, and 1 for 2, which hangs."""
    seen = {
        0: every(5, 60, beats=2, entered={"0-1": 41}),
        1: every(5, 60, beats=2, entered={"0-1": 40, "1-2": 13}),
        2: every(5, 60, beats=2, entered={"1-2": 12}),
    }
    told = hung(seen, [0, 1, 2])
    assert list(told) == [2]
    assert told[2].startswith("rank 1 waits for it in collective 13 of ranks 1-2")


def test_of_four_ranks_the_two_that_hang_are_named() -> None:
    ahead, behind = (every(5, 60, beats=2, entered={"0-3": n}) for n in (41, 40))
    told = hung({0: ahead, 1: behind, 2: ahead, 3: behind}, range(4))
    assert list(told) == [1, 3]
    assert "ranks 0, 2 wait for it in collective 41 of ranks 0-3" in told[1]


def test_one_that_is_only_slow_is_not_told_from_the_others() -> None:
    ahead = every(5, 60, beats=2, entered={"0-1": 41})
    slow = every(5, 55, beats=2, entered={"0-1": 39}).after(replace(ALIVE, entered={"0-1": 40}), 60)
    assert hung({0: ahead, 1: slow}, [0, 1]) == {}


def test_one_whose_pulse_has_stopped_is_named_where_the_others_have_one() -> None:
    seen = {0: every(5, 60, beats=2), 1: every(5, 60, cpu=1)}
    assert hung(seen, [0, 1]) == {1: "its pulse has stopped: native code holds its interpreter"}
    assert hung({0: seen[1], 1: seen[1]}, [0, 1]) == {}


def test_a_process_that_is_stopped_at_the_deadline_is_named_before_all_others() -> None:
    seen = {
        0: every(5, 60, beats=2, entered={"0-1": 41}),
        1: every(5, 60, beats=2),
        2: looks((0, replace(ALIVE, stopped=True))),
    }
    assert hung(seen, [0, 1, 2]) == {2: "its process is stopped (SIGSTOP)"}


def test_nobody_is_named_by_a_single_look_or_where_one_was_not_seen() -> None:
    ahead = every(5, 60, beats=2, entered={"0-1": 41})
    assert hung({0: ahead, 1: looks((60, ALIVE))}, [0, 1]) == {}
    assert hung({0: ahead}, [0, 1]) == {}
    assert hung({1: every(5, STILL_S)}, [1]) == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_does_not_come_to_the_meeting_of_ranks_is_told_from_the_one_that_waited_for_it(
    rank: int,
) -> None:
    """Whoever listens and whoever connects say so in different words."""
    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    wait = timedelta(seconds=1)
    meet = {
        0: lambda: open_meeting_point("127.0.0.1", port, 2, wait, wait=True),
        1: lambda: TCPStore("127.0.0.1", port, 2, False, wait, wait_for_workers=True),
    }
    with pytest.raises(RuntimeError) as alone:
        meet[rank]()
    assert waited_in_vain(Fault(rank, alone.value, died=False))
    assert not waited_in_vain(Fault(rank, alone.value, died=True))
