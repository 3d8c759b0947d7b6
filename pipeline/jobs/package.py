"""The package of a job: Raylign's own code, and beside it the user's files, as Ray would take them.

All of it is one archive that Ray unpacks on every node and puts on Python's path there. Its top holds nothing
but Raylign's packages; the user's files lie in a folder whose name no import can have. So a `random.py` or a
`pipeline/` of the user's own is shipped, and imported by nobody in place of another module of that name.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.cluster import SHIPPED, TRIED, private
from actors.errors import UserError

EXCLUDES = (
    "/runs/",
    "/.venv/",
    "/venv/",
    ".git/",
    "__pycache__/",
    "*.pyc",
    ".pytest_cache/",
    ".mypy_cache/",
    ".ruff_cache/",
    "*.egg-info/",
)
"""Left out of the package, as are the patterns of .gitignore and .rayignore files: results, environments,
history."""
OWN = ("actors", "pipeline")
"""Raylign's packages."""
LARGEST = 5
"""Files that are named where there is too much."""
MIB = 2**20
_PACKAGING, _CONSTANTS = "ray._private.runtime_env.packaging", "ray._private.ray_constants"
_LIMITS = {
    (_CONSTANTS, "DASHBOARD_CLIENT_MAX_SIZE"): 100 * MIB,
    (_PACKAGING, "GCS_STORAGE_MAX_SIZE"): 512 * MIB,
}
"""Bytes that Ray's job server takes in one request, and its store in one value; those of Ray 2.60 where
another release names them otherwise."""
PER_FILE = 128
"""Bytes that an archive needs for one file, beside twice its name."""

Rule = Callable[[Path], bool]


@dataclass(frozen=True)
class Package:
    """Files of a package, which is written when it is sent."""

    root: Path
    """The working directory."""
    files: dict[str, Path]
    """By the name relative to the working directory."""
    own: dict[str, Path]
    """Raylign's, by the name at the package's top."""
    sizes: dict[str, int]
    """Bytes of each of `files`."""

    @property
    def bytes(self) -> int:
        """Size of the archive, in which nothing is compressed."""
        own = sum(path.stat().st_size for path in self.own.values())
        names = [*self.own, *(f"{SHIPPED}/{name}" for name in self.files)]
        return own + sum(self.sizes.values()) + sum(PER_FILE + 2 * len(name.encode()) for name in names)

    def lacks(self, path: Path) -> list[Path]:
        """Files that `path` is or holds and that are not in the package; itself where it lies outside."""
        root, place = self.root.resolve(), Path(os.path.abspath(path))
        if not place.is_relative_to(root):
            place = path.resolve()
        if not place.is_relative_to(root):
            return [path]
        inside = [Path(folder) / name for folder, _, names in os.walk(place) for name in names]
        return [file for file in sorted(inside) or [place] if str(file.relative_to(root)) not in self.files]

    def problems(self) -> list[str]:
        """The refusal of a package that Ray would not take; with its largest files and what to do."""
        most, rest = limit(), self.bytes
        too_much: list[str] = []
        for name in sorted(self.sizes, key=lambda name: -self.sizes[name]):
            if rest <= most or len(too_much) == LARGEST:
                break
            too_much.append(name)
            rest -= self.sizes[name]
        if not too_much:
            return []
        listed = ", ".join(f"{name} ({megabytes(self.sizes[name])})" for name in too_much)
        ignore = " ".join(dict.fromkeys(f"/{name.rpartition('/')[0] or name}" for name in too_much))
        return [
            f"{self.root}: {megabytes(self.bytes)} in {len(self.files)} files would be shipped, and Ray "
            f"takes {megabytes(most)}. The largest: {listed}. Name what the job doesn't read in .gitignore "
            f"or .rayignore (e.g. {ignore}); put what it does read where every node sees it, and give the "
            "absolute path"
        ]

    def write(self, archive: Path) -> None:
        """Write the archive.

        Raises:
            UserError: files that can't be read, or whose names an archive can't hold.
        """
        problems = []
        with zipfile.ZipFile(archive, "w", strict_timestamps=False) as packed:
            for name, path in self.own.items():
                packed.write(path, name)
            packed.mkdir(SHIPPED)
            for name, path in self.files.items():
                try:
                    packed.write(path, f"{SHIPPED}/{name}")
                except OSError as error:
                    problems.append(f"{path}: can't be shipped ({error.strerror or error}); {IGNORE}")
        if problems:
            raise UserError(problems)


IGNORE = "name it in .rayignore if the job doesn't read it"


def collect(working_dir: Path, own_assets: Sequence[Path] = ()) -> Package:
    """The package that would be shipped from `working_dir`; reads no file's content.

    Args:
        own_assets: directories beside Raylign's packages that come along.

    Raises:
        UserError: a link that leads round, or a name that an archive can't hold.
    """
    files: dict[str, Path] = {}
    problems: list[str] = []
    _travel(working_dir, "", [_rules(working_dir, [*_rays_excludes(), *EXCLUDES])], (), files, problems)
    if problems:
        raise UserError(problems)
    return Package(
        working_dir, files, _own_files(own_assets), {n: p.stat().st_size for n, p in files.items()}
    )


def limit() -> int:
    """Bytes that a package may have: the least of what its way to the nodes takes."""
    found = [private(*name) for name in _LIMITS]
    return min(int(value) if value else default for value, default in zip(found, _LIMITS.values()))


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / MIB:.1f} MiB"


def _travel(
    folder: Path,
    inside: str,
    rules: list[Rule],
    above: tuple[Path, ...],
    files: dict[str, Path],
    problems: list[str],
) -> None:
    """Put the files of `folder` into `files`, links followed, as Ray's packaging goes."""
    real = folder.resolve()
    if real in above:
        problems.append(f"{folder}: a link that leads back to {real}, which holds it; {IGNORE}")
        return
    here = [*rules, *_ignore_files(folder)]
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        problems.append(f"{folder}: can't be shipped ({error.strerror or error}); {IGNORE}")
        return
    for entry in entries:
        if any(rule(entry) for rule in here):
            continue
        name = f"{inside}{entry.name}"
        if entry.is_dir() and next(entry.iterdir(), None) is None:
            files[name] = entry  # Ray takes empty directories along
        elif entry.is_dir():
            _travel(entry, f"{name}/", here, (*above, real), files, problems)
        elif entry.is_file():
            if "\\" in name or not _is_text(name):
                problems.append(f"{str(entry)!r}: Ray can't ship a file of this name; rename it, or {IGNORE}")
            else:
                files[name] = entry


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _own_files(assets: Sequence[Path]) -> dict[str, Path]:
    import actors
    import pipeline

    own: dict[str, Path] = {}
    for package in (actors, pipeline):
        place = Path(str(package.__file__)).parent
        own.update(_under(place, place.name))
    for directory in assets:
        own.update(_under(directory, f"{directory.parent.name}/{directory.name}"))
    return own


def _under(directory: Path, name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{name}/{path.relative_to(directory).as_posix()}", path


def _rays_excludes() -> list[str]:
    ask = private(_CONSTANTS, "get_runtime_env_default_excludes")
    return list(ask()) if ask is not None else []


def _rules(folder: Path, patterns: Sequence[str]) -> Rule:
    rule: Rule = _rays("_get_excludes")(folder, list(patterns))
    return rule


def _ignore_files(folder: Path) -> list[Rule]:
    """The rules of a folder's .gitignore, unless Ray is told to leave them, and of its .rayignore."""
    if not any((folder / name).is_file() for name in (".gitignore", ".rayignore")):
        return []
    with_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    ask = _rays("get_excludes_from_ignore_files")
    try:
        rules: list[Rule] = ask(folder, include_gitignore=with_git, logger=_quiet())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: .gitignore or .rayignore can't be read ({error})") from None
    return rules


def _quiet() -> Any:
    import logging

    log = logging.getLogger("raylign.package")
    log.setLevel(logging.ERROR)
    return log


def _rays(name: str) -> Any:
    """A function of Ray's packaging.

    Raises:
        UserError: this Ray has none of that name: what it ignores can't be told, and might be secret.
    """
    found = private(_PACKAGING, name)
    if found is None:
        import ray

        raise UserError(
            f"submit: Ray {ray.__version__} has no {_PACKAGING}.{name}, which Ray {TRIED} has, so what it "
            f"would ship can't be told; install ray=={TRIED}.*"
        )
    return found
