"""Reading metrics and expert loads: what is cut off, repeated or of another shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.app import main
from pipeline.report.panels import charts, format_value
from pipeline.report.read_run import read_run
from pipeline.report.samples import to_answer
from pipeline.report.series import Series, fair_share, to_series


def test_a_step_logged_again_after_a_resume_counts_once() -> None:
    series = to_series([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}])
    assert series["loss"] == Series([1, 2], [3.0, 2.0])


def test_values_that_are_no_finite_numbers_are_left_out() -> None:
    rows = [{"step": 1, "loss": float("nan"), "note": "x", "flag": True}, {"step": 2, "loss": 1.5}]
    assert to_series(rows) == {"loss": Series([2], [1.5])}


def test_figures_that_no_chart_can_hold_are_left_out_and_counted(rlhf_run: Path) -> None:
    rows = [{"step": 1, "loss": 1e308}, {"step": 2, "loss": 3e38}, {"step": 10**30, "loss": 1.0}]
    assert to_series(rows) == {"loss": Series([2], [3e38])}
    (rlhf_run / "sft" / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert "sft/metrics.jsonl: 2 number(s) too large for a chart left out" in read_run(rlhf_run).notes


@pytest.mark.parametrize(
    ("load", "shares"),
    [
        ([[10, 30], [0, 0]], [[0.5, 1.5], [0.0, 0.0]]),
        ([[[1, 1]], [[1, 3]]], [[0.5, 1.5]]),
        ([[], [2, 2]], [[1.0, 1.0]]),
        ([[1, 2], [1, 2, 3]], []),
        (None, []),
        ([], []),
        ("broken", []),
    ],
)
def test_expert_loads_become_fair_shares(load: object, shares: list[list[float]]) -> None:
    assert fair_share(load) == shares


def test_metrics_group_into_charts_with_their_held_out_counterparts() -> None:
    up, flat = Series([1, 2], [1.0, 2.0]), Series([1, 2], [0.0, 0.0])
    found, constants = charts(
        {"loss": up, "eval_loss": up, "moe/dead_experts": flat, "epoch": up, "odd/thing": up}
    )
    assert [(chart.panel.title, list(chart.curves)) for chart in found] == [
        ("Loss", ["training", "held out"]),
        ("odd/thing", ["training"]),
    ]
    assert constants == {"moe/dead_experts": 0.0}


def test_a_figure_logged_once_is_a_point_next_to_its_counterpart_and_no_chart_of_its_own() -> None:
    found, constants = charts(
        {"loss": Series([1, 2], [2.0, 1.0]), "eval_loss": Series([2], [1.5]), "kl": Series([1], [0.0])}
    )
    assert [list(chart.curves) for chart in found] == [["training", "held out"]]
    assert constants == {"kl": 0.0}


def test_a_stage_that_has_left_the_config_is_left_out(rlhf_run: Path) -> None:
    run = json.loads((rlhf_run / "run.json").read_text())
    run["stages"]["older"] = {"state": "failed"}
    (rlhf_run / "run.json").write_text(json.dumps(run))
    view = read_run(rlhf_run)
    assert [stage.name for stage in view.stages] == ["sft", "reward", "dpo", "ppo"]
    assert view.state == "done"


def test_a_single_step_is_a_chart_not_a_constant() -> None:
    found, constants = charts({"loss": Series([1], [0.69])})
    assert [chart.panel.title for chart in found] == ["Loss"]
    assert constants == {}


def test_scores_of_pairs_are_no_generations(rlhf_run: Path) -> None:
    (rlhf_run / "eval").mkdir()
    (rlhf_run / "eval" / "reward.jsonl").write_text('{"chosen": 1.0, "rejected": 0.5}\n')
    assert read_run(rlhf_run).completions == {}


def test_figures_are_short() -> None:
    assert [format_value(value) for value in (0.41234, 12.345, 1234.5, 0.0, 2e-4)] == [
        "0.412",
        "12.3",
        "1,234",
        "0",
        "2.0e-04",
    ]
    assert format_value(0.831, "percent") == "83.1 %"


def test_a_reward_that_is_the_only_one_has_no_second_chart() -> None:
    up, other = Series([1, 2], [1.0, 2.0]), Series([1, 2], [0.0, 5.0])
    found, _ = charts({"reward": up, "rewards/exact/mean": up})
    assert [chart.panel.title for chart in found] == ["Reward"]
    found, _ = charts({"reward": up, "rewards/exact/mean": up, "rewards/model/mean": other})
    assert [list(chart.curves) for chart in found] == [["training"], ["exact", "model"]]


def test_a_loss_comes_first_but_where_the_stage_generates() -> None:
    up = Series([1, 2], [1.0, 2.0])
    assert {chart.panel.title: chart.first for chart in charts({"loss": up})[0]} == {"Loss": True}
    found, _ = charts({"loss": up, "reward": up, "entropy": up})
    assert {chart.panel.title: chart.first for chart in found} == {
        "Reward": True,
        "Entropy of the policy": True,
        "Loss": False,
    }


def test_parts_of_a_step_share_a_chart_with_their_total() -> None:
    part, total = Series([1, 2], [1.0, 2.0]), Series([1, 2], [3.0, 5.0])
    found, _ = charts({"time/generate": part, "time/update": part, "time/step": total})
    assert [(list(chart.curves), chart.total, chart.stacked) for chart in found] == [
        (["generate", "update"], total, True)
    ]


def test_stages_of_the_config_that_were_not_reached_are_pending(failed_run: Path) -> None:
    config = failed_run / "config.yaml"
    config.write_text(
        config.read_text().replace("roles:", "  last:\n    type: dpo\n    reference: sft\nroles:")
    )
    run = read_run(failed_run)
    last = run.stages[-1]
    assert (last.state, last.init, last.reads) == ("pending", "dpo", {"sft": "reference"})
    assert run.state == "failed"


DAMAGED = {
    "reward/router_load.json": b'{"load": [[1, 2], true]}',
    "sft/metrics.jsonl": b'\xff\xfe\n{"step": 1, "loss": 1' + b"0" * 400 + b'}\n{"step": 2, "loss": 2.5}\n',
    "sft/samples.jsonl": b"[" * 100_000,
    "sft/manifest.json": b"[" * 100_000,
    "config.yaml": b"\xff: [",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_costs_only_what_it_held(rlhf_run: Path, name: str) -> None:
    path = rlhf_run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(DAMAGED[name])
    run = read_run(rlhf_run)
    assert [stage.name for stage in run.stages]
    if name == "sft/metrics.jsonl":
        sft = next(stage for stage in run.stages if stage.name == "sft")
        assert sft.series["loss"] == Series([2], [2.5])


@pytest.mark.parametrize(
    ("score", "read"), [(True, 1.0), (0, 0.0), (10**400, None), ("1", None), (None, None)]
)
def test_scores_that_are_no_numbers_are_left_out(score: object, read: float | None) -> None:
    assert to_answer("a", {"completion": "c", "score": score}).score == read


def test_a_date_beyond_the_calendar_is_shown_as_it_is(rlhf_run: Path) -> None:
    run = json.loads((rlhf_run / "run.json").read_text())
    (rlhf_run / "run.json").write_text(json.dumps({**run, "began": 1e300}))
    assert read_run(rlhf_run).began == "1e+300"


def test_a_report_that_cannot_be_written_is_a_message(
    rlhf_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_: Path, works: bool) -> Path:
        raise OSError(30, "Read-only file system", str(rlhf_run / "plots"))

    monkeypatch.setattr("pipeline.report.build_report", refused)
    assert main(["report", str(rlhf_run)]) == 2
    said = capsys.readouterr().err
    assert "the report can't be written (Read-only file system)" in said
    assert "copy it and name the copy" in said
