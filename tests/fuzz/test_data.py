"""Whatever a file of data holds, rows or a message come out: damaged bytes, odd values, odd types."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from actors.errors import UserError
from pipeline.data.reading.layouts import Kind
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec, as_sources
from pipeline.data.tokens.tokenize import prompt_rows, tokenize
from tests.fuzz.harness import Feed
from tests.fuzz.strategies import altered, damaged, json_scalars, texts

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1?", "completion": "2", "label": True},
    {"prompt": "1+2?", "chosen": "3", "rejected": "4", "margin": 0.5},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"text": "plain text"},
    {"question": "1+1?", "answer": "2", "tools": '[{"name": "f", "parameters": {}}]'},
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"transcript": "\n\nHuman: a\n\nAssistant: b", "chat_template_kwargs": {"x": 1}},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "1", "name": "f"},
            {"role": "assistant", "content": "b", "reasoning_content": "c"},
        ]
    },
]
KEYS = [
    *{key for row in ROWS for key in row},
    *("role", "content", "from", "value", "type", "function", "arguments", "train", "loss", "mask"),
]
KINDS: list[Kind] = ["sft", "preference", "prompt", "unpaired"]


def files() -> dict[str, list[bytes]]:
    """Suffix -> good files."""
    sets = [[row] * 3 for row in ROWS]
    lines = ["".join(json.dumps(row) + "\n" for row in rows).encode() for rows in sets]
    lists = [json.dumps(rows).encode() for rows in sets] + [json.dumps({"data": sets[0]}).encode()]
    csv = [b"prompt,completion\n1+1?,2\n1+2?,3\n", b'text\n"a ""b"""\n"c\nd"\n']
    return {
        ".jsonl": lines,
        ".json": lists,
        ".csv": csv,
        ".jsonl.gz": [gzip.compress(line, mtime=0) for line in lines],
        ".csv.gz": [gzip.compress(text, mtime=0) for text in csv],
        ".parquet": [parquet(pa.Table.from_pylist(rows)) for rows in sets[:5]],
        ".txt": [b"some text\n"],
    }


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from actors.models.tiny import byte_tokenizer

    return byte_tokenizer()


def read(specs: Sequence[DataSpec], tokenizer: Any) -> None:
    """Records of every kind, and their tokens; the message where none could be had."""
    said: UserError | None = None
    read_any = False
    for kind in KINDS:
        try:
            records = load_records(specs, kind, seed=0)
            records.columns, records.fingerprint  # noqa: B018
            if kind == "prompt":
                prompt_rows(records, tokenizer, None)
            else:
                tokenize(records, tokenizer, max_length=64)
            read_any = True
        except UserError as error:
            said = error
    if not read_any and said is not None:
        raise said


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.gz", ".parquet", ".txt"])
def test_damaged_files(feed: Feed, tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    words = [
        b'"\\ud800"',
        b"NaN",
        b"1e999",
        b"[" * 200,
        b"\xff",
        b"\0",
        b"null",
        b"{}",
        b",",
        b'"',
        b"\n",
        b"\r",
    ]

    def load(content: bytes) -> None:
        path.write_bytes(content)
        read([DataSpec(source=str(path))], tokenizer)

    feed(load, damaged(files()[suffix], words), inputs=25)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_with_odd_values(feed: Feed, tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"

    def load(rows: list[Any]) -> None:
        text = [json.dumps(row) for row in rows]
        path.write_text("\n".join(text) if suffix == ".jsonl" else f"[{','.join(text)}]")
        read([DataSpec(source=str(path), on_bad_row="skip")], tokenizer)
        read([DataSpec(source=str(path))], tokenizer)

    rows = st.lists(
        st.one_of(st.sampled_from(ROWS), altered(ROWS, json_scalars(), KEYS)), min_size=1, max_size=4
    )
    feed(load, rows.filter(_dumps), inputs=40)


def _dumps(value: Any) -> bool:
    try:
        json.dumps(value)
    except (RecursionError, ValueError, TypeError):  # more levels than Python's own writer has
        return False
    return True


COLUMNS = [
    pa.array([b"a", None, b"\xff"]),
    pa.array([datetime.date(2020, 1, 1)] * 3),
    pa.array([datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)] * 3),
    pa.array([2**62] * 3, pa.timestamp("ms")),
    pa.array([-(2**62)] * 3, pa.duration("ms")),
    pa.array([decimal.Decimal("1.5"), None, decimal.Decimal("2.5")]),
    pa.array([float("nan"), float("inf"), -0.0]),
    pa.array([1.5, 2.5, 65504.0]).cast(pa.float16()),
    pa.array([2**64 - 1, 0, 1], pa.uint64()),
    pa.array(["a", "b", None]).dictionary_encode(),
    pa.array([["a"], [], None], pa.list_(pa.string())),
    pa.array([{"a": 1}, None, {"a": 2}]),
    pa.array([[("k", 1)], [("k", None)], []], pa.map_(pa.string(), pa.int64())),
    pa.nulls(3),
    pa.array([True, None, False]),
    pa.array(["user: a", "", " "]),
    pa.array(['{"a": 1}', "[", "[[[[1]]]]"]),
    pa.array([[{"role": "user", "content": "a"}], [{"role": "assistant", "content": None}], None]),
]  # fmt: skip


def test_columns_of_odd_types(feed: Feed, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.parquet"

    def load(table: pa.Table) -> None:
        path.write_bytes(parquet(table))
        read([DataSpec(source=str(path))], tokenizer)

    columns = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(COLUMNS), min_size=1, max_size=3)
    good = {"prompt": pa.array(["a", "b", "c"]), "completion": pa.array(["d", "e", "f"])}
    beside = columns.map(lambda odd: pa.table(good | odd))
    # Not deep: Arrow itself overflows the stack when it writes hundreds of levels.
    leaf = json_scalars()
    inner = st.recursive(leaf, lambda one: st.lists(one, max_size=3) | st.dictionaries(texts(), one))
    nested = st.lists(st.dictionaries(st.sampled_from(KEYS), inner, max_size=3), min_size=1)
    feed(
        load,
        st.one_of(columns.map(pa.table), beside, beside, nested.map(_table).filter(bool)),
        inputs=60,
        examples=[pa.table({"prompt": column}) for column in COLUMNS],
    )


def _table(rows: list[Any]) -> pa.Table | None:
    try:
        table = pa.Table.from_pylist(rows)
        parquet(table)
    except Exception:  # Arrow has no type for it, or parquet none
        return None
    return table


SPECS = {
    "split": [
        "train",
        "train[:2]",
        "train[5:]",
        "train[-1:]",
        "train[:200%]",
        f"train[:{'9' * 5000}]",
        "x[:]",
    ],
    "max_rows": [1, 2, 10**12, 2**62],
    "columns": [{}, {"prompt": "question"}, {"answer": "a"}, {"text": "prompt"}, {"messages": "text"}],
    "layout": [None, "text", "messages", "preference", "prompt"],
    "format": ["auto", "chat", "text"],
    "weight": [None, 1e-300, 1.0, 1e300],
    "name": [None, "main"],
    "on_bad_row": ["error", "skip"],
}


def test_settings_of_sources(feed: Feed, tmp_path: Path, tokenizer: Any) -> None:
    from pydantic import ValidationError

    good = {suffix: tmp_path / f"rows{suffix}" for suffix in (".jsonl", ".json", ".csv", ".parquet")}
    for suffix, path in good.items():
        path.write_bytes(files()[suffix][0])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(files()[".jsonl"][0])
    places = [*map(str, good.values()), "builtin:arithmetic", f"{tmp_path}/folder", f"{tmp_path}/*.jsonl"]
    places += [f"{tmp_path}/nowhere", f"{tmp_path}/[", "builtin:nothing", f"{tmp_path}/{'a' * 300}"]
    settings = {name: st.sampled_from(choices) for name, choices in SPECS.items()}
    source = st.fixed_dictionaries(
        {"source": st.one_of(st.sampled_from(places), texts().map(lambda text: f"{tmp_path}/{text}"))},
        optional=settings,
    )

    def load(given: list[dict[str, Any]]) -> None:
        try:
            specs = [DataSpec(**one) for one in as_sources(given)]
        except ValidationError as error:
            raise UserError(str(error)) from error
        read(specs, tokenizer)

    arithmetic = {"source": "builtin:arithmetic"}
    found = [[{**arithmetic, "max_rows": 10**12}], [{**arithmetic, "split": f"train[:{'9' * 5000}]"}]]
    found.append([{"source": "/"}])
    feed(load, st.lists(source, min_size=1, max_size=3), inputs=20, examples=found)
