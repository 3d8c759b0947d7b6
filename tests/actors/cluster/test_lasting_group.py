"""Ranks that are killed again and again answer as one object that nobody kills."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.cluster import snapshots
from actors.cluster.lasting_group import Habits, LastingGroup, RanksReplaced
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.errors import RunFailure
from tests.actors.duties import Ledger

pytestmark = pytest.mark.ray

KEPT = Habits(
    makes=frozenset(["open"]),
    changes=frozenset(["book"]),
    publishes=frozenset(["publish"]),
    sessions=frozenset(["log_in", "who_is_in"]),
    snapshot="take",
    restore="put",
)


class Ledgers(LastingGroup):
    habits = KEPT


@pytest.fixture
def ledgers(ray_cluster: None, tmp_path: Path) -> Iterator[Ledgers]:
    """Two ranks with a ledger each, and a line for each replacement in `said`."""
    limits = LimitsSpec(start=60, stop=1, max_restarts=100)
    group = Ledgers("books", RoleSpec(workers=2), limits, tmp_path / "logs")
    group.start()
    group.said = []  # type: ignore[attr-defined]
    group.supervision.replaced = group.said.append  # type: ignore[attr-defined]
    group.build("duties:Ledger", distributed=True).result()
    yield group
    group.shutdown()


def kill(group: LastingGroup, rank: int) -> None:
    """By its log, as it may be busy."""
    log = group.liveness.log(rank)
    while not (log.is_file() and "pid " in log.read_text()):
        time.sleep(0.01)
    os.kill(int(log.read_text().rpartition("pid ")[2].split()[0]), signal.SIGKILL)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_answers_are_those_of_a_ledger_that_nobody_kills(
    ledgers: Ledgers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, undisturbed = random.Random(seed), Ledger()
    # Snapshots after some steps, not after each.
    monkeypatch.setattr(snapshots, "cost", lambda facts: draw.choice([0.0, 0.0, 1e-3]))
    expected: list[Any] = []
    asked: list[Any] = []
    found: list[Any] = []

    def ask(method: str, *args: Any) -> None:
        expected.append(getattr(undisturbed, method)(*args))
        asked.append(ledgers.submit_alike(method, *args))

    kills = set(draw.sample(range(5, 80), 5))
    for turn in range(80):
        names = sorted(undisturbed.sums)
        if not names or draw.random() < 0.05:
            ask("open", f"account {turn}", draw.choice(names) if names else None)
        elif draw.random() < 0.1:
            ask("publish")
        elif draw.random() < 0.3:
            ask(*draw.choice([("read",), ("ask", draw.choice(names))]))
        else:
            ask("book", draw.choice(names), draw.randint(0, 1000))
        if turn in kills:
            kill(ledgers, draw.randint(0, 1))
        while len(asked) - len(found) > draw.randint(0, 3):
            found.append(asked[len(found)].result())
    found += [one.result() for one in asked[len(found) :]]
    assert found == expected
    assert ledgers.call("read") == [undisturbed.read()] * 2
    assert len(ledgers.said) >= 4, ledgers.said  # type: ignore[attr-defined]


def test_what_belongs_to_one_life_of_the_ranks_is_not_asked_again(ledgers: Ledgers) -> None:
    assert ledgers.call("log_in", "Ada") == ["Ada", "Ada"]
    lives = ledgers.lives
    kill(ledgers, 1)
    with pytest.raises(RanksReplaced, match="its processes were replaced"):
        ledgers.call("who_is_in")
    assert ledgers.lives == lives + 1
    assert ledgers.call("who_is_in") == ["", ""]


@pytest.mark.slow
def test_ranks_whose_state_is_too_large_to_be_kept_end_the_run(ledgers: Ledgers) -> None:
    ledgers.build("duties:Ledger", distributed=True, kept=False).result()
    ledgers.call("open", "account")
    for amount in range(20):
        ledgers.call("book", "account", amount)
    kill(ledgers, 0)
    with pytest.raises(RunFailure, match="books-0 failed in phase 'call': its process died"):
        ledgers.call("ask", "account")
    assert ledgers.said == []  # type: ignore[attr-defined]
