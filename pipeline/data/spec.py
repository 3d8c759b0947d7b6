"""Settings of a stage's data: one source, or a mixture of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from actors.spec import Spec

LayoutName = Literal[
    "text",
    "messages",
    "conversations",
    "prompt_completion",
    "instruction",
    "question_answer",
    "problem_solution",
    "query_calls",
    "transcript",
    "prompt",
    "question",
    "preference",
    "preference_conversations",
    "preference_transcripts",
    "messages_preference",
    "rejected_response",
    "question_preference",
    "instruction_preference",
    "prompt_completion_label",
    "messages_label",
    "question_answer_label",
    "instruction_label",
]

ColumnName = Literal[
    "text",
    "messages",
    "conversations",
    "chat",
    "system",
    "history",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "question",
    "answer",
    "problem",
    "solution",
    "query",
    "answers",
    "chosen",
    "rejected",
    "rejected_response",
    "chosen_response",
    "label",
    "margin",
    "tools",
    "chat_template_kwargs",
]


PLACEHOLDER = re.compile(r"YOUR_[A-Z_]+")
"""Sources that `raylign init` writes where it can't know any."""


class DataSpec(Spec):
    """One source of rows."""

    source: str = Field(min_length=1)
    """Place of the rows: a hub id (`org/name`), a json, jsonl, csv or parquet file (also .gz, and patterns
    such as `data/*.jsonl`), a directory of such files or of `save_to_disk`, or `builtin:NAME`."""
    name: str | None = None
    """Configuration of a data set that has several, such as `main`: of the hub, or of a directory, where it
    is one of its README or a folder in it."""
    split: str = "train"
    """Split to take, with datasets' slices: `train[:1000]`, `test[10%:20%]`. Which files of a directory it
    is, is decided as in `datasets` (docs/data.md). A single local file is all in `train`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in a mixture, relative to the weights of the others. No row is repeated: the
    source that runs out first sets the size. None everywhere: every row of every source."""
    max_rows: int | None = Field(default=None, ge=1)
    """Take at most this many rows, the first ones."""
    columns: dict[ColumnName, str] = Field(default_factory=dict)
    """Names of columns that are called otherwise in this source: `{prompt: query, completion: reply}`. Only
    layouts that read all of these are considered; a name that no layout reads is refused."""
    layout: LayoutName | None = None
    """Layout of the rows; None recognises it from the columns."""
    format: Literal["auto", "chat", "text"] = "auto"
    """Form of plain strings as tokens: through the base's chat template as a user's turn and an
    assistant's answer (`chat`), or joined as they stand with the end-of-text token (`text`, as TRL does).
    `auto` takes the template where the base has one. Rows of messages always need the template."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that can't be used: stop with file and row, or leave it out, counted by reason and listed."""

    @field_validator("split")
    @classmethod
    def _split_parses(cls, value: str) -> str:
        parse_split(value)
        return value


def as_sources(value: Any) -> Any:
    """A bare string, one mapping, or a list of either, as a list for `DataSpec`."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"source": item} if isinstance(item, str) else item for item in items]


def without_weight(specs: Sequence[DataSpec]) -> list[int]:
    """Numbers of the sources that have no weight where others have one."""
    lacking = [number for number, spec in enumerate(specs) if spec.weight is None]
    return lacking if len(lacking) < len(specs) else []


DataSources = Annotated[
    list[DataSpec],
    BeforeValidator(as_sources, json_schema_input_type=str | DataSpec | list[str | DataSpec]),
    Field(min_length=1),
]
"""Type of a stage's `data:`: a string, one `DataSpec`, or a list of them (a mixture)."""


_SPLIT = re.compile(r"^(?P<name>[\w.-]+)(?:\[(?P<start>-?[0-9]{1,18}%?)?:(?P<stop>-?[0-9]{1,18}%?)?\])?$")


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Name, start and stop of a split; start and stop are row numbers or percentages, as text.

    Raises ValueError on anything else, sums of splits (`train+test`) included: list both as sources.
    """
    match = _SPLIT.match(split.strip())
    if match is None:
        shown = repr(split if len(split) <= 100 else f"{split[:100]}...")
        raise ValueError(f"split {shown} is not of the form train, train[:1000] or test[10%:20%]")
    return match["name"], match["start"], match["stop"]


def slice_bounds(split: str, n_rows: int) -> tuple[int, int]:
    """First row and end row (exclusive) that `split` takes of `n_rows` rows."""
    _, start, stop = parse_split(split)
    first, end, _ = slice(_to_row(start, n_rows), _to_row(stop, n_rows)).indices(n_rows)
    return first, max(first, end)


def _to_row(bound: str | None, n_rows: int) -> int | None:
    if bound is None:
        return None
    if bound.endswith("%"):
        # datasets rounds percentages to the closest row ("closest" is its default).
        return round(int(bound[:-1]) * n_rows / 100)
    return int(bound)
