"""Contents of a submitted job, and refusals before a cluster is asked."""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.config.load import load_config
from pipeline.jobs.shipment import EXCLUDES, Shipment, plan_shipment, stop_command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config that may be shipped."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    text = "name: a\noutput_dir: /mnt/runs/a\nmodel: {base: org/base}\nstages: {sft: {data: rows.jsonl}}\n"
    (root / "run.yaml").write_text(text)
    monkeypatch.chdir(root)
    return root


def plan(root: Path, *overrides: str, path: str = "run.yaml") -> Shipment:
    return plan_shipment(load_config(root / path, overrides), root / path, overrides, ["--fresh"], root)


def test_the_job_runs_the_same_command_from_the_package(project: Path) -> None:
    shipment = plan(project, "stages.sft.data.columns={prompt: the question}")
    words = shlex.split(shipment.entrypoint("/some/python"))
    assert words[:5] == ["/some/python", "-m", "pipeline", "run", "run.yaml"]
    assert words[5:] == ["stages.sft.data.columns={prompt: the question}", "ray.address=auto", "--fresh"]
    assert shipment.metadata == {"raylign_run": "a", "raylign_output_dir": "/mnt/runs/a"}
    assert shipment.runtime_env["working_dir"] == str(project)


def test_results_and_environments_stay_here(project: Path) -> None:
    excludes = plan(project).runtime_env["excludes"]
    assert tuple(excludes) == EXCLUDES
    assert {"/runs/", "/.venv/", ".git/"} <= set(excludes)


def test_this_package_is_shipped_where_the_directory_lacks_it(project: Path, repository: Path) -> None:
    assert [Path(p).name for p in plan(project).runtime_env["py_modules"]] == ["pipeline", "actors"]
    (project / "pipeline").mkdir()
    (project / "actors").mkdir()
    for name in ("pipeline", "actors"):
        (project / name / "__init__.py").touch()
    assert "py_modules" not in plan(project).runtime_env


@pytest.mark.parametrize("name", ["pipeline", "actors.py"])
def test_a_package_of_the_users_that_would_hide_ours_in_the_job_is_refused(project: Path, name: str) -> None:
    place = project / name
    place.write_text("") if place.suffix else place.mkdir()
    with pytest.raises(UserError, match=f"{name}: hides Raylign's package `{place.stem}` from the job"):
        plan(project)


def test_the_embedded_base_of_a_checkout_is_shipped_with_the_checkout_only(
    project: Path, repository: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.base: the embedded base lies in .* which is not shipped"):
        plan(project, "model.base=builtin:tiny-moe")
    config = repository / "configs" / "demo.yaml"
    loaded = load_config(config, ["output_dir=/mnt/runs/a"])
    assert plan_shipment(loaded, config, [], [], repository).arguments[:2] == ["run", "configs/demo.yaml"]


def test_a_relative_output_directory_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match="output_dir: runs/a is relative"):
        plan(project, "output_dir=runs/a")


def test_inputs_that_the_package_will_not_hold_are_refused_together(project: Path) -> None:
    (project / "runs" / "base").mkdir(parents=True)
    (project.parent / "elsewhere.jsonl").write_text("{}\n")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    (project / ".gitignore").write_text("secret.jsonl\n")
    (project / "secret.jsonl").write_text("{}\n")
    stages = "stages={sft: {data: [../elsewhere.jsonl, secret.jsonl]}}"
    with pytest.raises(UserError) as caught:
        plan(project, "model.base=runs/base", stages)
    problems = caught.value.problems
    assert len(problems) == 3
    assert "model.base: runs/base is not shipped" in problems[0]
    assert "lies outside" in problems[1]
    assert ".gitignore" in problems[2]


def test_a_config_elsewhere_is_refused(project: Path) -> None:
    outside = project.parent / "run.yaml"
    outside.write_text((project / "run.yaml").read_text())
    with pytest.raises(UserError, match="lies outside"):
        plan_shipment(load_config(outside), outside, [], [], project)


def test_a_stop_request_is_repeated_but_never_makes_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "a run"
    asking = subprocess.Popen(["sh", "-c", stop_command(str(directory), 60, every=0.2)])
    try:
        time.sleep(0.3)
        assert not directory.exists()
        directory.mkdir()
        for _ in range(2):
            deadline = time.monotonic() + 10
            while not (directory / "STOP").exists():
                assert time.monotonic() < deadline, "not asked again"
                time.sleep(0.02)
            (directory / "STOP").unlink()
    finally:
        asking.kill()
        asking.wait()
