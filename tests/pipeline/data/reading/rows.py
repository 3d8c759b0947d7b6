"""Rows written to a file and read back as records, for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.reading.records import Records, load_records
from pipeline.data.spec import DataSpec

USER = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}


def load(tmp_path: Path, rows: list[dict[str, Any]], kind: str, **spec: Any) -> Records:
    """Records of rows in a jsonl file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records([DataSpec(source=str(path), **spec)], kind, seed=0)  # type: ignore[arg-type]


def load_parquet(tmp_path: Path, rows: list[dict[str, Any]], kind: str, **spec: Any) -> Records:
    """Records of the same rows out of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return load_records([DataSpec(source=str(path), **spec)], kind, seed=0)  # type: ignore[arg-type]
