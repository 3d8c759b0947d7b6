"""Reads files and values that may be damaged: returns what can be read, and None or a note for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_file(path: Path, errors: str = "strict") -> str:
    """Text of a regular file: reading a pipe would wait for ever.

    Raises:
        OSError: there is none, or it can't be read.
        UnicodeDecodeError: it is not UTF-8, where `errors` is strict.
    """
    if not path.is_file() and path.exists():
        raise OSError(f"{path.name} is no file")
    return path.read_text(encoding="utf-8", errors=errors)


def read_jsonl(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; lines that can't be read are counted in a note."""
    try:
        # Not splitlines: a completion may hold U+2028, which does not end a JSON line.
        lines = read_file(path, "replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.parent.name}/{path.name} can't be read: {error}")
        return []
    rows, bad = [], 0
    for line in lines:
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    if bad:
        notes.append(f"{path.parent.name}/{path.name}: {bad} unreadable line(s) left out")
    return rows


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON file that holds a mapping; empty when there is none, with a note when it can't be read."""
    try:
        return as_mapping(json.loads(read_file(path)))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.parent.name}/{path.name} can't be read: {error}")
        return {}


def as_mapping(value: Any) -> dict[str, Any]:
    """A mapping as a dict; empty for anything else."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the values."""
    return {str(key): number for key, value in values.items() if (number := as_number(value)) is not None}


def as_number(value: Any) -> float | None:
    """A finite number as a float; None for anything else (NaN and booleans too)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # A whole number beyond 1.8e308.
        return None


def as_count(value: Any) -> int | None:
    """A whole number that is not negative; None for anything else."""
    number = as_number(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None
