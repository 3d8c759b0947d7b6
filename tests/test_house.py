"""The house's structure: the one-way rule between the floors, and no circles."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

FLOORS = ("actors", "pipeline")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    found = {}
    for floor in FLOORS:
        for path in (root / floor).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported_names(tree: ast.AST, *, top_level_only: bool) -> set[str]:
    """Names that a module imports; with `top_level_only`, not those inside functions or TYPE_CHECKING."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                names.add(child.module)
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (top_level_only and (inside or typing_only)):
                visit(child)

    visit(tree)
    return names


def test_actors_import_nothing_of_the_pipeline(repository: Path) -> None:
    offenders = [
        f"{name} imports {imported}"
        for name, path in modules(repository).items()
        if name.startswith("actors")
        for imported in imported_names(ast.parse(path.read_text()), top_level_only=False)
        if imported.split(".")[0] == "pipeline"
    ]
    assert not offenders


def test_no_modules_import_in_a_circle(repository: Path) -> None:
    known = modules(repository)
    graph = {
        name: {
            imported
            for imported in imported_names(ast.parse(path.read_text()), top_level_only=True)
            if imported in known and imported != name
        }
        for name, path in known.items()
    }
    # A package's __init__ may import its own modules; they never need the package object itself.
    for name, imports in graph.items():
        imports -= {package for package in imports if name.startswith(package + ".")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import in a circle: {' -> '.join(error.args[1])}")


def test_the_circle_check_sees_a_circle(tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "a.py").write_text("import actors.b\n")
    (tmp_path / "actors" / "b.py").write_text("from actors import a\n")
    with pytest.raises(pytest.fail.Exception, match="circle"):
        test_no_modules_import_in_a_circle(tmp_path)


def test_the_one_way_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "a.py").write_text("def f():\n    from pipeline import run\n")
    with pytest.raises(AssertionError):
        test_actors_import_nothing_of_the_pipeline(tmp_path)
