"""The check of a GPU, tried on the CPU: every section gives its figures, and what goes wrong is told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import head
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.groups import Peer
from benchmarks.gpu.updates import deviations
from benchmarks.gpu_check import SECTIONS

FIGURES = {
    "ceilings": [{"copy_tb_per_s", "bf16_tflops", "to_host_gb_per_s"}],
    "groups": [{"sum"}, {"trainer", "engine"}, *[{"reason", "seconds", "works"}] * 2],
    "turns": [{"lender", "borrower"}, {"gb", "park_s", "wake_s", "share_that_stays", "different"}],
    "updates": [{"way", "sft", "dpo", "grpo"}] * 3,
    "experts": [{"base_s", "unmerged_s", "peft_s", "floor_s", "output_apart", "factors_apart"}] * 2,
    "attention": [{"row", "form", "seconds"}] * 2,
    "head": [{"block", "seconds", "floor_s", "mean_difference"}] * 3,
    "weights": [
        {"pack_s", "digest_s"},
        {"delta_s", "merge_s", "digests_s", "pack_s", "all_layers_s"},
        {"different"},
    ],
    "whole": [
        {"made_s", "trainable_parameters"},
        *[{"loss", "tokens_per_s", "share_of_rate", "seconds"}] * 6,
        {"side", "tokens_per_s"},
    ],
}
"""Section -> figures of each of its lines that has any of them, in order."""


@pytest.mark.ranks
def test_every_section_gives_its_figures_on_the_cpu(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "found" / "lines.jsonl"
    done = check(repository, "--device", "cpu", "--tiny", "--seconds", "9999", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    by_section = defaultdict(list)
    for line in map(json.loads, out.read_text().splitlines()):
        by_section[line["section"]].append(line)
    (end,) = by_section.pop("end")
    assert (end["failed"], end["left_out"]) == ([], [])
    machine = by_section["ceilings"].pop(0)
    assert {"device", "torch", "transformers", "peft"} <= set(machine)
    assert list(by_section) == list(SECTIONS)
    for section, expected in FIGURES.items():
        found = by_section[section]
        assert [names - set(line) for names, line in zip(expected, found, strict=True)] == [set()] * len(
            found
        )
    numbers = [x for lines in by_section.values() for line in lines for x in line.values()]
    assert all(math.isfinite(x) and x >= 0 for x in numbers if isinstance(x, int | float))
    ways = {line["way"] for line in by_section["updates"]}
    assert ways == {"float32", "float32_padded", "bfloat16"}


def test_without_a_card_it_says_so(repository: Path, tmp_path: Path) -> None:
    done = check(repository, "--out", str(tmp_path / "lines.jsonl"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def check(repository: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=repository, env={**os.environ, **env}, capture_output=True, text=True)


def test_a_section_that_fails_lets_the_next_one_run(tmp_path: Path) -> None:
    here = tried(tmp_path)
    here.run("first", raises)
    here.run("second", lambda at: at.tell(figure=1))
    assert here.failed == ["first"]
    assert lines(here) == [
        {"section": "first", "failed": "ValueError: the device is on fire"},
        {"section": "second", "figure": 1},
    ]


def test_a_case_that_fails_lets_the_next_one_run_and_fails_its_section_once(tmp_path: Path) -> None:
    def section(at: Check) -> None:
        for case in at.cases([1, 2, 3]):
            with at.case(case=case):
                if case < 3:
                    raises(at)
                at.tell(case=case, figure=1)

    here = tried(tmp_path)
    here.run("first", section)
    assert here.failed == ["first"]
    assert [set(line) - {"section", "case"} for line in lines(here)] == [{"failed"}, {"failed"}, {"figure"}]


def test_a_case_that_does_not_fit_is_a_finding(tmp_path: Path) -> None:
    def section(at: Check) -> None:
        with at.case(block=8):
            raise torch.OutOfMemoryError("80 GiB were asked for")

    here = tried(tmp_path)
    here.run("first", section)
    assert not here.failed
    assert lines(here) == [{"section": "first", "block": 8, "out_of_memory": True}]


def test_what_would_begin_too_late_is_left_out_and_named(tmp_path: Path) -> None:
    def section(at: Check) -> None:
        for case in at.cases(["a", "b", "c"]):
            at.tell(case=case)
            at.budget_s = 0.0

    here = tried(tmp_path)
    here.run("first", section)
    here.run("second", raises)
    assert not here.failed
    assert here.left_out == ["first: 2 cases", "second"]
    assert [line.get("case", line.get("cases")) for line in lines(here)] == ["a", ["b", "c"], None]


def test_figures_that_are_wrong_fail_their_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "FARTHEST", 0.0)
    here = tried(tmp_path)
    here.run("head", head.run)
    assert here.failed == ["head"]
    assert Deviation.__name__ in lines(here)[-1]["failed"]
    # What was measured is told all the same.
    assert len([line for line in lines(here) if "mean_difference" in line]) == 3


def test_kernels_are_counted_and_those_that_take_longest_are_named(tmp_path: Path) -> None:
    square = torch.randn(256, 256)
    found = tried(tmp_path).kernels(lambda: square @ square, most=1)
    assert found["calls"] >= 1
    assert [(name, calls) for name, calls, _ in found["longest"]] == [("aten::mm", 1)]


@pytest.mark.ranks
def test_a_process_that_says_nothing_is_ended_and_told(tmp_path: Path) -> None:
    peer = Peer("engine", tried(tmp_path))
    assert peer.answer(0.1) == {"hung": True}
    peer.end()


def test_a_deviation_is_a_share_of_what_is_right() -> None:
    right = {"sft": [(2.0, 4.0), (1.0, 1.0)], "grpo": [(0.0, 1.0)]}
    found = {"sft": [(2.0, 4.4), (1.05, 1.0)], "grpo": [(0.01, 1.0)]}
    assert deviations(found, right) == pytest.approx({"sft": 0.1, "grpo": 0.2})
    assert math.isnan(deviations({"sft": [(1.0, math.nan)]}, {"sft": [(1.0, 1.0)]})["sft"])


def tried(directory: Path) -> Check:
    return Check(torch.device("cpu"), True, directory / "lines.jsonl", budget_s=3600.0)


def raises(at: Check) -> None:
    raise ValueError("the device is on fire")


def lines(here: Check) -> list[dict[str, Any]]:
    """Without times."""
    found = [json.loads(line) for line in here.path.read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "at_s"} for line in found]
