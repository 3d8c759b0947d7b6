"""Data files -> raw rows, each with the file and row that an error message will name.

json, jsonl and csv are read here rather than through `datasets`, which stops at the first row that it
can't parse and names neither the row nor all of them; parquet is read by pyarrow, as `datasets` does,
without a second copy in a cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError
from pipeline.data.bad_rows import NOT_JSON, NOT_UTF8, WRONG_TYPE, BadRow
from pipeline.data.splits import slice_bounds

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class Row(NamedTuple):
    """A raw row: `values` by column, or the reason why it could not be read."""

    file: str
    number: int
    values: dict[str, Any]
    problem: BadRow | None = None
    arrow: bool = False
    """Whether the row came from Arrow (parquet, `save_to_disk`, the hub), which gives all structs of a column
    the same keys: a null in one may be a key that the row never had."""


def suffix_of(path: Path) -> str:
    """Which of `SUFFIXES` a file has, compressed or not; empty: none."""
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def stem_of(path: Path) -> str:
    """A file's name without its suffixes."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return name[: len(name) - len(suffix_of(path))]


def read_file(file: Path) -> Iterator[Row]:
    """Rows of a file, by its suffix."""
    suffix = suffix_of(file)
    if suffix == ".csv":
        return _csv_rows(file)
    if suffix == ".parquet":
        return _parquet_rows(file)
    if suffix in (".json", ".jsonl"):
        return json_rows(file, "train", None)
    raise UserError(f"data source '{file}': not a {', '.join(SUFFIXES)} file")


def _read_bytes(file: Path) -> bytes:
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.name.endswith(".gz") else data
    except (OSError, EOFError) as error:
        raise UserError(f"data source '{file}': {error}") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def json_rows(file: Path, split: str, cap: int | None) -> Iterator[Row]:
    """Rows of json lines, or of a json file that is one list; `split` with its slice."""
    data = _read_bytes(file)
    if file.name.removesuffix(".gz").endswith(".json") and (rows := _json_array(file, data)) is not None:
        numbered = list(enumerate(rows, 1))
    else:
        numbered = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    first, end = slice_bounds(split, len(numbered))
    for number, item in numbered[first:end][:cap]:
        yield _json_row(str(file), number, item)


def _json_array(file: Path, data: bytes) -> list[Any] | None:
    """Rows of a json file that is one list, or an object with one under `data`; None for json lines."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        if data.lstrip()[:1] == b"[":
            raise UserError(f"data source '{file}': not UTF-8 at byte {error.start}") from error
        return None
    except ValueError as error:
        if data.lstrip()[:1] == b"[":
            raise UserError(f"data source '{file}': not valid JSON: {error}") from error
        return None
    if isinstance(value, list):
        return value
    for key in ("data", "rows", "examples", "instances") if isinstance(value, dict) else ():
        if isinstance(value.get(key), list):
            return value[key]
    return [value] if isinstance(value, dict) else None


def _json_row(file: str, number: int, item: Any) -> Row:
    if isinstance(item, bytes):
        try:
            item = json.loads(item.decode())
        except UnicodeDecodeError as error:
            return Row(file, number, {}, BadRow(file, number, NOT_UTF8, f"byte {error.start} of the row"))
        except ValueError as error:
            return Row(file, number, {}, BadRow(file, number, NOT_JSON, str(error)))
    if not isinstance(item, dict):
        return Row(
            file, number, {}, BadRow(file, number, WRONG_TYPE, f"{type(item).__name__}, not an object")
        )
    return Row(file, number, item)


def _csv_rows(file: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, refuses long documents
    text = _read_bytes(file).decode(errors="surrogateescape")
    try:
        for number, values in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
            yield _csv_row(str(file), number, values)
    except csv.Error as error:
        raise UserError(f"data source '{file}': not valid CSV: {error}") from error


def _csv_row(file: str, number: int, values: dict[str, Any]) -> Row:
    if None in values:
        return Row(file, number, {}, BadRow(file, number, WRONG_TYPE, "more fields than the header has"))
    if any("\udc80" <= c <= "\udcff" for v in values.values() if v and not v.isascii() for c in v):
        return Row(file, number, {}, BadRow(file, number, NOT_UTF8))
    return Row(file, number, {k: v for k, v in values.items() if v is not None})


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data source '{file}': not a readable parquet file: {error}") from error
    yield from arrow_rows(str(file), table)


def arrow_rows(file: str, table: Any) -> Iterator[Row]:
    """Rows of an Arrow table; `file` is what an error names."""
    try:
        yield from [Row(file, n, values, arrow=True) for n, values in enumerate(table.to_pylist(), 1)]
    except UnicodeDecodeError:
        for i in range(table.num_rows):
            try:
                yield Row(file, i + 1, table.slice(i, 1).to_pylist()[0], arrow=True)
            except UnicodeDecodeError:
                yield Row(file, i + 1, {}, BadRow(file, i + 1, NOT_UTF8))
