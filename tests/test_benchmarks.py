"""Benchmarks start as modules, and import what is there; their figures are no matter of tests."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.rollout.remote import RolloutEngines
from actors.sync.remote import RemoteWeightSource
from actors.trainer.remote import ModelWorkers
from benchmarks import standins
from tests.actors.faces import RecordingGroup, calls_of
from tests.affected import python_files

SCRIPTS = ("benchmarks", "examples")


def test_programs_that_benchmarks_start_by_m_exist_and_none_changes_the_path(repository: Path) -> None:
    started = set()
    for path in sorted(repository.glob("benchmarks/*.py")):
        text = path.read_text()
        assert "sys.path" not in text, path.name
        started |= set(re.findall(r'"-m", "(benchmarks\.\w+)"', text))
    assert {"benchmarks.one", "benchmarks.grpo_trl", "benchmarks.online_run"} <= started
    assert not [name for name in started if not (repository / (name.replace(".", "/") + ".py")).is_file()]


def test_a_benchmark_runs_as_a_module(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.startup", "--help"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert "--against" in done.stdout


@pytest.mark.parametrize(
    ("face", "standin"),
    [
        (RolloutEngines, standins.Engine(1)),
        (RemoteWeightSource, standins.Trainer()),
        (ModelWorkers, standins.Trainer()),
    ],
)
def test_stand_ins_take_what_engines_and_trainers_are_sent(face: type, standin: object) -> None:
    taken = 0
    for name in calls_of(face):
        group = RecordingGroup()
        needed = list(inspect.signature(getattr(face, name)).parameters.values())[1:]
        getattr(face(group), name)(**{one.name: 0 for one in needed if one.name != "phase"})
        (sent,) = group.sent
        try:
            method = operator.attrgetter(sent.path)(standin)
        except AttributeError:
            continue  # No call of an online step.
        if not callable(method):
            continue
        inspect.signature(method).bind(*sent.args, **sent.kwargs)
        taken += 1
    assert taken > 2


@pytest.mark.parametrize("package", SCRIPTS)
def test_scripts_import_names_that_exist_also_inside_functions(repository: Path, package: str) -> None:
    """Renamed modules and classes are found without running a benchmark."""
    missing = [
        f"{path}: from {module} import {name}"
        for path in sorted(python_files(repository))
        if path.startswith(f"{package}/")
        for module, name in imported(repository / path)
        if module.split(".")[0] in ("actors", "pipeline", *SCRIPTS) and not has(repository, module, name)
    ]
    assert not missing


def imported(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from module import name`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in nodes if node.module for alias in node.names]


def has(root: Path, module: str, name: str) -> bool:
    """True if a module of the repository binds `name`, or is a package with a module of that name."""
    place = root / Path(*module.split("."))
    if (place / f"{name}.py").is_file() or (place / name / "__init__.py").is_file():
        return True
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.is_file() and re.search(rf"^(?!#).*\b{name}\b", file.read_text(), re.MULTILINE) is not None


def test_the_check_sees_a_name_and_a_module_that_are_gone(repository: Path) -> None:
    assert has(repository, "actors.rollout.pool", "RolloutPool")
    assert has(repository, "actors.cluster", "connection")
    assert not has(repository, "actors.rollout.pool", "RolloutPond")
    assert not has(repository, "actors.rollout.pond", "RolloutPool")
