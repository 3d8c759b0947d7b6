"""The stage graph's layout."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.read_run import read_run
from pipeline.report.stage_graph import byte_text, stage_graph


def test_a_chain_goes_left_to_right_with_what_is_passed_on(sample_run: Path) -> None:
    graph = stage_graph(read_run(sample_run))
    assert [box.name for box in graph.boxes] == ["base", "sft", "dpo"]
    assert len({box.y for box in graph.boxes}) == 1
    assert [arrow.label for arrow in graph.arrows] == ["", "adapter, 1.33 MB"]


def test_stages_from_one_parent_share_a_column_and_never_a_place(online_run: Path) -> None:
    graph = stage_graph(read_run(online_run))
    places = {box.name: (box.x, box.y) for box in graph.boxes}
    assert places["reward"][0] == places["grpo"][0]
    assert len(set(places.values())) == len(places)
    assert [arrow.label for arrow in graph.arrows if arrow.read] == ["reference"]


def test_policies_form_a_line_and_a_reward_model_is_read_from_below_it(rlhf_run: Path) -> None:
    graph = stage_graph(read_run(rlhf_run))
    place = {box.name: (box.x, box.y) for box in graph.boxes}
    assert [place[name][1] for name in ("base", "sft", "dpo", "ppo")] == [place["base"][1]] * 4
    assert place["reward"] == (place["dpo"][0], max(y for _, y in place.values()))
    assert sorted(arrow.label for arrow in graph.arrows if arrow.read) == ["reference", "reward model"]
    assert "93.0 % of pairs" in [box.score for box in graph.boxes]
    assert graph.height >= max(box.y + box.height for box in graph.boxes)


def test_bytes_read_like_bytes() -> None:
    assert [byte_text(size) for size in (999, 1000, 1_330_000, 61e9, 5e15)] == [
        "999 B",
        "1 kB",
        "1.33 MB",
        "61 GB",
        "5e+03 TB",
    ]
