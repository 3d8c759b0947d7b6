"""The report of a run, whatever state the run is in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.report import build_report

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects ids, tags and text, and fails on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_whole_run_has_graph_charts_table_generations_config_and_versions(reported_run: Path) -> None:
    page = Page((reported_run / "report.html").read_text())
    for words in (
        "exact match: base 25",
        "Reward accuracy",
        "Expert load",
        "adapter, 1.33 MB",
        "✓ done · 48 s",
        "points (+",
        "better",
        "First training step after 18 s",
        "evaluation of dpo",
        "max_steps:",
        "transformers",
        "What is ",
    ):
        assert words in page.text, words
    assert len(page.ids) == len(set(page.ids)), "each id once, also across inline SVGs"
    listed = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', (reported_run / "report.html").read_text())
    titles = ["Stages", "Settings", "Evaluation", "sft", "dpo", "Generations", "Time", "Config and versions"]
    assert [title for _, title in listed] == titles
    assert {anchor for anchor, _ in listed} <= set(page.ids)
    assert page.text.index("Settings", page.text.index("Config and versions")) < page.text.index(
        "95 % interval"
    )
    names = {png.name for png in (reported_run / "plots").iterdir()}
    assert {"sft-loss.png", "dpo-reward-margin.png", "dpo-expert-load.png"} <= names
    assert (reported_run / "plots" / "sft-loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_from_outside(reported_run: Path) -> None:
    html = (reported_run / "report.html").read_text()
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(([^)]+)\)""", html)
    targets = [first or second for first, second in fetched]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets), targets


def test_what_a_model_wrote_is_shown_and_never_run(reported_run: Path) -> None:
    html = (reported_run / "report.html").read_text()
    assert "&lt;script&gt;alert(" in html
    assert "script" not in Page(html).tags


def test_odd_characters_of_a_byte_level_model_break_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"stages": {}, "eval": {}}')
    (tmp_path / "eval").mkdir()
    row = {"prompt": "p\u2028q", "completion": "one\u2028two\x85three \x00", "score": 1.0}
    lines = json.dumps(row, ensure_ascii=False) + '\n{"prompt": "r", "completion": "\\ud800", "score": 0}\n'
    (tmp_path / "eval" / "base.jsonl").write_text(lines, encoding="utf-8")
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert "2 of the 2 prompts" in page.text
    assert "two" in page.text


def test_a_run_that_failed_half_way_says_who_failed_and_what_to_do(failed_run: Path) -> None:
    with (failed_run / "dpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 44, "lo')
    page = Page(build_report(failed_run).read_text())
    assert "✗ failed" in page.text
    assert "policy-1 in phase 'update': no answer to update(43) in 120 s" in page.text
    assert "next: run the same command again" in page.text
    assert "dpo/metrics.jsonl: 1 unreadable line(s) left out" in page.text
    assert "Evaluation" not in page.text


def test_processes_that_were_replaced_stand_in_a_table(failed_run: Path) -> None:
    assert "Replaced processes" not in (text := Page(build_report(failed_run).read_text()).text), text
    lines = [
        '{"time": 1790000000.0, "stage": "dpo", "step": 43, "role": "policy", "rank": 1, '
        '"reason": "its process <died>", "place": "update 42 of dpo (call 99)", "seconds": 2.6}',
        '{"stage": 3, "step": "x"}',
        '{"time": 17',
    ]
    (failed_run / "replacements.jsonl").write_text("\n".join(lines))
    page = Page(build_report(failed_run).read_text())
    assert "replaced" in page.ids
    assert "dpo step 43policy-1its process <died>2.6 s" in page.text
    assert "replacements.jsonl: 1 unreadable line(s) left out" in page.text


def test_stages_and_metrics_that_nobody_foresaw_are_plotted(online_run: Path) -> None:
    page = Page(build_report(online_run).read_text())
    names = {png.name for png in (online_run / "plots").iterdir()}
    assert {"grpo-reward.png", "grpo-odd-length.png"} <= names
    assert "reward_model" in page.text
    assert "▶ running" in page.text
    assert "10 + 1 = ?" in page.text
    assert "step 10" in page.text


def test_an_online_run_shows_what_it_learnt_who_waited_and_what_it_wrote(rlhf_run: Path) -> None:
    page = Page(build_report(rlhf_run).read_text())
    for words in (
        "exact match: base 33.0 % → sft 64.0 % → dpo 90.0 % → ppo 97.0 %",
        "93.0 % of pairs",
        "Reward models, on held-out pairs",
        "Rewards by source",
        "KL to the reference",
        "Clipped tokens",
        "Response length",
        "Engine against trainer",
        "Seconds of a sync",
        "passes on adapter, 1.33 MB",
        "step 1 · mean reward",
        "2 of 3 prompts",
        "waited while these worked",
        "from the first weight sync to the last",
        "log-probabilities, values, scores",
        "Route agreement: share of the engines' choices",
        "The most resident memory that each process has had",
        "rollout-1",
    ):
        assert words in page.text, words
    assert "<b>can't say</b>" in page.text, "text of a model, not markup"
    assert len(page.ids) == len(set(page.ids))
    names = {png.name for png in (rlhf_run / "plots").iterdir()}
    assert {"timeline.png", "timeline-steps.png", "ppo-seconds-of-a-sync.png", "ppo-reward.png"} <= names
    heatmaps = {"expert-load-trainer", "expert-load-engines", "busiest-expert", "route-agreement"}
    assert {f"ppo-{name}.png" for name in heatmaps} <= names
    events = json.loads((rlhf_run / "trace.json").read_text())["traceEvents"]
    assert {"policy", "rollout"} == {e["args"]["name"] for e in events if e["name"] == "process_name"}


def test_single_answers_stand_in_one_table_with_their_rewards(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"stages": {"ppo": {"state": "running"}}}')
    (tmp_path / "ppo").mkdir()
    rows = [{"step": 1, "prompt": "1+1", "completion": "2", "answer": "2", "reward": 0.5}]
    rows.append({"step": 2, "prompt": "<i>", "completion": "", "reward": float("nan")})
    (tmp_path / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ppo" / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.25}\n{"step": 2, "reward": 0.75}'
    )
    text = Page(build_report(tmp_path).read_text()).text
    for words in (
        "step 1 · mean reward 0.25",
        "step 2 · mean reward 0.75",
        "expected",
        "1+1",
        "<i>",
        "empty",
    ):
        assert words in text, words


def test_a_run_without_traces_has_no_timeline(reported_run: Path) -> None:
    assert "Timeline" not in Page((reported_run / "report.html").read_text()).text
    assert not (reported_run / "trace.json").exists()


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "new", "stages": {"sft": {"state": "running"}}}')
    page = Page(build_report(tmp_path).read_text())
    assert "new" in page.text
    assert "▶ running" in page.text


@pytest.mark.parametrize(
    "figures", [{}, {"sft": {"accuracy": 0.5}}, {"sft": {"mean_reward": -3.2, "n": 9}}, None]
)
def test_evaluations_without_intervals_or_of_other_metrics_are_shown(tmp_path: Path, figures: object) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"stages": {"sft": {"state": "done"}}, "eval": figures}))
    text = Page(build_report(tmp_path).read_text()).text
    assert ("Evaluation" in text) == bool(figures)


def test_a_directory_that_is_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        build_report(tmp_path)
    for content in (b"{", b'"\xff"', b"[" * 100_000, b"[]"):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(UserError, match=r"run\.json: .*Remove it and run the config again"):
            build_report(tmp_path)


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = (
        "import sys, pipeline.report; print([m for m in ('matplotlib', 'torch', 'ray') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
