"""Tests that a change can reach: derived from imports and from the files that tests name (`make affected`).

python -m tests.affected                  # run them: since main on a branch, since the last commit on main
python -m tests.affected --since HEAD~3   # since another revision
python -m tests.affected --fast           # without those that start Ray, vLLM, TRL or a second rank
python -m tests.affected --list           # only say which

A test is reached by
- every module that it imports, at any depth and also inside functions, that it names in a string
  ("pipeline.cli.app", code for another process), or starts by `-m`. Imports under TYPE_CHECKING don't count;
- the conftest.py files above it, and what those of their fixtures import that the test asks for;
- every file or directory whose path stands in the test ("docs/*.md", "assets"), and files that lie beside a
  module that it reaches and that names them ("style.css", a script).
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("actors", "benchmarks", "examples", "pipeline", "requirements", "tests")
EVERYTHING = ("pyproject.toml", "requirements/*.txt")
"""What every test depends on: versions of libraries, settings of pytest."""
ONE_PROCESS = "not slow and not ray and not vllm and not trl and not ranks"
SEVERAL = "(ray or vllm or trl or ranks) and not slow"

DOTTED = re.compile(r"\b[a-z_]\w*(?:\.\w+)+")


@dataclass
class Source:
    """What one Python file needs."""

    imports: set[str] = field(default_factory=set)
    """Dotted names as written: modules, or a module and a name in it."""
    strings: set[str] = field(default_factory=set)
    """Its string constants, docstrings left out."""
    arguments: set[str] = field(default_factory=set)
    """Names of its functions' arguments: fixtures, among others."""
    fixtures: dict[str, Source] = field(default_factory=dict)
    """In a conftest.py: what each function needs, apart from the rest of the file."""


def read_source(path: Path) -> Source:
    """What a Python file needs; of a conftest.py, its functions apart."""
    tree = ast.parse(path.read_text())
    if path.name != "conftest.py":
        return _read(tree)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    apart = [f for f in functions if not any("autouse" in ast.unparse(d) for d in f.decorator_list)]
    found = _read(ast.Module([node for node in tree.body if node not in apart], []))
    found.fixtures = {f.name: _read(ast.Module([f], [])) for f in apart}
    return found


def _read(tree: ast.Module) -> Source:
    """Imports, strings and arguments below a node."""
    found, started = Source(), set[str]()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.Import):
                found.imports.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.imports.update(f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.List | ast.Tuple):
                started.update(_started(child.elts))
            elif isinstance(child, ast.arg):
                found.arguments.add(child.arg)
            elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                found.strings.add(child.value)
                found.imports.update(DOTTED.findall(child.value))
            visit(child)

    visit(tree)
    found.imports |= started
    found.strings -= started  # no directories that are looked at
    return found


def _started(elements: list[ast.expr]) -> Iterator[str]:
    """Modules that a command line `[..., "-m", "pipeline", ...]` starts."""
    words = [element.value if isinstance(element, ast.Constant) else None for element in elements]
    for option, module in itertools.pairwise(words):
        if option == "-m" and isinstance(module, str):
            yield f"{module}.__main__"
            yield module


class Imports:
    """Which Python file of a checkout needs which other."""

    def __init__(self, root: Path, files: Iterable[str]) -> None:
        """`files`: paths below `root` of its Python files; those that are gone are known by name only."""
        self.paths = {module_of(path): path for path in files}
        self.sources = {
            name: read_source(root / path) if (root / path).is_file() else Source()
            for name, path in self.paths.items()
        }
        self.needs = {name: self._needs(name) for name in self.paths}

    def _needs(self, name: str) -> set[str]:
        found: set[str] = set()
        for imported in self.sources[name].imports | self._fixtures_imports(name):
            parts = imported.split(".")
            found.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
        package = name if self.paths[name].endswith("__init__.py") else name.rpartition(".")[0]
        scripts = {f"{package}.{text[:-3]}" for text in self.sources[name].strings if text.endswith(".py")}
        return ((found | scripts | set(conftests(name))) & set(self.paths)) - {name}

    def _fixtures_imports(self, name: str) -> set[str]:
        """What the fixtures import that the test `name` asks for, and those that these ask for."""
        fixtures = [self.sources[above].fixtures for above in conftests(name) if above in self.sources]
        if not name.startswith("tests."):
            return set()
        asked, imports = self.sources[name].arguments | self.sources[name].strings, set()
        known: set[str] = set()
        while new := asked - known:
            known |= new
            for source in (found[one] for found in fixtures for one in new if one in found):
                asked = asked | source.arguments
                imports |= source.imports
        return imports

    def tests(self) -> list[str]:
        """Modules of tests."""
        return sorted(name for name in self.paths if name.rpartition(".")[2].startswith("test_"))

    def reached_from(self, name: str) -> set[str]:
        """`name` and every module that it needs, at any depth."""
        seen, waiting = {name}, [name]
        while waiting:
            further = self.needs[waiting.pop()] - seen
            seen |= further
            waiting += further
        return seen


def module_of(path: str) -> str:
    """Dotted name of a Python file: `actors/sync/__init__.py` is `actors.sync`."""
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def conftests(name: str) -> list[str]:
    """Modules of the conftest.py files that pytest loads for the module of a test."""
    parents = name.split(".")[:-1]
    return [".".join([*parents[:n], "conftest"]) for n in range(1, len(parents) + 1)]


def names_file(strings: Iterable[str], path: str) -> bool:
    """True if one of `strings` is `path`, a pattern for it, or a directory that it lies in."""
    return any(
        text == path
        or path.startswith(text.rstrip("/") + "/")
        or ("*" in text and fnmatch.fnmatch(path, text))
        for text in strings
        if text.strip("/.* ")
    )


def affected(imports: Imports, changed: Iterable[str]) -> list[str]:
    """Paths of the test files that a change of the files `changed` can reach."""
    changed = list(changed)
    if any(fnmatch.fnmatch(path, pattern) for path in changed for pattern in EVERYTHING):
        return [imports.paths[test] for test in imports.tests()]
    modules = {module_of(path) for path in changed if path.endswith(".py")}
    for path in (PurePosixPath(path) for path in changed if not path.endswith(".py")):
        modules |= {
            n
            for n, s in imports.sources.items()
            if _beside(imports.paths[n], path) and path.name in s.strings
        }
    found = []
    for test in imports.tests():
        reached = imports.reached_from(test)
        named = {text for n in reached if n.startswith("tests.") for text in imports.sources[n].strings}
        if reached & modules or any(names_file(named, path) for path in changed):
            found.append(imports.paths[test])
    return found


def _beside(module: str, path: PurePosixPath) -> bool:
    """True if a file lies in the directory of a module."""
    return PurePosixPath(module).parent == path.parent


def python_files(root: Path) -> set[str]:
    """Paths below `root` of its Python files."""
    return {str(path.relative_to(root)) for name in PACKAGES for path in (root / name).rglob("*.py")}


def changed_files(root: Path, since: str | None) -> list[str]:
    """Paths that differ from the revision `since`, new files included."""
    since = since or _git(root, "merge-base", "HEAD", _main(root))[0]
    new = _git(root, "ls-files", "--others", "--exclude-standard")
    return sorted({*_git(root, "diff", "--name-only", "--no-renames", since, "--"), *new})


def _main(root: Path) -> str:
    """The branch that changes are for."""
    heads = _git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/remotes")
    return next((name for name in ("main", "origin/main") if name in heads), "HEAD")


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def main() -> int:
    """Say which tests are reached, and run them: first those of one process, then those of several."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--since", help="revision to compare with; default: where this branch left main")
    parser.add_argument("--list", action="store_true", help="print the files of tests and run nothing")
    parser.add_argument("--fast", action="store_true", help="only tests of one process: no Ray, no vLLM")
    args = parser.parse_args()
    changed = changed_files(ROOT, args.since)
    tests = affected(
        Imports(ROOT, {*python_files(ROOT), *(p for p in changed if p.endswith(".py"))}), changed
    )
    tests = [path for path in tests if (ROOT / path).is_file()]
    print(f"{len(changed)} files changed, {len(tests)} files of tests reached", file=sys.stderr)
    print("\n".join(tests))
    if args.list or not tests:
        return 0
    pytest = [sys.executable, "-m", "pytest", "-q"]
    parts = [["-n", "2", "--dist", "loadfile", "-m", ONE_PROCESS], ["-m", SEVERAL]][: 1 if args.fast else 2]
    codes = [subprocess.run([*pytest, *part, *tests], cwd=ROOT, check=False).returncode for part in parts]
    nothing_collected = 5
    return max(0 if code == nothing_collected else code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
