"""Structure of the two packages: which room may import which, no circles, one name for one class, what loads
without the heavy libraries.

All imports count, also those inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGES = ("actors", "pipeline")
QUESTIONS = ("what", "whether", "how", "which", "who", "where", "when", "why")
HEAVY = ("torch", "ray", "vllm", "transformers", "datasets", "trl", "matplotlib")

ROOMS: dict[str, tuple[str, ...]] = {
    "actors.errors": (),
    "actors.spec": (),
    "actors.variables": (),
    "actors.batches": ("actors.errors", "actors.spec"),
    "actors.algorithms": ("actors.errors", "actors.spec", "actors.batches"),
    "actors.cluster": ("actors.errors", "actors.spec", "actors.variables", "actors.batches"),
    "actors.models.spec": ("actors.spec",),
    "actors.models.attention": ("actors.errors", "actors.batches", "actors.models.parallel"),
    "actors.models.tiny": ("actors.errors",),
    "actors.models.files": ("actors.errors",),
    "actors.models.tensor_file": (),
    "actors.models.exact_sums": (),
    "actors.models.freed_memory": (),
    "actors.models.shards": ("actors.models.files", "actors.models.tensor_file"),
    "actors.models.template_bounds": ("actors.errors",),
    "actors.models.turn_ends": (
        "actors.errors",
        "actors.models.template_bounds",
        "actors.batches",
        "actors.models.spec",
        "actors.models.base",
    ),
    "actors.models.threads": (),
    "actors.models.parallel": ("actors.errors", "actors.models.files", "actors.models.freed_memory"),
    "actors.models.architectures": ("actors.errors", "actors.models.spec"),
    "actors.models.moe": (
        "actors.errors",
        "actors.models.spec",
        "actors.models.architectures",
        "actors.models.parallel",
        "actors.models.threads",
    ),
    "actors.models.quantization": (
        "actors.errors",
        "actors.models.spec",
        "actors.models.freed_memory",
        "actors.models.exact_sums",
        "actors.models.architectures",
    ),
    "actors.models.base": (
        "actors.errors",
        "actors.models.quantization",
        "actors.models.tensor_file",
        "actors.models.spec",
        "actors.models.architectures",
        "actors.models.parallel",
        "actors.models.moe",
    ),
    "actors.models.lora": (
        "actors.errors",
        "actors.models.exact_sums",
        "actors.models.quantization",
        "actors.models.spec",
        "actors.models.files",
        "actors.models.shards",
        "actors.models.turn_ends",
        "actors.models.architectures",
        "actors.models.parallel",
        "actors.models.moe",
        "actors.models.base",
    ),
    "actors.models.sizes": (
        "actors.models.spec",
        "actors.models.architectures",
        "actors.models.quantization",
    ),
    "actors.models.speed": ("actors.models.sizes",),
    "actors.models.facts": ("actors.errors", "actors.models"),
    "actors.models.twin": ("actors.errors", "actors.models"),
    "actors.sync": (
        "actors.errors",
        "actors.spec",
        "actors.variables",
        "actors.batches",
        "actors.cluster",
        "actors.models",
    ),
    "actors.trainer": (
        "actors.errors",
        "actors.spec",
        "actors.batches",
        "actors.algorithms",
        "actors.cluster",
        "actors.models",
        "actors.sync",
    ),
    "actors.rollout.vllm": (
        "actors.errors",
        "actors.variables",
        "actors.batches",
        "actors.models",
        "actors.sync",
        "actors.rollout.spec",
    ),
    "actors.rollout": (
        "actors.errors",
        "actors.spec",
        "actors.batches",
        "actors.cluster",
        "actors.models",
        "actors.sync",
    ),
}
"""Room -> rooms that it may import besides itself. A module belongs to the longest name above it."""

LOW = ("pipeline.artifacts", "pipeline.data", "pipeline.monitoring")
BELOW_PLANNING = (
    "actors",
    *LOW,
    "pipeline.report",
    "pipeline.rewards",
    "pipeline.environments",
    "pipeline.evaluation",
    "pipeline.stages",
    "pipeline.roles",
    "pipeline.config",
)
ROOMS |= {
    "pipeline.artifacts": ("actors",),
    "pipeline.monitoring.phases": (),
    "pipeline.monitoring": ("actors", "pipeline.monitoring.phases"),
    "pipeline.data": ("actors", "pipeline.artifacts", "pipeline.monitoring.phases"),
    "pipeline.report": ("actors", "pipeline.monitoring"),
    "pipeline.rewards": ("actors", "pipeline.data", "pipeline.monitoring"),
    "pipeline.environments": ("actors", "pipeline.data", "pipeline.monitoring", "pipeline.rewards"),
    "pipeline.evaluation": ("actors", *LOW, "pipeline.rewards", "pipeline.environments"),
    "pipeline.stages": ("actors", *LOW, "pipeline.rewards", "pipeline.environments"),
    "pipeline.roles": ("actors", "pipeline.stages.specs"),
    "pipeline.config": (
        "actors",
        "pipeline.data.spec",
        "pipeline.evaluation.spec",
        "pipeline.monitoring.spec",
        "pipeline.rewards",
        "pipeline.stages.specs",
        "pipeline.roles",
    ),
    "pipeline.planning": BELOW_PLANNING,
    "pipeline.jobs": ("actors", "pipeline", "pipeline.artifacts", "pipeline.config", "pipeline.data"),
    "pipeline.execution": (*BELOW_PLANNING, "pipeline.planning", "pipeline.jobs"),
    "pipeline.api": ("actors", "pipeline"),
    "pipeline.cli": ("actors", "pipeline"),
    "pipeline.__main__": ("pipeline.cli",),
}

TORCH_IN = (
    "actors.algorithms.chunked_logprob",
    "actors.algorithms.logprob",
    "actors.algorithms.preference",
    "actors.models.attention",
    "actors.models.threads",
    "actors.models.architectures",
    "actors.models.base",
    "actors.models.exact_sums",
    "actors.models.lora",
    "actors.models.moe",
    "actors.models.parallel",
    "actors.models.quantization",
    "actors.models.twin",
    "actors.rollout.vllm",
    "actors.rollout.slot_updater",
    "actors.rollout.weight_updater",
    "actors.models.shards",
    "actors.models.tensor_file",
    "actors.sync.channel",
    "actors.sync.outlets",
    "actors.sync.digest_kernel",
    "actors.sync.digests",
    "actors.sync.payload",
    "actors.sync.shared_memory",
    "actors.sync.transport",
    "actors.trainer",
)
"""Modules and rooms that may load a heavy library when they are imported. All others are light, but for what
they import inside functions."""

LIGHT_OF_THESE = (
    "actors.models.architectures.lookup",
    "actors.models.architectures.row",
    "actors.models.architectures.table",
    "actors.models.architectures.tensor_parallel_sizes",
    "actors.models.architectures.vllm_table",
    "actors.models.base.loading",
    "actors.models.base.resolving",
    "actors.models.lora.heads",
    "actors.rollout.vllm.settings",
    "actors.rollout.vllm.workarounds.registry",
    "actors.trainer.spec",
)
"""In these rooms, what the driver uses all the same."""

TAKEN_FROM_ACTORS = 27
"""Modules of `actors` that `pipeline` imports. Only ever lower this."""


class Import(NamedTuple):
    """One name that a module imports."""

    module: str
    target: str
    """A module of ours, or the dotted name as it is written."""
    name: str


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> Iterator[Import]:
    """Every import of every module, wherever in the file it stands."""
    known = modules(root)
    for module, path in known.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                yield from (Import(module, alias.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{path}:{node.lineno}: a relative import"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield Import(module, full if full in known else node.module, alias.name)


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Syntax tree of a file, which most tests here walk through."""
    return ast.parse(path.read_text())


def under(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(name: str) -> str | None:
    """The room that a module belongs to; None: to none."""
    return max((room for room in ROOMS if under(name, room)), key=len, default=None)


def breaches(root: Path) -> list[str]:
    """Imports that the table does not allow, and modules without a room."""
    found = [
        f"{name} lies in no room"
        for name, path in modules(root).items()
        if room_of(name) is None and name not in PACKAGES and path.name != "__init__.py"
    ]
    for module, target, name in imports(root):
        room = room_of(module)
        if room is None or target.split(".")[0] not in PACKAGES or under(target, room):
            continue
        if not any(under(target, allowed) for allowed in ROOMS[room]):
            found.append(f"{room} may not import {room_of(target)}: {module} -> {target}: {name}")
    return sorted(found)


def circle(root: Path) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    known = modules(root)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for module, target, _ in imports(root):
        # A package's __init__ may import its own modules; they never need the package object itself.
        if target in known and target != module and not module.startswith(f"{target}."):
            graph[module].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def defined_twice(root: Path) -> dict[str, list[str]]:
    """Class names that a package has more than once, with the modules."""
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, path in modules(root).items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                where[module.split(".")[0], node.name].append(module)
    return {name: places for (_, name), places in where.items() if len(places) > 1}


def importers(root: Path, library: str) -> set[str]:
    """Modules that import `library` or something in it."""
    return {module for module, target, _ in imports(root) if under(target, library)}


def test_rooms_import_only_what_the_table_allows(repository: Path) -> None:
    assert breaches(repository) == []


def test_no_modules_import_in_a_circle(repository: Path) -> None:
    assert circle(repository) == []


def test_no_two_classes_of_a_package_share_a_name(repository: Path) -> None:
    assert defined_twice(repository) == {}


def test_vllm_is_imported_by_the_rollout_room_alone(repository: Path) -> None:
    assert {m for m in importers(repository, "vllm") if not under(m, "actors.rollout")} == set()


def test_private_parts_of_ray_are_used_by_the_cluster_room_alone(repository: Path) -> None:
    assert {m for m in importers(repository, "ray._private") if not under(m, "actors.cluster")} == set()


def test_the_fast_start_is_used_through_its_package_alone_and_by_two_modules(repository: Path) -> None:
    room = "actors.cluster.fast_start"
    used = {(m, target) for m, target, _ in imports(repository) if under(target, room) and not under(m, room)}
    assert used == {("actors.cluster.connection", room), ("pipeline.execution.fleet", room)}


def test_what_pipeline_takes_from_actors_does_not_grow(repository: Path) -> None:
    taken = {
        target
        for module, target, _ in imports(repository)
        if under(module, "pipeline") and target.startswith("actors.")
    }
    assert len(taken) <= TAKEN_FROM_ACTORS, sorted(taken)


def test_all_but_the_rooms_of_torch_load_without_heavy_libraries(repository: Path) -> None:
    light = [
        name
        for name in sorted(modules(repository))
        if name != "pipeline.__main__" and (name in LIGHT_OF_THESE or not _may_be_heavy(name))
    ]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [library for library in {HEAVY} if library in sys.modules]\n"
        "    if heavy: sys.exit(f'{name} loads {heavy}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *light], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _may_be_heavy(name: str) -> bool:
    """A package's own `__init__` is empty: what lies in it counts."""
    return any(name.startswith(f"{place}.") or name == place for place in TORCH_IN)


def vague(root: Path) -> list[str]:
    """Modules and public definitions whose docstring begins with a question, not with what they are."""
    found = []
    for module, path in modules(root).items():
        tree = parsed(path)
        for node in ast.walk(tree):
            named = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            text = ast.get_docstring(node) if node is tree or named else None  # type: ignore[arg-type]
            if text and text.split()[0].strip(",:").lower() in QUESTIONS:
                found.append(f"{module}: {text.splitlines()[0]}")
    return found


def test_docstrings_begin_with_what_the_thing_is_or_does(repository: Path, tmp_path: Path) -> None:
    assert vague(repository) == []
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "a.py").write_text('"""What a host can be told."""\n')
    assert vague(tmp_path) == ["actors.a: What a host can be told."]


def test_the_table_names_rooms_that_exist(repository: Path) -> None:
    known = modules(repository)
    named = {*ROOMS, *TORCH_IN, *LIGHT_OF_THESE, *(room for allowed in ROOMS.values() for room in allowed)}
    assert {name for name in named if name not in known} == set()


@pytest.mark.parametrize(
    "line",
    ["from pipeline import run", "def f():\n    import pipeline.cli", "from actors.trainer.spec import A"],
)
def test_the_table_is_held_wherever_an_import_stands(tmp_path: Path, line: str) -> None:
    (tmp_path / "actors" / "rollout").mkdir(parents=True)
    (tmp_path / "actors" / "rollout" / "pool.py").write_text(f"{line}\n")
    (found,) = breaches(tmp_path)
    assert found.startswith("actors.rollout may not import ")


def test_a_module_outside_the_rooms_is_found(tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "extra.py").write_text("")
    assert breaches(tmp_path) == ["actors.extra lies in no room"]


@pytest.mark.parametrize(
    "back",
    ["from actors import a", "def f():\n    import actors.a", "if TYPE_CHECKING:\n    import actors.a"],
)
def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path, back: str) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "a.py").write_text("import actors.b\n")
    (tmp_path / "actors" / "b.py").write_text(f"{back}\n")
    assert set(circle(tmp_path)) == {"actors.a", "actors.b"}


def test_a_class_name_that_stands_twice_is_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "actors").mkdir(exist_ok=True)
        (tmp_path / "actors" / f"{name}.py").write_text("class Same: ...\n")
    assert set(defined_twice(tmp_path)["Same"]) == {"actors.a", "actors.b"}
