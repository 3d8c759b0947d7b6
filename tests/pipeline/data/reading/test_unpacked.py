"""A file that unpacks to more than its bound is one message, and takes no memory; others are read as ever."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from actors.errors import UserError
from pipeline.data.reading import unpacked
from pipeline.data.reading.sources import read_rows
from pipeline.data.reading.unpacked import ALWAYS_FINE, MOST_RATIO, MOST_UNPACKED, Unpacked
from pipeline.data.spec import DataSpec
from tests.fuzz import harness

CHUNK = 4 << 20


def packed(path: Path, unit: bytes, size: int) -> Path:
    """A .gz of `size` bytes, the same ones again and again; takes no more memory than one of `CHUNK`."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        chunk = unit * (CHUNK // len(unit))
        for _ in range(-(-size // CHUNK)):
            file.write(chunk)
    return path


def repeated(path: Path, value: str, rows: int) -> Path:
    """A parquet file of one value in `rows` rows."""
    indices = pa.array(np.zeros(rows, np.int32))
    column = pa.DictionaryArray.from_arrays(indices, pa.array([value]))
    pyarrow.parquet.write_table(pa.table({"text": column}), path)
    return path


def test_a_bomb_is_refused_with_file_and_bound_within_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "MOST_MEMORY", 128 << 20)
    bombs = [
        packed(tmp_path / "zeros.jsonl.gz", b"\0", ALWAYS_FINE + CHUNK),
        packed(tmp_path / "rows.jsonl.gz", b"{}\n", 16 << 20),
        packed(tmp_path / "list.json.gz", b"[{},", 16 << 20),
        packed(tmp_path / "lines.csv.gz", b"\n", 16 << 20),
        repeated(tmp_path / "text.parquet", "x" * 20_000, 20_000),
        repeated(tmp_path / "nothing.parquet", "", 6_000_000),
    ]
    for path in bombs:
        assert path.stat().st_size < 1_300_000
        assert harness.refused(lambda: read_rows(DataSpec(source=str(path)), seed=0)), path  # noqa: B023
        with pytest.raises(UserError) as refused:
            read_rows(DataSpec(source=str(path)), seed=0)
        (said,) = refused.value.problems
        assert f"'{path}': {path.stat().st_size:,} bytes that unpack to more than 256 MiB" in said


def test_the_bound_follows_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for size, most in ((1_000, ALWAYS_FINE), (10 << 20, MOST_RATIO * (10 << 20)), (1 << 30, MOST_UNPACKED)):
        with path.open("wb") as file:
            file.truncate(size)
        Unpacked(path).add(most, 0)
        with pytest.raises(UserError, match=f"{most >> 20:,} MiB"):
            Unpacked(path).add(most + 1, 0)
        with pytest.raises(UserError):
            Unpacked(path).add(most, 1)


def test_rows_that_are_all_alike_are_no_bomb(tmp_path: Path) -> None:
    row = b'{"prompt": "What is 1+1?", "completion": "2"}\n'
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(row * 20_000))
    assert len(read_rows(DataSpec(source=str(path)), seed=0)) == 20_000
    assert (
        len(read_rows(DataSpec(source=str(repeated(tmp_path / "a.parquet", "red", 20_000))), seed=0))
        == 20_000
    )


def test_what_is_counted_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert [row.values["text"] for row in read_rows(DataSpec(source=str(path)), seed=0)] == ["a", "b"]
    monkeypatch.setattr(unpacked, "ALWAYS_FINE", 100)
    monkeypatch.setattr(unpacked, "MOST_RATIO", 0)
    with pytest.raises(UserError, match="unpack to more than"):
        read_rows(DataSpec(source=str(path)), seed=0)


def test_batches_of_a_parquet_file_are_one_table_with_its_schema(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {i}" for i in range(2_000)]}).replace_schema_metadata(
        {"huggingface": "{}"}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    rows = read_rows(DataSpec(source=str(tmp_path / "a.parquet")), seed=0)
    assert [row.values for row in rows] == table.to_pylist()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.slice(0, 0), buffer)
    (tmp_path / "none.parquet").write_bytes(buffer.getvalue())
    assert read_rows(DataSpec(source=str(tmp_path / "none.parquet")), seed=0) == []
