"""Runs laid over each other: `raylign compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.cli.app import main
from pipeline.report.compare_page import read_runs
from pipeline.report.comparison import NONE, overlays
from pipeline.report.series import Series
from tests.pipeline.report.test_build import Page

UP, DOWN, FLAT = Series([1, 2], [1.0, 2.0]), Series([1, 3], [5.0, 4.0]), Series([1, 2], [3.0, 3.0])


def write_run(root: Path, name: str = "", config: str = "", **stages: list[dict[str, object]]) -> Path:
    """A run directory with a line of metrics for each mapping."""
    root.mkdir(parents=True)
    states = {stage: {"state": "done", "seconds": 2.0} for stage in stages}
    (root / "run.json").write_text(json.dumps({"name": name or root.name, "stages": states}))
    if config:
        (root / "config.yaml").write_text(config)
    for stage, rows in stages.items():
        (root / stage).mkdir()
        lines = [json.dumps({"step": at + 1, **row}) for at, row in enumerate(rows)]
        (root / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_a_metric_of_two_runs_is_a_chart_with_a_curve_a_run() -> None:
    (chart,) = overlays({"a": {"loss": UP, "kl": UP}, "b": {"loss": DOWN}})
    assert (chart.panel.title, chart.curves) == ("Loss", {"a": UP, "b": DOWN})


def test_each_metric_of_a_panel_is_a_chart_of_its_own_and_parts_are_not_stacked() -> None:
    series = {"time/generate": UP, "time/update": DOWN, "time/step": UP}
    found = overlays({"a": series, "b": series})
    assert [chart.panel.title for chart in found] == [
        "Seconds of a step: generate",
        "Seconds of a step: update",
        "Seconds of a step: total",
    ]
    assert not any(chart.stacked for chart in found)
    assert all(list(chart.curves) == ["a", "b"] for chart in found)


def test_held_out_figures_are_dashed_in_the_colour_of_their_run() -> None:
    from pipeline.report.plots import curve_colours, is_twin

    (chart,) = overlays({"a": {"loss": UP, "eval_loss": DOWN}, "b": {"loss": DOWN, "eval_loss": UP}})
    assert [label for label in chart.curves if is_twin(label)] == ["a held out", "b held out"]
    colours = curve_colours(chart)
    assert colours["b held out"] == colours["b"] != colours["a"]


def test_a_run_has_one_colour_in_all_charts() -> None:
    from pipeline.report.plots import curve_colours

    first, second = overlays({"a": {"loss": UP}, "b": {"loss": UP, "kl": UP}, "c": {"kl": DOWN, "loss": UP}})
    assert {curve_colours(chart)["b"] for chart in (first, second)} == {curve_colours(first)["b"]}
    assert "a" not in second.curves


def test_a_metric_that_stands_still_in_one_run_alone_is_drawn() -> None:
    assert [chart.panel.title for chart in overlays({"a": {"kl": FLAT}, "b": {"kl": UP}})] == [
        "KL to the reference"
    ]
    assert overlays({"a": {"kl": FLAT}, "b": {"kl": FLAT}}) == []


def test_two_runs_are_told_apart_by_settings_figures_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "name: {0}\noutput_dir: runs/{0}\nseed: 0\nstages:\n  sft: {{type: sft, learning_rate: {1}}}\n"
    one = write_run(tmp_path / "one", config=config.format("one", 0.1), sft=[{"loss": 3.0}, {"loss": 2.5}])
    two = write_run(tmp_path / "two", config=config.format("two", 0.2), sft=[{"loss": 3.0}, {"loss": 1.25}])
    run = json.loads((two / "run.json").read_text())
    run["eval"] = {"sft": {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 9, "metric": "exact_match"}}
    (two / "run.json").write_text(json.dumps(run))
    page = tmp_path / "new" / "both.html"
    assert main(["compare", str(one), str(two), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"stages\.sft\.learning_rate\s+0\.1\s+0\.2", said)
    assert re.search(r"loss\s+2\.500\s+1\.250", said)
    assert re.search(rf"sft, exact match\s+{NONE}\s+50\.0 % \(40\.0 to 60\.0 %\)", said)
    assert "seed" not in said
    assert "output_dir" not in said
    html = page.read_text()
    shown = Page(html)
    assert "learning_rate" in shown.text
    assert len(shown.ids) == len(set(shown.ids))
    assert {anchor for anchor in re.findall(r'href="#([^"]+)"', html) if "-" not in anchor} <= set(shown.ids)
    assert html.count('aria-label="Loss"') == 1
    targets = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(([^)]+)\)""", html)
    assert all((first or second).startswith(("#", "data:")) for first, second in targets)
    assert not list(one.glob("plots")), "other people's runs are left as they are"


def test_runs_of_different_stages_say_which_and_have_no_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", sft=[{"loss": 3.0}])
    two = write_run(tmp_path / "two", dpo=[{"loss": 3.0}])
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "x.html")]) == 0
    said = capsys.readouterr().out
    assert "only in one: sft" in said
    assert "only in two: dpo" in said
    assert "no stage has the same name in two of the runs" in said


def test_stages_without_a_common_metric_say_so(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", sft=[{"loss": 3.0}])
    two = write_run(tmp_path / "two", sft=[{"odd": 3.0}])
    found = read_runs([one, two])
    assert "no metric was logged by two of the runs in the same stage, so there are no curves" in found.notes
    assert found.stages[0].figures == [("loss", ["3.000", NONE]), ("odd", [NONE, "3.000"])]


def test_a_stage_that_one_run_lacks_is_one_line_among_the_settings(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", config="stages: {sft: {type: sft, seed: 1}}", sft=[{"loss": 3.0}])
    two = write_run(
        tmp_path / "two", config="stages: {sft: {type: sft}, dpo: {type: dpo, beta: 1}}", sft=[{"loss": 3.0}]
    )
    assert read_runs([one, two]).settings == [
        ("stages.sft.seed", ["1", NONE]),
        ("stages.dpo", [NONE, "dpo"]),
    ]


def test_a_damaged_or_unfinished_run_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", sft=[{"loss": 3.0}, {"loss": 2.0}])
    two = write_run(tmp_path / "two", config="- [", sft=[{"loss": 3.0}, {"loss": 2.0}])
    with (two / "sft" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo\xff')
    found = read_runs([one, two])
    assert list(found.stages[0].charts[0].curves) == ["one", "two"]
    assert "two: sft/metrics.jsonl: 1 unreadable line(s) left out" in found.notes
    assert "two: no settings, config.yaml is missing or can't be read" in found.notes


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, "same", sft=[{"loss": 3.0}]) for name in ("one", "two")]
    assert read_runs(runs).labels == ["one", "two"]
    runs = [write_run(tmp_path / name / "r", "same", sft=[{"loss": 3.0}]) for name in ("three", "four")]
    assert len(set(read_runs(runs).labels)) == 2


def test_directories_that_can_not_be_compared_are_refused_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", sft=[{"loss": 3.0}])
    with pytest.raises(UserError, match="the same run twice"):
        read_runs([one, tmp_path / "one" / ".." / "one"])
    with pytest.raises(UserError, match="takes 2 to 6 run directories, not 1"):
        read_runs([one])
    with pytest.raises(UserError) as refused:
        read_runs([one, tmp_path, tmp_path / "nowhere"])
    assert len(refused.value.problems) == 2
    (tmp_path / "file").touch()
    two = write_run(tmp_path / "two", sft=[{"loss": 3.0}])
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "file" / "x.html")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_names_and_settings_that_act_on_a_terminal_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    one = write_run(tmp_path / "one", "one\x1b[2J", 'seed: "\\e]0;x\\a"', sft=[{"loss\x1b[2J": 3.0}])
    two = write_run(tmp_path / "two", "two", "seed: 1", sft=[{"loss\x1b[2J": 4.0}])
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "x.html")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b[2J" in said
    assert "\\x1b]0;x\\x07" in said
    assert "\x1b" not in "".join(re.findall(r"<text.*?</text>", (tmp_path / "x.html").read_text()))
    assert not [warning for warning in recwarn if "\x1b" in str(warning.message)]
