"""Whatever the files of a run directory hold, a report, a comparison, a resume or a message comes out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline.artifacts.identity import Identity, decide, identity_config
from pipeline.artifacts.manifest import new_directory
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.evaluation.held_out import finished
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.summary import results_table
from pipeline.report import CardFacts, adapter_card, build_report, read_runs, write_page
from pipeline.report.build import contents, headline, headline_facts, status
from pipeline.report.comparison import Comparison
from pipeline.report.evals import eval_tables
from pipeline.report.heatmaps import draw_heatmaps
from pipeline.report.panels import charts
from pipeline.report.plots import draw_chart
from pipeline.report.read_run import read_run
from pipeline.report.routing import to_routing
from pipeline.report.run_view import RunView, StageView
from pipeline.report.samples import samples_by_step, side_by_side, stage_samples
from pipeline.report.series import fair_share, to_series
from pipeline.report.settings import settings
from pipeline.report.stage_graph import stage_graph
from pipeline.report.timeline import chrome_trace, to_calls
from pipeline.report.times import memory_bars, time_bars, timeline
from pipeline.stages.metrics import WINDOW, MetricsLog
from tests.fuzz.harness import Feed
from tests.fuzz.strategies import altered, damaged, json_scalars, scalars, values
from tests.pipeline.artifacts.checkpoints import checkpoint_manifest
from tests.pipeline.report.conftest import keep_metrics
from tests.pipeline.report.rlhf_run import write_rlhf_run

Files = dict[str, bytes]
Edit = tuple[str, str, bytes]
"""File in the run directory, what is done to it, its new content."""

LIVELY = ("run.json", "config.yaml")
"""Files that most depends on."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a small run of four stages."""
    root = write_rlhf_run(tmp_path_factory.mktemp("good") / "run", steps=3, offline=False)
    keep_metrics(root / "ppo", "reward", "kl", "time/generate", "time/step")
    for name in ("base", "sft"):
        (root / "eval").mkdir(exist_ok=True)
        rows = [{"prompt": f"{at}?", "completion": "1", "answer": "1", "score": at % 2} for at in range(3)]
        (root / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors"
    }


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.report.figure.PNG_DPI", 30)
        yield


def write(root: Path, good: Files, edits: list[Edit]) -> None:
    """The good run in `root`, with edits."""
    shutil.rmtree(root, ignore_errors=True)
    for name, content in good.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name, how, content in edits:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if how == "write":
            path.write_bytes(content)
        elif how == "directory":
            path.mkdir()
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "pipe":
            os.mkfifo(path)


def as_bytes(value: Any) -> bytes:
    """JSON as Python writes it: with NaN, and without half surrogates that no file could hold."""
    try:
        return json.dumps(value).encode("utf-8", errors="replace")
    except RecursionError:
        return b"[" * 3000


@st.composite
def edits(draw: st.DrawFn, good: Files, lively: tuple[str, ...] = LIVELY) -> list[Edit]:
    """One to three files damaged, replaced by other values, or by something that is no file."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*good, *lively, *lively]))
        how = draw(
            st.sampled_from(["bytes", "values", "values", "values", "gone", "directory", "loop", "pipe"])
        )
        if how == "bytes":
            found.append((name, "write", draw(damaged([good[name]]))))
        elif how == "values":
            found.append((name, "write", draw(other_values(name, good[name]))))
        else:
            found.append((name, how, b""))
    return found


def other_values(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """A file's values, some of them others: of the whole file, or of some lines."""
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in content.splitlines()[:6]]
        lines = st.lists(altered(rows, json_scalars()).map(as_bytes), min_size=1, max_size=5)
        return lines.map(b"\n".join)
    if name.endswith(".json"):
        return altered([json.loads(content)], json_scalars()).map(as_bytes)
    return damaged([content], [b"&a ", b"*a", b": ", b"- ", b"[", b"{", b"!!binary ", b"9" * 400, b"1e999"])


def looked_at(run: RunView) -> None:
    """All of a report but its drawings."""
    graph = stage_graph(run)
    assert len(graph.boxes) == len({stage.name for stage in run.stages} | {"base"})
    shown = {
        "settings": settings(run.config),
        "evals": eval_tables(run.evals, run.completions),
        "samples": side_by_side(run.completions) if run.completions else None,
        "timeline": None,
        "times": time_bars(run),
        "memory": memory_bars(run.calls),
        "config_lines": [],
    }
    contents(run, [], shown)
    texts = [headline(run.evals), status(run), *headline_facts(run)]
    assert all(isinstance(text, str) for text in texts)
    for stage in run.stages:
        charts(stage.series)
        stage_samples(stage.samples)
        samples_by_step(stage.samples, {})
    if run.calls:
        json.dumps(chrome_trace(run.calls), allow_nan=False)


def test_reading_a_run(feed: Feed, good: Files, tmp_path: Path) -> None:
    root = tmp_path / "run"

    def look(given: list[Edit]) -> None:
        write(root, good, given)
        looked_at(read_run(root))

    feed(look, edits(good), inputs=150)


def test_whole_reports(feed: Feed, good: Files, tmp_path: Path) -> None:
    root = tmp_path / "run"

    def report(given: list[Edit]) -> None:
        write(root, good, given)
        build_report(root)

    feed(report, edits(good), inputs=8)


def test_comparing_runs(feed: Feed, good: Files, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, good, [])

    def compare(given: list[Edit]) -> Comparison:
        write(two, good, given)
        return read_runs([one, two])

    feed(compare, edits(good), inputs=60)


def test_whole_comparisons(feed: Feed, good: Files, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, good, [])

    def compare(given: list[Edit]) -> None:
        write(two, good, given)
        write_page(read_runs([one, two]), tmp_path / "page.html")

    feed(compare, edits(good), inputs=6)


def number() -> st.SearchStrategy[Any]:
    """Numbers as a damaged or mad run may log them."""
    extremes = [
        0,
        1,
        -1,
        1e308,
        -1e308,
        1.7e308,
        5e-324,
        1e-300,
        2**63,
        10**18,
        10**400,
        float("inf"),
        1e16,
        0.1,
    ]
    return st.one_of(st.sampled_from(extremes), st.integers(), st.floats(), json_scalars())


KEYS = [
    "loss",
    "eval_loss",
    "time/generate",
    "time/step",
    "kl",
    "mismatch/k1",
    "learning_rate",
    "odd",
    "moe/dead_experts",
]


def test_drawing_curves(feed: Feed, tmp_path: Path) -> None:
    def draw(rows: list[dict[str, Any]]) -> None:
        for chart in charts(to_series(rows))[0]:
            draw_chart(chart, "a", tmp_path)

    row = st.dictionaries(st.sampled_from(["step", "step", *KEYS]), number(), max_size=4)
    mad: list[list[dict[str, Any]]] = [
        [{"loss": 1e308}],
        [{"loss": -1e308}, {"loss": 1e308}],
        [{"step": 1, "loss": 1e60}, {"step": 2, "loss": -1e60}],
        [{"step": 1e300, "loss": 1}, {"step": 2, "loss": 2}],
        [{"step": 10**15, "loss": 1}, {"step": 2, "loss": 2}],
        [{"step": at, "time/generate": 1e60, "time/step": 1e60} for at in (1, 2)],
    ]
    feed(draw, st.lists(row, min_size=1, max_size=6), inputs=40, examples=mad)


def test_drawing_heatmaps(feed: Feed, tmp_path: Path) -> None:
    table = st.lists(st.lists(number(), max_size=4), max_size=4)
    row = st.fixed_dictionaries(
        {},
        optional={
            "step": number(),
            "trainer": st.lists(number(), max_size=3),
            "agreement": st.lists(number(), max_size=3),
        },
    )

    def draw(given: tuple[Any, list[dict[str, Any]], Any]) -> None:
        load, rows, engines = given
        stage = StageView(
            "a", "grpo", "done", router_load=fair_share(load), routing=to_routing(rows, engines)
        )
        draw_heatmaps(stage, tmp_path)

    anything = st.one_of(table, table, values(json_scalars()))
    feed(draw, st.tuples(anything, st.lists(row, max_size=5), anything), inputs=40)


def test_drawing_the_timeline(feed: Feed, good: Files, tmp_path: Path) -> None:
    write(tmp_path / "run", good, [])
    run = read_run(tmp_path / "run")
    phases = st.sampled_from(["generate", "update", "sync", "load", "", "logprobs"])
    times = st.one_of(st.sampled_from([0.0, 1.0, 1.5, 2.0, 1e9]), number())
    row = st.fixed_dictionaries(
        {"start": times, "end": times},
        optional={"phase": phases, "step": number(), "peak_rss": number(), "method": json_scalars()},
    )

    def draw(lanes: dict[str, list[dict[str, Any]]]) -> None:
        run.calls = [call for lane, rows in lanes.items() for call in to_calls(lane, rows)]
        if run.calls:
            timeline(run, tmp_path)
            memory_bars(run.calls)
            json.dumps(chrome_trace(run.calls))

    lane = st.one_of(st.sampled_from(["policy-0", "rollout-1", "driver"]), st.text(max_size=5))
    empty = {"policy-0": [{"start": 0.0, "end": 0.0, "peak_rss": 0}]}
    endless = {"policy-0": [{"start": 0.0, "end": 0.0}, {"start": 0.0, "end": 1e308}]}
    feed(
        draw,
        st.dictionaries(lane, st.lists(row, max_size=6), max_size=3),
        inputs=40,
        examples=[empty, endless],
    )


def test_cards(feed: Feed) -> None:
    names = st.text(max_size=6)
    one = scalars()
    tables = st.dictionaries(names, st.one_of(one, st.lists(one, max_size=3)), max_size=3)

    def card(given: tuple[str, list[str], dict[str, Any], dict[str, Any]]) -> str:
        name, sources, settings_, metrics = given
        return adapter_card(
            CardFacts(
                name, "sft", name, datasets=sources, settings=settings_, lora=settings_, metrics=metrics
            )
        )

    feed(card, st.tuples(names, st.lists(names, max_size=3), tables, tables), inputs=100)


def resumed(root: Path) -> None:
    """What a run reads of its directory before it goes on."""
    directory = RunDirectory(root, "synthetic")
    with directory.opened():
        directory.record(error=None)


def test_going_on_in_a_directory(feed: Feed, good: Files, tmp_path: Path) -> None:
    root = tmp_path / "run"

    def go_on(given: list[Edit]) -> None:
        write(root, good, given)
        resumed(root)

    feed(go_on, edits(good), inputs=150)


WHO = Identity(
    identity_config({"learning_rate": 1e-4, "batch_size": 8}, {"base": "b"}), {"base": "abc"}, "data", 0
)
"""The work of a stage whose directory is looked at."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The directory of a stage that was stopped after it had saved twice, and an evaluation of it."""
    root = tmp_path_factory.mktemp("stage")
    for step in (5, 10):
        with new_directory(root / f"checkpoint-{step}", checkpoint_manifest(WHO, step)) as aside:
            (aside / "weights").write_text("w")
            (aside / WINDOW).write_text('[{"loss": 1.0}]')
    rows = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 11)]
    (root / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (root / "eval").mkdir()
    result = {"accuracy": 0.5, "n": 2, "ci95": [0.1, 0.9], "metric": "exact_match", "fingerprint": "key"}
    (root / "eval" / "sft.json").write_text(json.dumps({**result, "code": {}}))
    (root / "eval" / "sft.jsonl").write_text("{}\n")
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_going_on_with_a_stage(feed: Feed, stage: Files, tmp_path: Path) -> None:
    root = tmp_path / "sft"

    def go_on(given: list[Edit]) -> None:
        write(root, stage, given)
        decision = decide(root, WHO)
        assert decision.says
        if decision.checkpoint is not None:
            step = decision.manifest.step if decision.manifest else 0
            MetricsLog(
                root / "metrics.jsonl", resume_at=step or 0, every=1, checkpoint=decision.checkpoint
            ).close()
        result = finished(root / "eval", "sft", "key", {})
        if result is not None:
            results_table(Progress(), {"stages": {}, "eval": {"sft": result}}, ["sft"])

    feed(go_on, edits(stage, lively=()), inputs=200)
