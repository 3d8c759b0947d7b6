"""Router statistics and memory of an online stage: what is read of them, and its colours."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.heatmaps import agreement_colours
from pipeline.report.routing import to_routing
from pipeline.report.timeline import Call, to_calls
from pipeline.report.times import memory_bars


def test_layers_are_rows_and_steps_are_columns() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 5, "trainer": [1.5, 2.5], "agreement": [1.0, 0.98]},
        {"step": 10, "trainer": [1.6, 2.6]},
        {"step": 5, "trainer": [1.4, 2.4]},
        {"step": 15, "trainer": "cut off"},
    ]
    found = to_routing(rows, [[30, 10], [20, 20]])
    # Step 5 was logged again after a resume: the later line counts.
    assert (found.steps, found.busiest) == ([5, 10], [[1.4, 1.6], [2.4, 2.6]])
    assert (found.agreement_steps, found.agreement) == ([5], [[1.0], [0.98]])
    assert found.engine_load == [[1.5, 0.5], [1.0, 1.0]]
    assert found
    assert not to_routing([], None)


def test_lines_of_another_model_are_left_out() -> None:
    found = to_routing([{"step": 1, "trainer": [1.0]}, {"step": 2, "trainer": [1.0, 2.0]}], None)
    assert (found.steps, found.busiest) == ([2], [[1.0], [2.0]])


@pytest.mark.parametrize(
    ("agreement", "lowest", "strongest"), [([[1.0, 0.9]], 0.9, 0.7), ([[1.0, 0.9999]], 0.9999, 0.07)]
)
def test_full_agreement_is_blank_and_little_disagreement_is_pale(
    agreement: list[list[float]], lowest: float, strongest: float
) -> None:
    image = agreement_colours(agreement, lowest)
    assert image[0, 0, 3] == 0
    assert image[0, 1, 3] == pytest.approx(strongest)


def call(lane: str, start: float, peak: int | None) -> Call:
    return Call(lane, "update", "update", start, start + 1, peak_rss=peak)


def test_a_process_has_its_largest_peak_and_older_traces_have_none() -> None:
    calls = [call("policy-0", 0, 900_000_000), call("policy-0", 1, 1_200_000_000), call("rollout-0", 2, None)]
    assert [(bar.label, bar.text, bar.percent) for bar in memory_bars(calls)] == [
        ("policy-0", "1.2 GB", 100.0)
    ]
    assert memory_bars([call("rollout-0", 2, None)]) == []
    row = {"method": "m", "start": 1.0, "end": 2.0, "peak_rss": 4096}
    assert to_calls("policy-0", [row])[0].peak_rss == 4096


def test_many_processes_are_summed_up_by_role() -> None:
    calls = [call(f"policy-{rank}", rank, 10**9 + rank) for rank in range(12)]
    calls.append(call("rollout-0", 20, 2 * 10**9))
    assert [(bar.label, bar.text, bar.percent) for bar in memory_bars(calls)] == [
        ("policy, largest of 12", "1 GB", 50.0),
        ("rollout, largest of 1", "2 GB", 100.0),
    ]
