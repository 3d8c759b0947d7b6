"""The command `raylign`: starts `pipeline.cli.app`, or says which other package of its name hides it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("actors", "pipeline")
EXIT_USER = 2


def main() -> int:
    """The command line's exit code; 2 where another package would be imported in place of Raylign's."""
    if problems := [problem for name in PACKAGES if (problem := hidden(name))]:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        return EXIT_USER
    from pipeline.cli.app import main as command_line

    return command_line()


def hidden(name: str) -> str | None:
    """What hides Raylign's package `name` on Python's path, and what to do about it; None: nothing does."""
    found = importlib.util.find_spec(name)
    places = [] if found is None else [found.origin or "", *(found.submodule_search_locations or [])]
    own = Path(__file__).resolve().parent / name
    if any(place and own in (Path(place).resolve(), *Path(place).resolve().parents) for place in places):
        return None
    where = next((place for place in places if place), "nowhere")
    return (
        f"Python finds `{name}` at {where}, not at {own}: another package hides Raylign's of the same name. "
        "Rename it, or take its directory off PYTHONPATH (python -c 'import sys; print(sys.path)' shows all)"
    )


if __name__ == "__main__":
    sys.exit(main())
