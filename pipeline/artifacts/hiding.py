"""Modules of the user's that would be imported in place of Python's, of Raylign's or of a package's it needs.

Reward functions and metrics are looked for in the working directory first, as in `python -m`. A `random.py`
there then answers every `import random` of theirs, and of what they import: at best an odd error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

from pipeline.artifacts.user_code import INSTALLED, OWN

RAYLIGNS = ("actors", "pipeline", "raylign")


def hiding_problems(functions: Mapping[str, str], working_dir: Path) -> list[str]:
    """Problems of files in `working_dir` that hide other modules; none where no function is looked for there.

    Args:
        functions: `module:function` by the key that names it.
    """
    if not functions:
        return []
    key, source = next(iter(functions.items()))
    return [
        f"{place}: hides {whose} `{name}` from {source} ({key}), for which Python looks in the working "
        "directory first; rename it, or run from another directory"
        for name, place, whose in hidden(working_dir)
    ]


def hidden(working_dir: Path) -> list[tuple[str, Path, str]]:
    """(module, the file or folder that hides it, whose it is) of everything in `working_dir` that does."""
    found = []
    for place in sorted(working_dir.iterdir()):
        name = _module(place)
        whose = _whose(name, working_dir) if name else None
        if name and whose:
            found.append((name, place, whose))
    return found


def _module(place: Path) -> str | None:
    """Name under which a file or folder can be imported; None: under none."""
    suffix = next((end for end in (".py", ".pyc", *EXTENSION_SUFFIXES) if place.name.endswith(end)), "")
    name = place.name.removesuffix(suffix)
    if not name.isidentifier() or (not suffix and not (place / "__init__.py").is_file()):
        return None
    return name if suffix == "" or place.is_file() else None


def _whose(name: str, working_dir: Path) -> str | None:
    """Whose module `name` is elsewhere; None: nobody's."""
    if name in sys.stdlib_module_names:
        return "Python's own module"
    if name in RAYLIGNS:
        return None if working_dir.resolve() == OWN else "Raylign's"
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != working_dir.resolve()]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is None or spec.origin is None or not any(part in INSTALLED for part in Path(spec.origin).parts):
        return None
    return "the installed package" if _needed(name) else None


def _needed(name: str) -> bool:
    """True where Raylign needs a package of that name, directly or not. Others may well be hidden: many
    packages leave a `tests` or `examples` beside themselves."""
    from importlib import metadata

    from packaging.requirements import Requirement

    waiting, needed = ["raylign"], set[str]()
    while waiting:
        distribution = waiting.pop()
        try:
            lines = metadata.requires(distribution) or []
        except metadata.PackageNotFoundError:
            continue
        for required in (Requirement(line).name for line in lines):
            known = required.lower().replace("_", "-")
            if known not in needed:
                needed.add(known)
                waiting.append(required)
    owners = metadata.packages_distributions().get(name, [])
    return any(owner.lower().replace("_", "-") in needed for owner in owners)
