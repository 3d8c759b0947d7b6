"""Raw rows, as they were read, and the bytes of the files that they come from."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError
from pipeline.data.reading.bad_rows import NOT_UTF8, TOO_DEEP, BadRow
from pipeline.data.reading.unpacked import gzip_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

MAX_DEPTH = 100
"""Most levels of lists and objects in a row. Python's own JSON ends in a traceback at about 1,000, and no
training data are deeper than this."""

_UTF16, _UTF32 = (b"\xff\xfe", b"\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
"""Marks at the beginning of a file, little and big endian."""


class Row(NamedTuple):
    """A raw row: `values` by column, or the reason why it could not be read."""

    file: str
    number: int
    values: dict[str, Any]
    problem: BadRow | None = None
    arrow: bool = False
    """True for a row from Arrow (parquet, `save_to_disk`, the hub), which gives all structs of a column the
    same keys: a null in one may be a key that the row never had."""


def bad_row(file: str, number: int, reason: str, detail: str = "") -> Row:
    """A row that could not be read."""
    return Row(file, number, {}, BadRow(file, number, reason, detail))


def suffix_of(path: Path) -> str:
    """The one of `SUFFIXES` that a file has, compressed or not; empty: none."""
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def stem_of(path: Path) -> str:
    """A file's name without its suffixes."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return name[: len(name) - len(suffix_of(path))]


def describe_files(source: str, split: str, files: Sequence[str], most: int = 3) -> str:
    """The split of a source, and the first files of it, below the source where that is a directory."""
    names = [os.path.relpath(f, source) if Path(source) in Path(f).parents else f for f in files[:most]]
    if len(files) == 1 and names[0].startswith(source):  # the source itself, or its split: `org/name[train]`
        return f"split {split}"
    more = f" and {len(files) - most:,} more ({len(files):,} files)" if len(files) > most else ""
    return f"split {split}: {', '.join(names)}{more}"


def read_bytes(file: Path) -> bytes:
    """A text file as UTF-8 (which its rows may still break), unpacked and without a mark at its beginning.

    Raises:
        UserError: it can't be opened or unpacked, holds too much, or is of another encoding that can't be
            read.
    """
    try:
        data = gzip_bytes(file) if file.name.lower().endswith(".gz") else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data source '{file}': damaged, or not gzip: {error}") from error
    except OSError as error:
        raise UserError(f"data source '{file}': {error.strerror or error}") from error
    return _as_utf8(file, data).removeprefix(b"\xef\xbb\xbf")


def _as_utf8(file: Path, data: bytes) -> bytes:
    if data.startswith((*_UTF16, *_UTF32)):
        encoding = "UTF-32" if data.startswith(_UTF32) else "UTF-16"
        try:
            return data.decode(encoding).encode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"data source '{file}': {encoding} by its first bytes, but damaged at byte {error.start}; "
                "save it as UTF-8"
            ) from error
    if b"\0" in data[:2]:  # text that begins with a NUL is none
        raise UserError(
            f"data source '{file}': not UTF-8; it looks like UTF-16 without the mark for it. Save it as UTF-8"
        )
    return data


def problem_of(values: Any) -> tuple[str, str] | None:
    """Reason and detail of text that can't be encoded (half a surrogate pair), or of too many levels."""
    stack: list[tuple[Any, str, int]] = [(values, "", 0)]
    while stack:
        value, path, depth = stack.pop()
        if isinstance(value, str):
            if not value.isascii() and (at := _unencodable(value)) is not None:
                return NOT_UTF8, f"{path} at character {at}"
        elif isinstance(value, dict | list):
            if depth == MAX_DEPTH:
                return TOO_DEEP, f"more than {MAX_DEPTH} levels"
            if isinstance(value, dict):
                if any(not key.isascii() and _unencodable(key) is not None for key in value):
                    return NOT_UTF8, f"a key of {path or 'the row'}"
                items = [(v, f"{path}.{k}" if path else k, depth + 1) for k, v in value.items()]
            else:
                items = [(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
            stack += reversed(items)
    return None


def is_too_deep(values: Any) -> bool:
    """True for `values` of more than `MAX_DEPTH` levels."""
    level = [values]
    for _ in range(MAX_DEPTH):
        inside = (v.values() if isinstance(v, dict) else v for v in level)
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _unencodable(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
