"""Arrow: what `datasets` put into its own types comes out as what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import UserError
from pipeline.data.reading.arrow_files import arrow_rows
from pipeline.data.reading.raw_rows import Row
from pipeline.data.reading.sources import read_rows
from pipeline.data.spec import DataSpec

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}],
}
TYPED: list[dict[str, Any]] = [
    {"messages": [{"role": "user"}, CALL], "label": 1, "meta": {"kinds": [0, 1], "more": {"a": [1]}}},
    {"messages": [], "label": None, "meta": {"kinds": [], "more": None}},
    {"messages": [CALL], "label": -1, "meta": None},
]  # fmt: skip


def typed() -> Any:
    from datasets import ClassLabel, Dataset, Features, Json, List

    label = ClassLabel(names=["bad", "good"])
    features = {"messages": List(Json()), "label": label, "meta": {"kinds": List(label), "more": Json()}}
    return Dataset.from_list(TYPED, features=Features(features))


def rows_of(path: Path, **spec: Any) -> list[Row]:
    return read_rows(DataSpec(source=str(path), **spec), seed=0)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_json_features_are_objects_and_class_labels_names(tmp_path: Path, form: str) -> None:
    data, path = typed(), tmp_path / ("saved" if form == "saved" else "a.parquet")
    if form == "parquet":
        data.to_parquet(str(path))
    else:
        data.save_to_disk(str(path))
    rows = rows_of(path)
    assert [row.values["messages"] for row in rows] == [row["messages"] for row in TYPED]
    assert [row.values["label"] for row in rows] == ["good", None, None]
    assert rows[0].values["meta"] == {"kinds": ["bad", "good"], "more": {"a": [1]}}
    assert rows[1].values["meta"] == {"kinds": [], "more": None}
    assert all(row.arrow for row in rows)
    assert next(row.number for row in rows_of(path, split="train[1:]")) == 2


def test_a_json_column_without_datasets_is_decoded_too(tmp_path: Path) -> None:
    column = pa.array(['{"a": [1]}', None], pa.json_())
    pq.write_table(pa.table({"meta": column, "text": ["a", "b"]}), tmp_path / "a.parquet")
    assert [row.values["meta"] for row in rows_of(tmp_path / "a.parquet")] == [{"a": [1]}, None]


def test_strings_that_look_like_json_stay_strings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ['{"a": 1}']}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet")[0].values == {"text": '{"a": 1}'}


def test_values_that_cannot_be_decoded_are_bad_rows(tmp_path: Path) -> None:
    texts = ['{"a": 1}', "{", '"\\ud800"', '{"a":' * 2_000 + "1" + "}" * 2_000]
    table = pa.table({"meta": pa.array(texts, pa.json_()), "label": [0, 0, 0, 0]})
    pq.write_table(table, tmp_path / "a.parquet")
    problems = [str(row.problem) for row in rows_of(tmp_path / "a.parquet")]
    assert problems[0] == "None"
    assert "row 2: not valid JSON: meta: Expecting" in problems[1]
    assert "row 3: not UTF-8: meta at character 0" in problems[2]
    assert "row 4: nested too deeply: meta" in problems[3]


def test_a_label_without_a_name_and_a_date_without_a_year_are_bad_rows(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, Value

    schema = Features({"label": ClassLabel(names=["no", "yes"]), "day": Value("date32")}).arrow_schema
    table = pa.table(
        {"label": [1, 7, 0], "day": pa.array([0, 0, 2**30], pa.int32()).cast(pa.date32())}, schema
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert rows[0].values["label"] == "yes"
    assert "row 2: wrong type: label: 7 is none of its 2 labels" in str(rows[1].problem)
    assert "row 3: wrong type: " in str(rows[2].problem)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(UserError, match="more than one column 'text'"):
        list(arrow_rows("a", table))


def test_a_folder_with_an_equals_sign_is_no_column(tmp_path: Path) -> None:
    (tmp_path / "lang=en").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "lang=en" / "a.parquet")
    assert rows_of(tmp_path / "lang=en" / "a.parquet")[0].values == {"text": "a"}


def test_damaged_files_of_save_to_disk_are_named(tmp_path: Path) -> None:
    typed().save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:300])
    with pytest.raises(UserError, match="saved"):
        rows_of(tmp_path / "saved")
