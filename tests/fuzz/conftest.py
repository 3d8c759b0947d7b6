"""The fixture `feed`, and how many inputs each target got."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz.harness import Feed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Share the time of `make fuzz` among the targets."""
    seconds = float(os.environ.get("FUZZ_SECONDS") or 0)
    targets = [item for item in items if "feed" in getattr(item, "fixturenames", ())]
    if not seconds:
        return
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
    share = seconds * processes / max(len(targets), 1)
    for item in targets:
        item.user_properties.append(("fuzz_seconds", share))
        item.add_marker(pytest.mark.timeout(share + 900))  # making a find small takes time too


@pytest.fixture
def feed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Feed]:
    """Gives inputs to one target; the summary says how many."""
    from hypothesis.configuration import set_hypothesis_home_dir

    set_hypothesis_home_dir(tmp_path_factory.getbasetemp() / "hypothesis")
    given = dict(request.node.user_properties)
    target = Feed(given.get("fuzz_seconds"))
    yield target
    request.node.user_properties += [
        ("fuzz_executions", target.executions),
        ("fuzz_refusals", target.refusals),
    ]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many inputs each target of `make fuzz` got."""
    lines = []
    for report in terminalreporter.stats.get("", ()):  # setups and teardowns; the latter know all
        found = dict(getattr(report, "user_properties", ()))
        if report.when == "teardown" and "fuzz_seconds" in found:
            name = report.nodeid.rpartition("/")[2]
            lines.append(f"{found['fuzz_executions']:>9,} inputs, {found['fuzz_refusals']:,} refused: {name}")
    if lines:
        terminalreporter.section("inputs")
        terminalreporter.write_line("\n".join(lines))
