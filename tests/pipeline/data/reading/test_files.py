"""A file that is not what its name says is one message; no damage ends in a traceback."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import UserError
from pipeline.data.reading.sources import read_rows
from pipeline.data.spec import DataSpec

ROWS: list[dict[str, Any]] = [{"question": f"{i}+1? é", "answer": [{"role": "x", "n": i}]} for i in range(9)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "question,answer\n" + "".join(f'"{row["question"]}","{i}\n"\n' for i, row in enumerate(ROWS))


def read(path: Path) -> list[Any]:
    return [row.problem or row.values for row in read_rows(DataSpec(source=str(path)), seed=0)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", LINES), ("a.json", json.dumps(ROWS)), ("a.csv", CSV)])
def test_a_file_whose_first_bytes_tell_its_encoding_is_read(
    tmp_path: Path, encoding: str, name: str, text: str
) -> None:
    path, mark = tmp_path / name, "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + text).encode(encoding))
    rows = read(path)
    assert [row["question"] for row in rows] == [row["question"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "q,a\n1,2\n".encode("utf-16-le"), "looks like UTF-16 without the mark"),
        ("a.jsonl", LINES.encode("utf-16-be"), "looks like UTF-16 without the mark"),
        ("a.csv", b"\xff\xfeq\0,\0a", "UTF-16 by its first bytes, but damaged at byte"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-60], "damaged, or not gzip"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:30] + b"\xff" * 30, "damaged, or not gzip"),
        ("a.jsonl.gz", LINES.encode(), "damaged, or not gzip: Not a gzipped file"),
        ("a.parquet", b"", "not a readable parquet file"),
        ("a.parquet", LINES.encode(), "not a readable parquet file"),
        ("a.parquet.gz", b"", "not a readable parquet file"),
    ],
)
def test_a_damaged_file_is_one_message(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert len(error.value.problems) == 1
    assert name in str(error.value)
    assert said in str(error.value)


def test_suffixes_are_known_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "ROWS.CSV").write_text(CSV)
    (tmp_path / "rows.JSONL.GZ").write_bytes(gzip.compress(LINES.encode()))
    assert len(read(tmp_path / "ROWS.CSV")) == len(read(tmp_path / "rows.JSONL.GZ")) == len(ROWS)


def test_a_directory_that_is_called_like_a_file_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(UserError, match=r"x\.jsonl': no .jsonl, .json"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl" / "part-0.jsonl").write_text(LINES)
    assert read(tmp_path / "x.jsonl") == ROWS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    path.chmod(0)
    with pytest.raises(UserError, match=r"a\.jsonl': Permission denied"):
        read(path)


def damaged(data: bytes, seed: int) -> Iterator[bytes]:
    """Copies with bytes changed, cut out, doubled, put in: what disks and editors do."""
    rng = np.random.default_rng(seed)
    odd = [
        b'"',
        b"{",
        b"[" * 50,
        b"\\ud800",
        b"\0",
        b"\xff\xfe",
        b"\xc3",
        b"\n",
        b",",
        b"}",
        b"1e999",
        b'"":',
    ]
    while True:
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        for piece in (b"", bytes(rng.integers(0, 256, length, np.uint8)), odd[int(rng.integers(len(odd)))]):
            yield data[:at] + piece + data[at + length * int(rng.integers(2)) :]
        yield data[:at]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "saved"])
def test_no_damage_ends_in_anything_but_a_message(tmp_path: Path, name: str) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"q": row["question"], "a": row["answer"]} for row in ROWS])
    path = file = tmp_path / name
    if name == "saved":
        data.save_to_disk(str(path))
        file = path / "state.json"
    elif name == "a.parquet":
        data.to_parquet(str(path))
    else:
        text = {"a.json": json.dumps(ROWS), "a.csv": CSV}.get(name, LINES).encode()
        file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    copies = damaged(file.read_bytes(), 0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(100):
        file.write_bytes(next(copies))
        try:
            rows = read(path)
        except UserError as error:
            outcomes["refused"] += len(error.problems)
        else:
            json.dumps(rows, default=str, ensure_ascii=False).encode()
            outcomes["read"] += 1
    assert outcomes["refused"] + outcomes["read"] == 100
    assert outcomes["refused"] > 0 or name == "a.jsonl"
