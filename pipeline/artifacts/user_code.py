"""Digests of a user's functions: of the module that is named, and of modules of the user's that it imports.

A function's name says nothing about what it computes, so the source belongs to the identity of a result.
Files are read and nothing is imported: importing has side effects, and may be done in another process.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from pipeline.artifacts.manifest import fingerprint

INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages; versions of those that matter are in a manifest already."""
OWN = Path(__file__).resolve().parents[2]
OURS = (OWN / "actors", OWN / "pipeline", OWN / "raylign.py")
PYTHONS = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))


@dataclass(frozen=True)
class Code:
    """Files that a function's result can come from."""

    files: dict[str, Path]
    """By module: the one that is named, and all of the user's that it imports, directly or not."""

    @property
    def digest(self) -> str:
        """Changes with any of the files; not with the folder that they lie in."""
        return fingerprint({name: _bytes_digest(path) for name, path in self.files.items()})


def code_digest(source: str) -> str | None:
    """Digest of the code of `module:function`; None where its module has no file that can be read."""
    try:
        code = code_of(source)
        return code.digest if code is not None else None
    except OSError:
        return None


def code_digests(sources: Iterable[str]) -> dict[str, str]:
    """Digests by source, without those whose code can't be read."""
    found = {source: code_digest(source) for source in sources}
    return {source: digest for source, digest in found.items() if digest is not None}


def file_digests(paths: Iterable[str]) -> dict[str, str]:
    """Digests of other files of the user's that a result depends on, by path, without those that can't be
    read."""
    return {path: _bytes_digest(Path(path)) for path in paths if Path(path).is_file()}


def unread_code(who: str, source: str) -> str:
    """Line that tells the user about a function whose code can't be read."""
    return f"{who}: no file of code was found for {source}, so later changes of it will not be noticed"


def code_of(source: str) -> Code | None:
    """Files behind `module:function`; None where its module can't be found or has none.

    Of an installed package only modules in the named module's own folder are taken: the whole of a large
    library would make a stage run again with each of its releases.
    """
    importlib.invalidate_caches()
    module = source.partition(":")[0]
    root = _file_of(module)
    if root is None:
        return None
    beside = root.parent if _installed(root) and root.parent.name not in INSTALLED else None
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if name in files or path is None:
            continue
        if name != module and not (_users(path) or (beside and path.is_relative_to(beside))):
            continue
        files[name] = path
        waiting += _imported(name, path)
        waiting += [name.rpartition(".")[0]] if "." in name else []
    return Code(files)


def _users(path: Path) -> bool:
    """True for a file that is neither Python's, nor installed, nor Raylign's."""
    return not _installed(path) and not any(path.is_relative_to(place) for place in (*PYTHONS, *OURS))


def _installed(path: Path) -> bool:
    return any(part in INSTALLED for part in path.parts)


def _file_of(module: str) -> Path | None:
    """The file that importing a module would run; None for builtin ones, folders without an `__init__`, and
    what can't be found."""
    if module == "__main__":
        started = getattr(sys.modules["__main__"], "__file__", None)
        return Path(started).resolve() if started and Path(started).is_file() else None
    folders: list[str] | None = None
    file: str | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        located = _located(".".join(parts[:end]), folders)
        if located is None:
            return None
        file, folders = located
    return Path(file).resolve() if file is not None and Path(file).is_file() else None


def _located(name: str, folders: list[str] | None) -> tuple[str | None, list[str]] | None:
    """A module's file and the folders of its submodules, as the import system finds them but without
    importing the packages above it.

    Args:
        folders: of the package above; None: of a module without one.
    """
    top = [os.getcwd(), *sys.path]  # The user's functions are looked for in the working directory too.
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, top if folders is None and finder is PathFinder else folders)
        except Exception:  # other packages' finders may fail in any way at a name that is not theirs
            continue
        if spec is not None:
            return spec.origin if spec.has_location else None, list(spec.submodule_search_locations or [])
    # A folder without an `__init__` below another: to find it, Python needs the one above imported.
    below = [os.path.join(folder, name.rpartition(".")[2]) for folder in folders or []]
    found = [folder for folder in below if os.path.isdir(folder)]
    return (None, found) if found else None


def _imported(module: str, path: Path) -> Iterator[str]:
    """Names that may be modules, wherever in the file they are imported; nothing of a file that is no Python
    source."""
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)
            if base:
                yield base
        elif isinstance(node, ast.Call) and _imports_by_name(node):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names, dots in front resolved."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _imports_by_name(call: ast.Call) -> bool:
    """True for `import_module("name")` and `__import__("name")`."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name in ("import_module", "__import__") and bool(call.args)


def _bytes_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
