"""`make affected`: which tests a change reaches, on small trees and on this repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.affected import Imports, affected, changed_files, module_of, python_files

TREE = {
    "actors/__init__.py": "",
    "actors/low.py": "",
    "actors/worker.py": "",
    "actors/typed.py": "",
    "pipeline/__init__.py": "",
    "pipeline/__main__.py": "import pipeline.app\n",
    "pipeline/app.py": "def main():\n    from actors import low\n",
    "pipeline/page/__init__.py": "",
    "pipeline/page/build.py": '"""Not style.css of others."""\nSTYLE, SCRIPT = "style.css", "script.py"\n',
    "pipeline/page/style.css": "",
    "pipeline/page/script.py": "",
    "pipeline/text.py": 'from __future__ import annotations\nCODE = "actors.worker:Worker"\n',
    "tests/conftest.py": (
        "import pytest\n\n@pytest.fixture\ndef base():\n    from actors import worker\n\n"
        "@pytest.fixture\ndef other(base):\n    return base\n"
    ),
    "tests/helpers.py": 'COMMAND = ["python", "-m", "pipeline", "run"]\n',
    "tests/test_low.py": "from actors.low import x\n",
    "tests/test_fixture.py": "def test_a(other): ...\n",
    "tests/test_started.py": "from tests.helpers import COMMAND\n",
    "tests/test_page.py": "def test_a():\n    import pipeline.page.build\n",
    "tests/test_typed.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from actors.typed import x\n"
    ),
    "tests/test_named.py": "import pipeline.text\n",
    "tests/test_docs.py": 'PAGES = ("README.md", "docs/*.md", "configs")\n',
}


def reached(root: Path, *changed: str) -> list[str]:
    return [path.removeprefix("tests/test_").removesuffix(".py") for path in _affected(root, *changed)]


def _affected(root: Path, *changed: str) -> list[str]:
    return affected(Imports(root, {*python_files(root), *(c for c in changed if c.endswith(".py"))}), changed)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, text in TREE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("actors/low.py", ["low", "started"]),
        ("pipeline/app.py", ["started"]),
        ("actors/worker.py", ["fixture", "named"]),
        ("actors/typed.py", []),
        ("actors/gone.py", []),
        ("pipeline/page/style.css", ["page"]),
        ("pipeline/page/script.py", ["page"]),
        ("pipeline/style.css", []),
        ("docs/online.md", ["docs"]),
        ("configs/a.yaml", ["docs"]),
        ("README.md", ["docs"]),
        ("examples/README.md", []),
        ("tests/test_low.py", ["low"]),
        ("tests/helpers.py", ["started"]),
    ],
)
def test_a_change_reaches_the_tests_that_need_the_file(tree: Path, changed: str, expected: list[str]) -> None:
    assert reached(tree, changed) == expected


@pytest.mark.parametrize("changed", ["tests/conftest.py", "pyproject.toml", "requirements/cpu.txt"])
def test_what_every_test_needs_reaches_all_of_them(tree: Path, changed: str) -> None:
    assert len(reached(tree, changed)) == 7


def test_a_module_that_was_removed_reaches_the_tests_that_still_import_it(tree: Path) -> None:
    (tree / "actors/low.py").unlink()
    assert reached(tree, "actors/low.py") == ["low", "started"]


def test_changed_files_are_those_since_a_revision_and_new_ones_that_git_does_not_ignore(tree: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tree, check=True, capture_output=True)

    (tree / ".gitignore").write_text("runs/\n")
    git("init", "-b", "main")
    git("add", ".")
    git("commit", "-m", "all")
    assert changed_files(tree, None) == []
    git("checkout", "-b", "work")
    (tree / "actors/low.py").write_text("x = 1\n")
    git("commit", "-am", "committed on the branch")
    (tree / "actors/worker.py").unlink()
    (tree / "README.md").write_text("new")
    (tree / "runs").mkdir()
    (tree / "runs/a").write_text("ignored")
    assert changed_files(tree, None) == ["README.md", "actors/low.py", "actors/worker.py"]
    assert changed_files(tree, "HEAD") == ["README.md", "actors/worker.py"]


@pytest.fixture(scope="module")
def ours(repository: Path) -> Imports:
    return Imports(repository, python_files(repository))


def test_pages_and_configs_reach_the_test_of_pages_and_configs(ours: Imports) -> None:
    for path in ("README.md", "CONTRIBUTING.md", "docs/online.md", "configs/demo.yaml", "examples/gsm8k.py"):
        assert "tests/test_configs.py" in affected(ours, [path]), path


def test_every_module_is_reached_by_some_test(ours: Imports) -> None:
    tested = {name for test in ours.tests() for name in ours.reached_from(test)}
    code = {name for name in ours.paths if name.startswith(("actors.", "pipeline."))}
    packages = {name for name, path in ours.paths.items() if path.endswith("__init__.py")}
    unreached = code - packages - tested
    assert not unreached


def test_what_a_test_loads_when_it_runs_was_derived_from_its_imports(ours: Imports, repository: Path) -> None:
    """A real run of a file of tests, against the derivation: nothing is loaded that it does not know."""
    path = "tests/pipeline/artifacts/test_manifest.py"
    code = (
        "import sys, pytest; code = pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]);"
        "print('LOADED', *[m for m in sys.modules if m.split('.')[0] in ('actors', 'pipeline')]);"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=repository, capture_output=True, text=True, check=True
    )
    loaded = next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()[1:]
    assert len(loaded) > 3
    assert set(loaded) <= ours.reached_from(module_of(path))
