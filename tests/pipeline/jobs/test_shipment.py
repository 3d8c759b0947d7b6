"""Contents of a submitted job, and refusals before a cluster is asked."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.config.load import load_config
from pipeline.jobs.shipment import Shipment, plan_shipment, stop_command


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


def test_the_job_runs_the_same_command_from_the_package_and_nothing_of_the_users_is_on_its_path(
    project: Path,
) -> None:
    shipment = plan(project, "stages.sft.data.columns={prompt: the question}")
    entry, _, command = shipment.entrypoint("/some/python").partition("; exec ")
    assert entry.startswith("cd shipped-files && p=/some/python; ")
    words = shlex.split(command)
    assert words[:6] == ["$p", "-P", "-m", "pipeline", "run", "run.yaml"]
    assert words[6:] == ["stages.sft.data.columns={prompt: the question}", "ray.address=auto", "--fresh"]
    assert shipment.metadata == {"raylign_run": "a", "raylign_output_dir": "/mnt/runs/a"}
    archive = project.parent / "job.zip"
    shipment.package.write(archive)
    assert shipment.runtime_env(archive, {})["working_dir"] == str(archive)
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(archive).namelist()}
    assert tops == {"actors", "pipeline", "shipped-files"}
    assert not any(top.isidentifier() for top in tops - {"actors", "pipeline"})


@pytest.mark.parametrize("chosen", ["python", "chosen python", "/nowhere/python"])
def test_a_python_that_is_not_there_gives_way_to_that_of_the_path(project: Path, chosen: str) -> None:
    (project / "shipped-files").mkdir()
    for name in ("python", "chosen python"):
        (project / name).write_text(f'#!/bin/sh\necho {name}: "$PWD" "$@"; exit 3\n')
        (project / name).chmod(0o755)
    python = str(project / chosen) if chosen == "chosen python" else chosen
    done = subprocess.run(
        plan(project, "seed=1").entrypoint(python),
        shell=True,
        cwd=project,
        env={**os.environ, "PATH": f"{project}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    taken = chosen if chosen == "chosen python" else "python"
    place = project / "shipped-files"
    told = f"{taken}: {place} -P -m pipeline run run.yaml seed=1 ray.address=auto --fresh\n"
    assert (done.returncode, done.stdout) == (3, told)


def test_raylign_is_shipped_as_it_is_here_whatever_the_directory_holds(
    project: Path, repository: Path
) -> None:
    for name in ("pipeline", "actors"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text("theirs = True")
    package = plan(project).package
    assert package.own["actors/__init__.py"] == repository / "actors" / "__init__.py"
    assert any(name.endswith((".html", ".css")) for name in package.own), "data of packages come along"
    assert package.files["pipeline/__init__.py"] == project / "pipeline" / "__init__.py"
    assert not any("__pycache__" in name for name in package.own)


@pytest.mark.parametrize("name", ["pipeline", "actors.py", "random.py", "torch", "yaml.py"])
def test_a_module_of_the_users_that_would_hide_another_from_a_function_is_refused(
    project: Path, name: str
) -> None:
    place = project / name
    place.touch() if place.suffix else place.mkdir()
    if not place.suffix:
        (place / "__init__.py").touch()
    (project / "mine.py").write_text("def score(completions, **columns):\n    return [0.0]\n")
    assert f"shipped-files/{name}" in {
        f"shipped-files/{top.partition('/')[0]}" for top in plan(project).package.files
    }
    with pytest.raises(UserError, match=rf"{name}: hides .* `{place.stem}` from mine:score \(eval\.metric\)"):
        plan(project, "eval={data: rows.jsonl, metric: 'mine:score'}")


def test_the_embedded_base_comes_along_where_the_run_takes_it(project: Path, repository: Path) -> None:
    taken = plan(project, "model.base=builtin:tiny-moe").package
    assert taken.own["assets/tiny-moe/config.json"] == repository / "assets" / "tiny-moe" / "config.json"
    assert not any(name.startswith("assets") for name in plan(project).package.own)
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


def test_every_kind_of_input_that_a_job_would_miss_is_refused_with_its_key(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("lib")
    (elsewhere / "far.py").write_text("def score(completions, **columns):\n    return [0.0]\n")
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    monkeypatch.syspath_prepend(elsewhere)
    (project / ".rayignore").write_text("hidden*\n/data/b.jsonl\n")
    (project / "hidden.py").write_text("")
    (project / "near.py").write_text("import hidden\ndef score(completions, **columns):\n    return [0.0]\n")
    (project / "runs" / "rm" / "adapter").mkdir(parents=True)
    (project / "runs" / "rm" / "adapter" / "adapter_config.json").write_text("{}")
    (project / "data").mkdir()
    for name in ("a", "b"):
        (project / "data" / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    grpo = "{type: grpo, data: rows.jsonl, rewards: ['near:score', 'runs/rm/adapter', 'far:score']}"
    with pytest.raises(UserError) as caught:
        plan(
            project,
            f"stages={{sft: {{data: 'data/*.jsonl', eval_data: ~/held-out.jsonl}}, grpo: {grpo}}}",
            "eval={data: nowhere.jsonl, metric: 'near:score'}",
        )
    told = "\n".join(caught.value.problems)
    for line in (
        "stages.sft.data: data/b.jsonl is not shipped, because .gitignore, .rayignore",
        "stages.sft.eval_data: ~/held-out.jsonl is in this user's home here",
        "stages.grpo.rewards.0 (hidden): ",
        "stages.grpo.rewards.1: runs/rm/adapter (runs/rm/adapter/adapter_config.json) is not",
        f"stages.grpo.rewards.2: far:score needs the module far at {elsewhere / 'far.py'}, which",
        "eval.data: data source 'nowhere.jsonl': no such file",
        "eval.metric (hidden): ",
    ):
        assert line in told
    assert len(caught.value.problems) == 7


def test_what_is_fine_is_shipped(project: Path) -> None:
    (project / "rewards").mkdir()
    for name in ("__init__", "length"):
        (project / "rewards" / f"{name}.py").write_text(
            "def score(completions, **columns):\n    return [0.0]\n"
        )
    (project / "models" / "rm").mkdir(parents=True)
    (project / "models" / "rm" / "adapter_config.json").write_text('{"base_model_name_or_path": "models"}')
    grpo = "{type: grpo, data: rows.jsonl, rewards: ['rewards.length:score', models/rm, /mnt/rm]}"
    files = plan(project, f"stages={{grpo: {grpo}}}").package.files
    assert {"rewards/length.py", "models/rm/adapter_config.json", "rows.jsonl", "run.yaml"} <= set(files)


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
