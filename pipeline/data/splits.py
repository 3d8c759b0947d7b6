"""Splits with slices, as `datasets` writes them: `train`, `train[:100]`, `test[10%:20%]`."""

from __future__ import annotations

import re

_SPLIT = re.compile(r"^(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?$")


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Name, start and stop of a split; start and stop are row numbers or percentages, as text.

    Raises ValueError on anything else, sums of splits (`train+test`) included: list both as sources.
    """
    match = _SPLIT.match(split.strip())
    if match is None:
        raise ValueError(f"split {split!r} is not of the form train, train[:1000] or test[10%:20%]")
    return match["name"], match["start"], match["stop"]


def slice_bounds(split: str, n_rows: int) -> tuple[int, int]:
    """First row and end row (exclusive) that `split` takes of `n_rows` rows."""
    _, start, stop = parse_split(split)
    first, end, _ = slice(_to_row(start, n_rows), _to_row(stop, n_rows)).indices(n_rows)
    return first, max(first, end)


def _to_row(bound: str | None, n_rows: int) -> int | None:
    if bound is None:
        return None
    if bound.endswith("%"):
        # datasets rounds percentages to the closest row ("closest" is its default).
        return round(int(bound[:-1]) * n_rows / 100)
    return int(bound)
