"""Reads sources as records, the one canonical form of rows in this program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.algorithms import LABEL, MARGIN
from actors.errors import UserError
from pipeline.data.reading.bad_rows import WRONG_TYPE, BadRow, RowGate, RowProblem, Skipped
from pipeline.data.reading.convert_row import convert
from pipeline.data.reading.field_values import (
    check_encodable,
    from_json,
    is_blank,
    true_or_false,
    type_name,
    without_nulls,
)
from pipeline.data.reading.layout_converters import Converted
from pipeline.data.reading.layout_detection import resolve_layout
from pipeline.data.reading.layouts import Kind, Resolved
from pipeline.data.reading.messages import Message
from pipeline.data.reading.raw_rows import Row
from pipeline.data.reading.sources import read_rows
from pipeline.data.spec import DataSpec


@dataclass(frozen=True)
class Record:
    """One usable row."""

    prompt: list[Message]
    """Messages before the answer. Empty for plain text and for a whole conversation, whose turns by the
    assistant are all answers."""
    answers: tuple[list[Message], ...]
    """(completion,) for sft and unpaired, (chosen, rejected) for preferences, () for prompts."""
    plain: tuple[str, ...] | None
    """(prompt, *answers) as strings, for rows that came as strings; None for rows of messages."""
    columns: dict[str, Any]
    """The row's other columns; for prompts also `answer`, the right completion, where known; for
    unpaired rows also `label`, whether the answer is desirable."""
    template_kwargs: dict[str, Any]
    """Passed to the chat template: `tools`, and the row's `chat_template_kwargs`."""
    source: int
    """Index of the source in the mixture."""
    file: str
    row: int
    """Number of the row in `file`, from 1."""
    untrained: frozenset[int] = frozenset()
    """Turns of the assistant that the row leaves out of the loss: indices in `[*prompt, *completion]`."""

    @property
    def completion(self) -> list[Message]:
        return self.answers[0]

    @property
    def chosen(self) -> list[Message]:
        return self.answers[0]

    @property
    def rejected(self) -> list[Message]:
        return self.answers[1]

    @property
    def is_text(self) -> bool:
        """True for plain text without a prompt, which is trained unchanged."""
        return self.plain is not None and len(self.plain) > 1 and not self.prompt

    def content(self) -> list[Any]:
        """Everything that the fingerprint covers."""
        content = [self.prompt, self.answers, self.plain, self.columns, self.template_kwargs]
        return [*content, sorted(self.untrained)] if self.untrained else content


@dataclass(frozen=True)
class SourceUse:
    """One source of a mixture, with how many of its rows were read and used."""

    spec: DataSpec
    layout: str
    rows_read: int
    rows_used: int
    """Rows in the mixture: without bad ones, and without those that its weights leave out."""
    files: tuple[str, ...] = ()
    """Files that the rows were read from, in their order."""


@dataclass(frozen=True)
class Records:
    """All usable rows of a mixture, in a fixed order."""

    kind: Kind
    rows: list[Record]
    sources: list[SourceUse]
    skipped: Skipped = field(default_factory=Skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.rows[index]

    def bad(self, record: Record, problem: RowProblem) -> tuple[BadRow, str]:
        """A row that can't be used after all, and its source's `on_bad_row`: what a `RowGate` takes."""
        bad = BadRow(record.file, record.row, problem.reason, problem.detail)
        return bad, self.sources[record.source].spec.on_bad_row

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The rows' other columns, one list each; None where a row lacks it."""
        names = dict.fromkeys(name for record in self.rows for name in record.columns)
        return {name: [record.columns.get(name) for record in self.rows] for name in names}

    @property
    def layout(self) -> str:
        """Layout of the source, or of each where they differ: `messages, text`."""
        return ", ".join(dict.fromkeys(use.layout for use in self.sources))

    @property
    def fingerprint(self) -> str:
        """sha256 over the content and order of the rows; file names and row numbers don't count."""
        digest = hashlib.sha256(self.kind.encode())
        for record in self.rows:
            digest.update(json.dumps(record.content(), sort_keys=True, default=str).encode())
            digest.update(self.sources[record.source].spec.format.encode())
        return digest.hexdigest()


def load_records(specs: Sequence[DataSpec], kind: Kind, *, seed: int, max_rows: int | None = None) -> Records:
    """Read all sources, find their layouts, check their rows and mix them.

    `max_rows` caps the mixture (a dry run): every source gives its part. UserError lists all problems of
    all sources: unreadable sources, layouts that don't fit `kind`, and every bad row of a source with
    `on_bad_row: error`.
    """
    problems: list[str] = []
    gate = RowGate()
    parts: list[list[Record]] = []
    uses: list[SourceUse] = []
    per_source = None if max_rows is None else -(-max_rows // len(specs))
    for index, spec in enumerate(specs):
        try:
            rows = read_rows(spec, seed=seed, max_rows=per_source)
            if not rows:
                raise UserError(f"data source {spec.source!r}: no rows (split {spec.split})")
            readable = [row.values for row in rows if row.problem is None]
            resolved = resolve_layout(readable, spec, kind) if readable else None
        except UserError as error:
            problems += error.problems
            continue
        records = _records(rows, resolved, spec, kind, index, gate)
        if not records and spec.on_bad_row == "skip":
            problems.append(
                f"data source {spec.source!r}: none of its {len(rows)} rows can be used "
                f"({gate.skipped.summary()})"
            )
        parts.append(records)
        uses.append(
            SourceUse(
                spec,
                resolved.layout.name if resolved else "unknown",
                len(rows),
                len(records),
                tuple(dict.fromkeys(row.file for row in rows)),
            )
        )
    problems += gate.problems()
    if problems:
        raise UserError(problems)
    mixed = mix(parts, [spec.weight for spec in specs], seed)
    used = np.bincount([record.source for record in mixed], minlength=len(specs))
    uses = [replace(use, rows_used=int(n)) for use, n in zip(uses, used, strict=True)]
    return Records(kind, mixed[:max_rows], uses, gate.skipped)


def mix(parts: Sequence[list[Record]], weights: Sequence[float | None], seed: int) -> list[Record]:
    """Mix all parts into one list: joined without weights; with them, in proportion and spread evenly.

    The part that runs out first sets the size; of the others a random choice is taken, by the seed.
    """
    if any(weight is None for weight in weights) or len(parts) == 1:
        return [record for part in parts for record in part]
    shares = np.asarray(weights, dtype=np.float64)
    size = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    taken: list[tuple[float, int, Record]] = []
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = min(len(part), max(1, round(size * share)))
        chosen = np.sort(np.random.default_rng([seed, index]).permutation(len(part))[:count])
        taken += [((k + 0.5) / count, index, part[i]) for k, i in enumerate(chosen)]
    taken.sort(key=lambda item: item[:2])
    return [record for _, _, record in taken]


def _records(
    rows: Sequence[Row], resolved: Resolved | None, spec: DataSpec, kind: Kind, index: int, gate: RowGate
) -> list[Record]:
    records = []
    for row in rows:
        try:
            if row.problem is not None or resolved is None:
                raise (
                    RowProblem(row.problem.reason, row.problem.detail)
                    if row.problem
                    else RowProblem("unreadable")
                )
            records += _records_of(row, resolved, kind, index)
        except RowProblem as problem:
            gate.add(BadRow(row.file, row.number, problem.reason, problem.detail), spec.on_bad_row)
    if kind == "unpaired":
        # A pair's answers must not be neighbours: KTO pairs each prompt with the answer of the row before.
        records.sort(key=lambda record: not record.columns[LABEL])
    return records


def _records_of(row: Row, resolved: Resolved, kind: Kind, index: int) -> list[Record]:
    """Records of one row: one, or two for a pair that KTO takes apart."""
    record = _record(row, resolved, kind, index)
    if kind != "unpaired":
        return [record]
    if resolved.layout.labelled:
        label = true_or_false(row.values.get(resolved.columns[LABEL]), resolved.columns[LABEL])
        return [replace(record, columns={**record.columns, LABEL: label})]
    plain = record.plain
    return [
        replace(
            record,
            answers=(answer,),
            plain=None if plain is None else (plain[0], plain[1 + place]),
            columns={**record.columns, LABEL: place == 0},
        )
        for place, answer in enumerate(record.answers)
    ]


def _record(row: Row, resolved: Resolved, kind: Kind, index: int) -> Record:
    converted = convert(row, resolved, kind)
    consumed = set(resolved.columns.values())
    columns = {k: v for k, v in row.values.items() if k not in consumed}
    if MARGIN in resolved.columns and not is_blank(margin := row.values.get(resolved.columns[MARGIN])):
        columns[MARGIN] = margin
    if kind == "prompt":
        converted, answer = _prompt_of(converted)
        if "answer" in resolved.columns:
            answer = row.values.get(resolved.columns["answer"])
        columns = columns if answer is None else {**columns, "answer": answer}
    return Record(
        converted.prompt,
        converted.answers,
        converted.plain,
        columns,
        _template_kwargs(row, resolved),
        index,
        row.file,
        row.number,
        converted.untrained,
    )


def _prompt_of(converted: Converted) -> tuple[Converted, str | None]:
    """The messages before the (chosen) answer, and that answer's text; None for a tool call."""
    if not converted.answers:
        return converted, None
    messages = [*converted.prompt, *converted.answers[0]]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    if last == 0:
        raise RowProblem("empty prompt", "nothing comes before the answer")
    plain = converted.plain and converted.plain[:1]
    return Converted(messages[:last], (), plain), messages[last]["content"] or None


def _template_kwargs(row: Row, resolved: Resolved) -> dict[str, Any]:
    """Variables of the chat template other than the messages; csv and parquet files may hold them as JSON
    text."""
    values: dict[str, Any] = {}
    for name, kind, said in _FOR_TEMPLATE:
        column = resolved.columns.get(name)
        if column is None or (value := row.values.get(column)) is None:
            continue
        value = from_json(value, column)
        if isinstance(value, list):
            value = [from_json(item, f"{column}[{i}]") for i, item in enumerate(value)]
        value = without_nulls(value) if row.arrow else value
        if value is not None and not isinstance(value, kind):
            raise RowProblem(WRONG_TYPE, f"{column} is {type_name(value)}, not {said}")
        check_encodable(value, column)
        values[name] = value
    tools = values.get("tools")
    return {**(values.get("chat_template_kwargs") or {}), **({"tools": tools} if tools else {})}


_FOR_TEMPLATE = (("tools", list, "a list of tools"), ("chat_template_kwargs", dict, "an object"))
