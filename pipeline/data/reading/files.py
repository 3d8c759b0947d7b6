"""Data files -> raw rows, each with the file and row that an error message will name.

json, jsonl and csv are read here rather than through `datasets`, which stops at the first row that it
can't parse and names neither the row nor all of them; parquet is read by pyarrow, as `datasets` does,
without a second copy in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from actors.errors import UserError
from pipeline.data.reading.arrow_files import parquet_rows
from pipeline.data.reading.csv_files import csv_rows
from pipeline.data.reading.json_files import json_rows
from pipeline.data.reading.raw import SUFFIXES, Row, suffix_of


def read_file(file: Path) -> Iterator[Row]:
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
