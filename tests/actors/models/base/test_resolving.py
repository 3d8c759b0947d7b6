"""Names of bases: paths and those of a hub, what is missing of a path, earlier names of the embedded one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from actors.models.base import resolving
from actors.models.base.resolving import follow_adapter, is_path, no_such_directory, resolve_base
from actors.models.spec import EMBEDDED_BASE, ModelSpec, locate_embedded_base


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside the repository, in which asking a hub is a failure."""

    def asked(*_: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolving, "_read_config", asked)
    (tmp_path / "models" / "one").mkdir(parents=True)
    return tmp_path


def test_a_name_is_a_path_by_its_form_or_because_its_beginning_exists(elsewhere: Path) -> None:
    for name in (
        "./a",
        "/a/b",
        "~/a",
        "a",
        "a/b/c",
        "models/two",
        "assets/tiny-moe",
        "runs/a",
        "a/b.safetensors",
    ):
        assert is_path(name), name
    for name in ("org/name", "Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0125"):
        assert not is_path(name), name


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("models/two", "directory 'models/two' does not exist; 'models' is there, without 'two'"),
        ("models/one/x/y", "directory 'models/one/x/y' does not exist; 'models/one' is there, without 'x'"),
        ("a" * 300, f"directory '{'a' * 300}' does not exist"),
        ("runs/a/sft/adapter", "directory 'runs/a/sft/adapter' does not exist"),
        (
            "assets/tiny-moe",
            "directory 'assets/tiny-moe' does not exist here; the embedded base is builtin:tiny-moe",
        ),
    ],
)
def test_a_missing_directory_is_told_and_looked_up_nowhere(elsewhere: Path, base: str, said: str) -> None:
    assert resolve_base(ModelSpec(base=base)).problems == [f"model.base: {said}"]
    assert no_such_directory(base) == said


def test_an_adapter_on_a_base_that_is_not_here_says_so(elsewhere: Path) -> None:
    write_adapter(elsewhere / "adapter", "models/two")
    (problem,) = follow_adapter("adapter")[2]
    assert "the base of adapter 'adapter' is not here: directory 'models/two' does not exist" in problem


def test_an_adapter_that_was_trained_in_a_checkout_finds_the_embedded_base_anywhere(elsewhere: Path) -> None:
    write_adapter(elsewhere / "adapter", "assets/tiny-moe")
    assert follow_adapter("adapter") == (locate_embedded_base(), "adapter", [])
    shutil.copytree(locate_embedded_base(), elsewhere / "assets" / "tiny-moe")
    assert follow_adapter("adapter") == ("assets/tiny-moe", "adapter", [])


def test_the_embedded_base_is_had_by_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = resolve_base(ModelSpec(base=EMBEDDED_BASE))
    assert not found.problems
    assert Path(found.base_path).is_absolute()


def write_adapter(path: Path, base: str) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
