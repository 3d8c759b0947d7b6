"""Every source gives the same rows, each with the file and row that a message will name."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.data.reading.records import load_records
from pipeline.data.reading.sources import read_rows
from pipeline.data.spec import DataSpec

ROWS: list[dict[str, Any]] = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(10)]


def read(source: Path | str, **spec: Any) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(DataSpec(source=str(source), **spec), seed=0)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(directory: Path, form: str) -> Path:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    path = directory / f"rows.{form}"
    if form in ("jsonl", "json lines.json"):
        path.write_text("\ufeff" + lines(ROWS).replace("}\n", "}\n\n"))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(ROWS).encode()))
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "object.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}))
    elif form == "csv":
        path.write_text("question,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in ROWS))
    elif form == "parquet":
        data.to_parquet(str(path))
    elif form == "saved":
        data.save_to_disk(str(path))
    else:
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(path))
    return path


FORMS = [
    "jsonl",
    "json lines.json",
    "jsonl.gz",
    "json",
    "object.json",
    "csv",
    "parquet",
    "saved",
    "saved splits",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_source_gives_its_rows(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form)
    assert read(path) == ROWS
    assert read(path, split="train[2:5]") == ROWS[2:5]
    assert read(path, split="train[50%:]", max_rows=2) == ROWS[5:7]
    assert read_rows(DataSpec(source=str(path), split="train[9:]"), seed=0)[0].number in (10, 19)


def test_a_jsonl_row_is_numbered_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n" + lines(ROWS[:1]))
    assert read_rows(DataSpec(source=str(tmp_path / "a.jsonl")), seed=0)[0].number == 3


def test_a_directory_of_files_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00002.jsonl").write_text(lines(ROWS[:3]))
    (tmp_path / "data" / "train-00001-of-00002.jsonl").write_text(lines(ROWS[3:6]))
    (tmp_path / "data" / "test.jsonl").write_text(lines(ROWS[6:]))
    assert read(tmp_path) == ROWS[:6]
    assert read(tmp_path, split="test[:2]") == ROWS[6:8]
    assert read(tmp_path / "data" / "train-*.jsonl") == ROWS[:6]
    with pytest.raises(UserError, match=r"no files of split 'validation'; found train \(data/train-0"):
        read(tmp_path, split="validation")


def test_a_builtin_source_is_generated() -> None:
    rows = read("builtin:arithmetic", max_rows=5)
    assert len(rows) == 5
    assert rows == read("builtin:arithmetic", split="train[:5]")


def test_csv_keeps_strings_and_reports_short_and_foreign_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"question,answer\n1+1?,2\n2+2?\n3+3?,6,7\ncaf\xe9,5\n")
    spec = DataSpec(source=str(tmp_path / "a.csv"))
    with pytest.raises(UserError) as error:
        load_records([spec], "sft", seed=0)
    assert [p.split("a.csv ")[1] for p in error.value.problems[:3]] == [
        "row 2: missing column: answer",
        "row 3: wrong type: more fields than the header has",
        "row 4: not UTF-8",
    ]


def test_parquet_with_a_byte_that_is_not_utf8_names_the_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 2: not UTF-8"):
        load_records([DataSpec(source=str(tmp_path / "a.parquet"))], "sft", seed=0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1 nonsense", "not a readable parquet file"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.jsonl.gz", b"nonsense", "gzip"),
        ("a.txt", b"hello", "not a .jsonl, .json, .csv, .parquet file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read(tmp_path / name)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "./org/name", "/nowhere/at/all", "imdb", "no/such/*.jsonl"]
)
def test_a_missing_file_is_no_hub_id(source: str) -> None:
    with pytest.raises(UserError, match=r"no such file or directory|no file matches"):
        read(source)


def test_a_hub_id_without_network_is_answered_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'raylign-no-such/data'.*Without network, download it once"):
        read("raylign-no-such/data")
    assert time.monotonic() - start < 30


def test_a_split_that_a_source_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        read(write(tmp_path, "saved splits"), split="dev")
    with pytest.raises(UserError, match="has no split 'dev'"):
        read(write(tmp_path, "jsonl"), split="dev")
