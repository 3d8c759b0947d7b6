"""Reads a source's raw rows: from the files, directory, hub data set or generator that it names.

json, jsonl and csv are read by modules of this room rather than through `datasets`, which stops at the first
row that it can't parse and names neither the row nor all of them; parquet is read by pyarrow, as `datasets`
does, without a second copy in a cache. Hub data sets and `save_to_disk` directories go through `datasets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.errors import UserError
from pipeline.data.reading.arrow_files import arrow_rows, parquet_rows
from pipeline.data.reading.csv_files import csv_rows
from pipeline.data.reading.json_files import json_rows
from pipeline.data.reading.raw_rows import SUFFIXES, Row, suffix_of
from pipeline.data.reading.readme_configs import files_of_folder
from pipeline.data.reading.split_files import files_of_pattern
from pipeline.data.spec import PLACEHOLDER, DataSpec, parse_split, slice_bounds

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def read_rows(spec: DataSpec, *, seed: int, max_rows: int | None = None) -> list[Row]:
    """All rows of one source after split, slice and cap. UserError when the source can't be read."""
    cap = min((n for n in (spec.max_rows, max_rows) if n is not None), default=None)
    if spec.source.startswith("builtin:"):
        _refuse_name(spec, "a built-in source")
        return _read_builtin(spec, seed, cap)
    files = local_files(spec)
    if files is None:
        return _read_hub(spec, cap)
    if len(files) == 1 and files[0].is_dir():
        return _read_saved(spec, files[0], cap)
    return _read_files(spec, files, cap)


def local_files(spec: DataSpec) -> list[Path] | None:
    """Files that the source names (or one `save_to_disk` directory); None when it is a hub id.

    Raises:
        UserError: there are none, or not of this split or configuration.
    """
    source = spec.source
    path = Path(source).expanduser()
    split = parse_split(spec.split)[0]
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    except OSError as error:
        raise UserError(f"data source {source!r}: {error.strerror}") from error
    if is_file or is_saved:
        _refuse_name(spec, "one file" if is_file else "a `save_to_disk` directory")
        return [path]
    if is_folder:
        return files_of_folder(path, spec.name, split, source)
    if any(c in source for c in "*?["):
        _refuse_name(spec, "a pattern")
        return files_of_pattern(source, split)
    if PLACEHOLDER.fullmatch(source):
        raise UserError(
            f"data source {source!r}: a placeholder; write your own in its place: a file, a directory, the "
            "hub's org/name, or builtin:NAME (docs/data.md)"
        )
    if suffix_of(path) or not _HUB_ID.match(source) or Path(path.parts[0]).is_dir():
        raise UserError(
            f"data source {source!r}: no such file or directory (looked in {Path.cwd()}); a hub data set has "
            "the form org/name, a built-in one builtin:NAME"
        )
    return None


def _refuse_name(spec: DataSpec, what: str) -> None:
    if spec.name is not None:
        raise UserError(
            f"data source {spec.source!r}: `name` is {spec.name!r}, but {what} has no configurations; leave "
            "it out"
        )


def _read_files(spec: DataSpec, files: list[Path], cap: int | None) -> list[Row]:
    name, start, stop = parse_split(spec.split)
    if name != "train" and len(files) == 1 and files[0] == Path(spec.source).expanduser():
        raise UserError(
            f"data source {spec.source!r}: one file is all in split train, it has no split {name!r}"
        )
    if len(files) == 1 and suffix_of(files[0]) in (".jsonl", ".json"):
        return list(json_rows(files[0], spec.split, cap))
    rows: list[Row] = []
    whole = start is None and stop is None
    for file in files:
        rows.extend(_read_file(file))
        if whole and cap is not None and len(rows) >= cap:
            break
    first, end = slice_bounds(spec.split, len(rows))
    return rows[first:end][:cap]


def _read_file(file: Path) -> Iterator[Row]:
    """Rows of a file, by its suffix.

    Raises:
        UserError: it can't be read as a whole. A row that can't be read is a `Row` with its problem.
    """
    suffix = suffix_of(file)
    if suffix == ".csv":
        return csv_rows(file)
    if suffix == ".parquet":
        return parquet_rows(file)
    if suffix in (".json", ".jsonl"):
        return json_rows(file, "train", None)
    raise UserError(f"data source '{file}': not a {', '.join(SUFFIXES)} file")


def _read_builtin(spec: DataSpec, seed: int, cap: int | None) -> list[Row]:
    from pipeline.data.reading.builtin import load_builtin

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
    elif name not in ("train", str(saved.split)):
        own = f" or in its own, {str(saved.split)!r}" if saved.split not in (None, "train") else ""
        raise UserError(
            f"data source '{directory}': one data set is all in split train{own}; it has no split {name!r}"
        )
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
    if not getproxies():  # a proxy resolves names itself
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
    try:
        table = data.select(range(first, end)).with_format("arrow")[:]
        table.validate(full=True)
    except Exception as error:  # damaged Arrow files can be opened, and fail only when they are read
        if "UTF8" not in str(error):  # that is the fault of rows, which `arrow_rows` names
            raise UserError(f"data source '{label}': damaged Arrow data: {_first_line(error)}") from error
    rows = arrow_rows(label, table, data.features)
    return [row._replace(number=row.number + first) for row in rows]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
