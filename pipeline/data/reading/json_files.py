"""Reads rows of json and json lines files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from actors.errors import UserError
from pipeline.data.reading.bad_rows import NOT_JSON, NOT_UTF8, TOO_DEEP, WRONG_TYPE
from pipeline.data.reading.raw_rows import (
    MAX_DEPTH,
    Row,
    bad_row,
    is_too_deep,
    problem_of,
    read_bytes,
    suffix_of,
)
from pipeline.data.spec import slice_bounds

_LIST_KEYS = ("data", "rows", "examples", "instances")

_COMMA = re.compile(r"\s*,\s*")


def json_rows(file: Path, split: str, cap: int | None) -> Iterator[Row]:
    """Rows of json lines, or of a file that is one list; `split` with its slice.

    Raises:
        UserError: the file can't be read, or is one list that isn't valid JSON.
    """
    data = read_bytes(file)
    values = _one_value(file, data)
    if values is None:
        lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        first, end = slice_bounds(split, len(lines))
        for number, line in lines[first:end][:cap]:
            yield _row_of_line(str(file), number, line)
        return
    first, end = slice_bounds(split, len(values))
    doubtful = _has_half_pairs(data) or not _is_utf8(data)
    for number, item in islice(enumerate(values[first:end], first + 1), cap):
        yield _checked(str(file), number, item, doubtful or (isinstance(item, dict) and is_too_deep(item)))


def _one_value(file: Path, data: bytes) -> list[Any] | None:
    """Rows of a file that is one list, or an object with one under `data`; None for json lines.

    Bytes that are not UTF-8 come as surrogates: the row that has them is named later.
    """
    start = data[:1000].lstrip()[:1]
    if suffix_of(file) == ".jsonl" and start != b"[":
        return None
    text = data.decode(errors="surrogateescape")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if start not in (b"[", b"{") or _are_lines(data):
            return None
        row = f" at row {_valid_rows(text) + 1} of its list" if start == b"[" else ""
        said = error if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(f"data source '{file}': {NOT_JSON}{row}: {said}") from error
    if isinstance(value, list):
        return value if suffix_of(file) == ".json" or any(isinstance(v, dict) for v in value) else None
    for key in _LIST_KEYS if isinstance(value, dict) else ():
        if isinstance(value.get(key), list):
            return value[key]
    return [value] if isinstance(value, dict) else None


def _are_lines(data: bytes) -> bool:
    """True where the first line is JSON by itself, or another of the first ones is an object."""
    lines = (line for line in data[: 1 << 24].split(b"\n") if line.strip())
    for number, line in enumerate(islice(lines, 10)):
        try:
            if isinstance(json.loads(line), dict) or number == 0:
                return True
        except (ValueError, RecursionError):
            continue
    return False


def _valid_rows(text: str) -> int:
    """Elements of a damaged list before the first that can't be read."""
    decoder, at, count = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        at += len(text[at : at + 4096]) - len(text[at : at + 4096].lstrip())
        try:
            _, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return count
        comma = _COMMA.match(text, at)
        if comma is None:
            return count
        count, at = count + 1, comma.end()


def _row_of_line(file: str, number: int, line: bytes) -> Row:
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return bad_row(file, number, NOT_UTF8, f"byte {error.start} of the row")
    except RecursionError:
        return bad_row(file, number, TOO_DEEP, f"more than {MAX_DEPTH} levels")
    except ValueError as error:
        return bad_row(file, number, NOT_JSON, str(error))
    deep = line.count(b"[") + line.count(b"{") > MAX_DEPTH
    return _checked(file, number, item, deep or _has_half_pairs(line))


def _checked(file: str, number: int, item: Any, doubtful: bool) -> Row:
    if not isinstance(item, dict):
        return bad_row(file, number, WRONG_TYPE, f"{type(item).__name__}, not an object")
    problem = problem_of(item) if doubtful else None
    return bad_row(file, number, *problem) if problem else Row(file, number, item)


def _has_half_pairs(data: bytes) -> bool:
    """True where half a surrogate pair is possible: a quick test, as checking all values is slow."""
    return b"\\u" in data and (b"\\ud" in data or b"\\uD" in data)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
