"""Names in the working directory that hide other modules from a user's functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifacts.hiding import hidden, hiding_problems


def test_only_names_that_python_would_take_for_other_modules_are_found(tmp_path: Path) -> None:
    for name in (
        "random.py",
        "mine.py",
        "torch.py",
        "raylign.py",
        "types.pyc",
        "with-dash.py",
        "csv",
        "ray.txt",
    ):
        (tmp_path / name).touch()
    for name in ("yaml", "json", "tests", "numpy"):
        (tmp_path / name).mkdir()
    for name in ("yaml", "tests"):
        (tmp_path / name / "__init__.py").touch()
    found = [(name, whose) for name, _, whose in hidden(tmp_path)]
    assert found == [
        ("random", "Python's own module"),
        ("raylign", "Raylign's"),
        ("torch", "the installed package"),
        ("types", "Python's own module"),
        ("yaml", "the installed package"),
    ]


def test_a_package_that_raylign_does_not_need_may_be_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site-packages" / "helpers").mkdir(parents=True)
    (tmp_path / "site-packages" / "helpers" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "helpers.py").touch()
    assert hidden(tmp_path / "work") == []


def test_a_checkout_does_not_hide_itself(repository: Path) -> None:
    assert hidden(repository) == []


def test_without_a_function_nothing_is_looked_for_there(tmp_path: Path) -> None:
    (tmp_path / "random.py").touch()
    assert hiding_problems({}, tmp_path) == []
    (problem,) = hiding_problems({"eval.metric": "mine:score"}, tmp_path)
    assert problem.startswith(f"{tmp_path / 'random.py'}: hides Python's own module `random` from mine:score")
