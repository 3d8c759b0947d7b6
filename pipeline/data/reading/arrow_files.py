"""Reads rows of Arrow tables: parquet files, `save_to_disk` directories and the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.errors import UserError
from pipeline.data.reading.bad_rows import NOT_JSON, NOT_UTF8, TOO_DEEP, WRONG_TYPE
from pipeline.data.reading.raw_rows import MAX_DEPTH, Row, bad_row, problem_of
from pipeline.data.reading.unpacked import Unpacked

BATCH_ROWS = 512
"""Rows of a parquet file that are unpacked at once."""
_JSON_TYPE = "extension<arrow.json>"


def parquet_rows(file: Path) -> Iterator[Row]:
    """Rows of a parquet file.

    Raises:
        UserError: it is damaged, or unpacks to too much.
    """
    import pyarrow.parquet

    count = Unpacked(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
            Unpacked(file).add(sum(group.total_byte_size for group in groups), opened.metadata.num_rows)
            # A value that is stored once for many rows has its size only when it is read.
            batches = []
            for batch in opened.iter_batches(BATCH_ROWS):
                count.add(_dense_bytes(batch), batch.num_rows)
                batches.append(batch)
            table = pyarrow.Table.from_batches(batches, opened.schema_arrow)
    except UserError:
        raise
    except Exception as error:  # pyarrow's kinds, OSError, and what a damaged footer leads to
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data source '{file}': not a readable parquet file: {said}") from error
    yield from arrow_rows(str(file), table)


def _dense_bytes(batch: Any) -> int:
    """Bytes of a batch, with values of a dictionary counted as often as they stand in its rows."""
    import pyarrow
    import pyarrow.compute

    size = int(batch.nbytes)
    for column in batch.columns:
        texts = getattr(column.type, "value_type", None) if pyarrow.types.is_dictionary(column.type) else None
        if texts is not None and (pyarrow.types.is_string(texts) or pyarrow.types.is_large_string(texts)):
            lengths = pyarrow.compute.binary_length(column.dictionary)
            size += pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
    return size


def arrow_rows(file: str, table: Any, features: Any = None) -> Iterator[Row]:
    """Rows of an Arrow table; `file` is what an error names.

    Values of `datasets`' Json() become what they say, those of ClassLabel the label's name (None for
    -1, which is "no label" there). `features` is a `datasets.Features`; None takes the schema's.

    Raises:
        UserError: two columns have one name, or the schema's features can't be understood.
    """
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise UserError(
            f"data source '{file}': more than one column {', '.join(map(repr, twice))}; rename one"
        )
    decoded = _decoded_columns(file, table.schema, features)
    try:
        rows: Any = table.to_pylist()
    except (
        ValueError,
        OverflowError,
        ArithmeticError,
    ):  # one value can't be converted: find its row
        rows = (table.slice(i, 1) for i in range(table.num_rows))
    for number, row in enumerate(rows, 1):
        yield _row(file, number, row, decoded)


def _row(file: str, number: int, row: Any, decoded: dict[str, Any]) -> Row:
    try:
        values = row if isinstance(row, dict) else row.to_pylist()[0]
    except UnicodeDecodeError:
        return bad_row(file, number, NOT_UTF8)
    except (ValueError, OverflowError, ArithmeticError) as error:
        return bad_row(file, number, WRONG_TYPE, f"{error}")
    for name, feature in decoded.items():
        try:
            values[name] = _decode(feature, values[name])
        except RecursionError:
            return bad_row(file, number, TOO_DEEP, f"{name}: more than {MAX_DEPTH} levels")
        except json.JSONDecodeError as error:
            return bad_row(file, number, NOT_JSON, f"{name}: {error}")
        except ValueError as error:
            return bad_row(file, number, WRONG_TYPE, f"{name}: {error}")
        if problem := problem_of({name: values[name]}):
            return bad_row(file, number, *problem)
    return Row(file, number, values, arrow=True)


def _decoded_columns(file: str, schema: Any, features: Any) -> dict[str, Any]:
    """Features of the columns that hold Json() or ClassLabel; `datasets` is loaded only for them."""
    typed = [field.name for field in schema if _JSON_TYPE in str(field.type)]
    said = dict(features) if features is not None else _said_features(file, schema)
    marked = {name: f for name, f in said.items() if name in schema.names and _is_marked(f)}
    if not typed and not marked:
        return {}
    import datasets

    try:
        found = {
            name: f if features is not None else datasets.Features.from_dict({name: f})[name]
            for name, f in marked.items()
        }
    except Exception as error:  # features of a newer `datasets`
        raise UserError(f"data source '{file}': its features can't be understood: {error}") from error
    for name in typed:
        if name not in found:
            found[name] = datasets.features.features.generate_from_arrow_type(schema.field(name).type)
    return found


def _said_features(file: str, schema: Any) -> dict[str, Any]:
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(info.get("info", {}).get("features") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"data source '{file}': the features in its schema are damaged: {error}") from error


def _is_marked(feature: Any) -> bool:
    return any(word in str(feature) for word in ("Json", "ClassLabel"))


def _decode(feature: Any, value: Any) -> Any:
    from datasets import ClassLabel
    from datasets.features import Json

    if value is None or feature is None:
        return value
    if isinstance(feature, ClassLabel):
        return _label(feature, value)
    if isinstance(feature, Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_decode(inner, item) for item in value]
    if isinstance(value, dict):
        fields = feature if isinstance(feature, dict) else {}
        return {key: _decode(fields.get(key), item) for key, item in value.items()}
    return value


def _label(feature: Any, value: Any) -> Any:
    if not isinstance(value, int) or value == -1:
        return None if value == -1 else value
    if not 0 <= value < len(feature.names):
        raise ValueError(f"{value} is none of its {len(feature.names)} labels")
    return feature.names[value]
