"""Restarted processes whose node died: what follows from what is seen of them, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.cluster import arrival
from actors.cluster.arrival import Arrivals, Next, decide
from actors.cluster.health import ProcessState
from actors.cluster.liveness import Liveness
from actors.cluster.placement import shortfall
from actors.cluster.spec import LimitsSpec
from actors.errors import NoRoom

LIMITS = LimitsSpec(start=180, room=600)


@pytest.mark.parametrize(
    ("asked_on", "now_on", "since_asked", "homeless", "follows"),
    [
        ("a", "a", 179, 0, Next.WAIT),
        ("a", "a", 180, 0, Next.OVERDUE),
        ("a", "b", 500, 0, Next.ASK_AGAIN),
        (None, "b", 0, 599, Next.ASK_AGAIN),
        ("a", None, 500, 599, Next.WAIT),
        (None, None, 0, 600, Next.NO_ROOM),
    ],
)
def test_what_follows_for_a_process_that_has_not_answered(
    asked_on: str | None, now_on: str | None, since_asked: float, homeless: float, follows: Next
) -> None:
    assert decide(asked_on, now_on, since_asked, homeless, LIMITS) is follows


def test_what_is_missing_is_a_sum_or_one_piece() -> None:
    free = {"CPU": 0.9, "GPU": 1.0, "node:10.0.0.1": 1.0}
    assert shortfall({"CPU": 0.2, "GPU": 4}, free) == (
        "0.2 CPU, 4 GPU asked for, 0.9 CPU, 1 GPU free in the cluster; missing: 3 GPU"
    )
    assert shortfall({"GPU": 1}, free).endswith("missing: no node has it in one piece")


class NoPlace:
    """Bundles without a node."""

    def node_of(self, rank: int) -> None:
        return None

    def missing(self) -> str:
        return "1 GPU asked for, 0 GPU free in the cluster; missing: 1 GPU"


def test_a_run_waits_for_room_says_so_and_ends_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("LOOK_S", "SAY_S"):
        monkeypatch.setattr(arrival, name, 0.0)
    monkeypatch.setattr(arrival.waiting, "POLL_S", 0.02)
    said: list[str] = []
    liveness = Liveness("rollout", 2, LimitsSpec(room=0.2), tmp_path, "", list, str)

    def never(rank: int) -> Any:
        raise AssertionError(f"engine {rank} was asked for without room")

    arrivals = Arrivals(liveness, NoPlace(), never, never, said.append)  # type: ignore[arg-type]
    with pytest.raises(NoRoom, match=r"rollout-1 .*no other had room within 0 s.*missing: 1 GPU"):
        arrivals.wait({1: None})
    (line,) = said
    assert line.startswith("rollout-1: its node has died, and no other has room")
    assert liveness.fleet.members[1].state is ProcessState.DEAD
