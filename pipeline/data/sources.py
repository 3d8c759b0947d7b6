"""Sources -> raw rows, each with the file and row that an error message will name.

json, jsonl and csv are read here rather than through `datasets`, which stops at the first row that it
can't parse and names neither the row nor all of them; parquet is read by pyarrow, as `datasets` does,
without a second copy in a cache. Hub data sets and `save_to_disk` directories go through `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError
from pipeline.data.bad_rows import NOT_JSON, NOT_UTF8, WRONG_TYPE, BadRow
from pipeline.data.spec import DataSpec
from pipeline.data.splits import parse_split, slice_bounds

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


class Row(NamedTuple):
    """A raw row: `values` by column, or the reason why it could not be read."""

    file: str
    number: int
    values: dict[str, Any]
    problem: BadRow | None = None


def read_rows(spec: DataSpec, *, seed: int, max_rows: int | None = None) -> list[Row]:
    """All rows of one source after split, slice and cap. UserError when the source can't be read."""
    cap = min((n for n in (spec.max_rows, max_rows) if n is not None), default=None)
    if spec.source.startswith("builtin:"):
        return _read_builtin(spec, seed, cap)
    files = local_files(spec)
    if files is None:
        return _read_hub(spec, cap)
    if len(files) == 1 and files[0].is_dir():
        return _read_saved(spec, files[0], cap)
    return _read_files(spec, files, cap)


def local_files(spec: DataSpec) -> list[Path] | None:
    """Files that the source names (or one `save_to_disk` directory); None when it is a hub id."""
    source = spec.source
    path = Path(source).expanduser()
    if any(c in source for c in "*?["):
        base = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(p for p in base.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not found:
            raise UserError(f"data source {source!r}: no file matches this pattern")
        return found
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return [path]
        return _files_of_split(path, parse_split(spec.split)[0])
    if _suffix(path) or not _HUB_ID.match(source):
        raise UserError(
            f"data source {source!r}: no such file or directory (looked in {Path.cwd()}); a hub data set has "
            "the form org/name, a built-in one builtin:NAME"
        )
    return None


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def _files_of_split(directory: Path, split: str) -> list[Path]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and _suffix(p))
    if not files:
        raise UserError(
            f"data source '{directory}': no {', '.join(SUFFIXES)} file and no `save_to_disk` data in it"
        )
    of_split = [
        p for p in files if re.match(rf"{re.escape(split)}([-_.]|$)", p.name) or split in p.parts[:-1]
    ]
    named = {p.name for p in files if re.match(r"(train|test|validation|val|dev|eval)([-_.])", p.name)}
    if of_split:
        return of_split
    if split == "train" and not named:
        return files
    raise UserError(
        f"data source '{directory}': no files of split {split!r}; "
        f"found {', '.join(p.name for p in files[:10])}"
    )


def _read_files(spec: DataSpec, files: list[Path], cap: int | None) -> list[Row]:
    name, start, stop = parse_split(spec.split)
    if name != "train" and len(files) == 1 and files[0] == Path(spec.source).expanduser():
        raise UserError(
            f"data source {spec.source!r}: one file is all in split train, it has no split {name!r}"
        )
    if len(files) == 1 and _suffix(files[0]) in (".jsonl", ".json"):
        return list(_parse_json(files[0], spec.split, cap))
    rows: list[Row] = []
    whole = start is None and stop is None
    for file in files:
        rows.extend(_read_file(file))
        if whole and cap is not None and len(rows) >= cap:
            break
    first, end = slice_bounds(spec.split, len(rows))
    return rows[first:end][:cap]


def _read_file(file: Path) -> Iterator[Row]:
    suffix = _suffix(file)
    if suffix == ".csv":
        return _parse_csv(file)
    if suffix == ".parquet":
        return _parse_parquet(file)
    if suffix in (".json", ".jsonl"):
        return _parse_json(file, "train", None)
    raise UserError(f"data source '{file}': not a {', '.join(SUFFIXES)} file")


def _read_bytes(file: Path) -> bytes:
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.name.endswith(".gz") else data
    except (OSError, EOFError) as error:
        raise UserError(f"data source '{file}': {error}") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _parse_json(file: Path, split: str, cap: int | None) -> Iterator[Row]:
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


def _parse_csv(file: Path) -> Iterator[Row]:
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


def _parse_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data source '{file}': not a readable parquet file: {error}") from error
    yield from _arrow_rows(str(file), table)


def _arrow_rows(file: str, table: Any) -> Iterator[Row]:
    try:
        yield from [Row(file, n, values) for n, values in enumerate(table.to_pylist(), 1)]
    except UnicodeDecodeError:
        for i in range(table.num_rows):
            try:
                yield Row(file, i + 1, table.slice(i, 1).to_pylist()[0])
            except UnicodeDecodeError:
                yield Row(file, i + 1, {}, BadRow(file, i + 1, NOT_UTF8))


def _read_builtin(spec: DataSpec, seed: int, cap: int | None) -> list[Row]:
    from pipeline.data.builtin import load_builtin

    name, start, stop = parse_split(spec.split)
    whole = start is None and stop is None
    rows = load_builtin(spec.source.removeprefix("builtin:"), name, cap if whole else None, seed)
    first, end = slice_bounds(spec.split, len(rows))
    label = f"{spec.source}[{name}]"
    return [Row(label, first + i, values) for i, values in enumerate(rows[first:end][:cap], 1)]


def _read_saved(spec: DataSpec, directory: Path, cap: int | None) -> list[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise UserError(
            f"data source '{directory}': damaged `save_to_disk` data: {_first_line(error)}"
        ) from error
    name = parse_split(spec.split)[0]
    if isinstance(saved, datasets.DatasetDict):
        if name not in saved:
            raise UserError(f"data source '{directory}': no split {name!r}; it has {', '.join(saved)}")
        saved = saved[name]
    first, end = slice_bounds(spec.split, len(saved))
    return _dataset_rows(f"{directory}[{name}]", saved, first, end, cap)


def _read_hub(spec: DataSpec, cap: int | None) -> list[Row]:
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    name = parse_split(spec.split)[0]
    datasets.disable_progress_bars()
    try:
        with hub_offline_if_unreachable():
            data = datasets.load_dataset(spec.source, name=spec.name, split=name)
    except Exception as error:
        raise UserError(
            f"data source {spec.source!r}: no such file or directory here, and as a hub data set it can't be "
            f"loaded: {_first_line(error)}. Without network, download it once and give its path"
        ) from error
    first, end = slice_bounds(spec.split, len(data))
    return _dataset_rows(f"{spec.source}[{name}]", data, first, end, cap)


@contextmanager
def hub_offline_if_unreachable() -> Iterator[None]:
    """Offline mode where the hub's name can't even be resolved: its client retries for 25 s otherwise.

    What is already in the cache is still found.
    """
    import socket
    from urllib.parse import urlparse
    from urllib.request import getproxies

    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not getproxies():  # behind a proxy names are resolved over there
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _dataset_rows(label: str, data: Any, first: int, end: int, cap: int | None) -> list[Row]:
    if cap is not None:
        end = min(end, first + cap)
    table = data.select(range(first, end)).with_format("arrow")[:]
    return [row._replace(number=row.number + first) for row in _arrow_rows(label, table)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
