"""Versions on their way to many engines, over real gloo: bytes, faults of engines that pass on, hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors.errors import InvariantViolation, RunFailure
from actors.sync import asking, channel
from actors.sync.channel import Channel, Connector
from actors.sync.engine_set import EngineSet
from actors.sync.outlets import Outlets
from actors.sync.payload import pack_merged
from actors.sync.spec import SyncSpec
from actors.sync.weight_sync import WeightSync
from tests.actors.sync.fake_groups import first_done
from tests.actors.sync.standin_engines import StandIns, Trainer, bytes_sent

NUMBERS = 50_000
PAYLOAD = 4 * NUMBERS
DEADLINE_S = 5.0
"""Of tests in which it passes; torch's store alone needs a second where the machine is busy."""


class World:
    """A trainer and stand-ins, connected."""

    def __init__(
        self, engines: int, on_a_node: int, fan_out: int = 4, sync_s: float = 60.0, **faults: str
    ) -> None:
        self.group = StandIns(engines, on_a_node, sync_s)
        self.group.faults = {int(rank.removeprefix("e")): fault for rank, fault in faults.items()}
        self.trainer = Trainer(self.group, NUMBERS)
        self.engines = EngineSet(self.group)  # type: ignore[arg-type]
        spec = SyncSpec(payload="merged", fan_out=fan_out)
        self.sync = WeightSync(
            self.trainer, self.engines, spec, "base", "policy", [[1, 2, 3]]  # type: ignore[arg-type]
        )  # fmt: skip
        self.sync.connect()

    def served(self) -> set[int]:
        return {self.engines[rank].version for rank in self.engines}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(asking, "first_done", first_done)
    monkeypatch.setattr(asking, "POLL_S", 0.05)
    monkeypatch.setattr(channel, "JOIN_S", 5.0)
    made: list[World] = []

    def make(*args: int, **more: int | float | str) -> World:
        made.append(World(*args, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.sync.close()
        one.group.close()


def copies(sent: int) -> int:
    """How many payloads these bytes are; each has a manifest of less than a tenth of it."""
    assert sent % PAYLOAD < PAYLOAD / 2
    return sent // PAYLOAD


@pytest.mark.parametrize("engines", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_to_engines_on_8_nodes_the_trainer_sends_as_many_copies_as_the_fan_out(
    world: Callable[..., World], engines: int
) -> None:
    relayed = world(engines, engines // 8)
    with bytes_sent(relayed.trainer) as sent:
        assert relayed.sync.push(0).withheld == ()
    assert (copies(sent["trainer"]), copies(sent["engines"])) == (4, engines - 4)
    assert relayed.served() == {0}
    direct = world(engines, engines // 8, fan_out=engines)
    with bytes_sent(direct.trainer) as sent:
        direct.sync.push(0)
    assert (copies(sent["trainer"]), copies(sent["engines"])) == (engines, 0)


def test_one_that_passes_on_other_bytes_than_it_got_is_named(world: Callable[..., World]) -> None:
    corrupt = world(16, 8, e8="corrupts")
    with pytest.raises(InvariantViolation) as caught:
        corrupt.sync.push(0)
    refusals = caught.value.reason.partition(": engine ")[2].split("; engine ")
    assert [int(one.partition(":")[0]) for one in refusals] == list(range(9, 16))
    named = ["by way of engine 8, which had acknowledged what was offered" in one for one in refusals]
    assert named == [True] * 4 + [False] * 3, "whoever got it so from another is no culprit"
    assert corrupt.served() == {-1}, "nobody committed"


@pytest.mark.parametrize(
    "moments", [["send", "listen"], pytest.param(["send", "accept", "send"], marks=pytest.mark.slow)]
)
def test_a_trainer_that_is_replaced_over_a_push_begins_it_anew_and_no_engine_is_lost(
    world: Callable[..., World], moments: list[str]
) -> None:
    mortal = world(8, 4)
    mortal.sync.push(0)
    mortal.trainer.dies_at = list(moments)
    assert mortal.sync.push(1).replaced == ()
    assert mortal.served() == {1}
    assert (mortal.trainer.dies_at, mortal.trainer.lives) == ([], len(moments))


def test_an_engine_that_is_lost_after_the_trainer_was_gets_the_version_that_others_have(
    world: Callable[..., World],
) -> None:
    mortal = world(2, 2)
    mortal.sync.push(0)
    mortal.trainer.dies_at = ["disconnect"]
    mortal.group.kill(1)
    with pytest.raises(RunFailure):
        mortal.group.submit_rank(1, "weights.describe", phase="sync").result()
    mortal.engines.bring_back(1)
    assert mortal.served() == {0}


def test_those_below_one_that_dies_get_the_version_by_another_way(world: Callable[..., World]) -> None:
    dying = world(16, 8)
    dying.sync.push(0)
    dying.group.faults[8] = "dies in stage"
    report = dying.sync.push(1)
    assert (report.replaced, report.withheld) == ((8,), ())
    assert dying.served() == {1}
    generations = [dying.engines[rank].generation for rank in dying.engines]
    assert generations == [int(rank == 8) for rank in range(16)], "it cost nobody else"
    with bytes_sent(dying.trainer) as sent:
        dying.sync.push(2)
    assert copies(sent["trainer"]) == 2, "one on each node passes it on again"


def test_one_that_passes_nothing_on_is_named_and_passes_nothing_on_from_then_on(
    world: Callable[..., World],
) -> None:
    silent = world(8, 4, sync_s=DEADLINE_S, e4="drops")
    report = silent.sync.push(0)
    assert (report.replaced, report.withheld) == ((), (4,))
    assert silent.served() == {0}
    began = time.monotonic()
    assert silent.sync.push(1).withheld == ()
    assert time.monotonic() - began < 0.8 * DEADLINE_S, "it is not waited for again"


@pytest.mark.parametrize(
    "rank",
    [
        pytest.param(4, id="one that passes on"),
        pytest.param(7, id="one that doesn't", marks=pytest.mark.slow),
    ],
)
def test_one_that_hangs_costs_a_deadline_and_itself(world: Callable[..., World], rank: int) -> None:
    hanging = world(8, 4, sync_s=DEADLINE_S)
    hanging.sync.push(0)
    hanging.group.faults[rank] = "hangs in stage"
    began = time.monotonic()
    assert hanging.sync.push(1).replaced == (rank,)
    assert time.monotonic() - began < 2 * DEADLINE_S
    assert hanging.served() == {1}
    assert sum(hanging.engines[rank].generation for rank in hanging.engines) == 1


def test_parts_that_follow_reach_the_others_in_time_where_one_engine_hangs(
    world: Callable[..., World],
) -> None:
    """Parts are sent one after the other: whoever waits for the second one has time for all that the first
    one may take, to an engine that does not take it."""
    several = world(3, 4, sync_s=DEADLINE_S)
    links = several.sync._phases._links.plan(dict.fromkeys(several.engines, 0), direct=True)
    hop_s = links[0].hop_s
    trainer = Outlets()
    ends: list[Channel] = []

    def join(address: str, rank: int) -> None:
        ends.append(Connector(address, links[rank].receives_s).join())

    addresses = trainer.listen([0, 1], "127.0.0.1", hop_s)
    joining = [threading.Thread(target=join, args=(addresses[rank], rank)) for rank in (0, 1)]
    for thread in joining:
        thread.start()
    assert trainer.accept([0, 1]) == {}
    for thread in joining:
        thread.join()
    # Larger than what sockets take by themselves, so that one who does not receive is noticed.
    parts = [pack_merged(1, "float32", {"w": torch.full((8_000_000,), float(n))}) for n in range(3)]
    with ThreadPoolExecutor() as pool:
        # The end that takes the parts; the other one hangs.
        received = pool.submit(lambda: [ends[0].receive().digest for _ in parts])
        failed = []
        for part in parts:
            failed.append(trainer.send(part, [0, 1]))
            time.sleep(0.5)  # while the next part is merged
        assert received.result() == [part.digest for part in parts]
    assert [len(each) for each in failed] == [1, 1, 1]
    trainer.close()
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    "where",
    [
        "hangs in open",
        pytest.param("hangs in connect", marks=pytest.mark.slow),
        pytest.param("dies in connect", marks=pytest.mark.slow),
    ],
)
def test_engines_that_hang_while_they_connect_hold_up_nobody_else_and_are_replaced(
    world: Callable[..., World], where: str
) -> None:
    began = time.monotonic()
    connected = world(8, 4, fan_out=8, sync_s=DEADLINE_S, e3=where, e4=where, e5=where, e6=where)
    seconds = time.monotonic() - began
    generations = [connected.engines[rank].generation for rank in connected.engines]
    assert [rank for rank, generation in enumerate(generations) if generation] == [3, 4, 5, 6]
    assert seconds < 3 * DEADLINE_S, "they are waited for at the same time"
    assert connected.sync.push(0).replaced == ()
    assert connected.served() == {0}


def test_what_was_connected_once_stays_connected(world: Callable[..., World]) -> None:
    steady = world(12, 8)
    listeners = steady.trainer.source._outlets._channels.copy()
    for version in range(3):
        steady.sync.push(version)
    assert steady.trainer.source._outlets._channels == listeners
    assert len(listeners) == 2
