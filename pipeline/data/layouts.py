"""Which layout rows have: the table, and how it is recognised from the columns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.errors import UserError
from pipeline.data.spec import DataSpec

Kind = Literal["sft", "preference", "unpaired", "prompt"]

LOOKED_AT = 100
"""Rows that recognition looks at: enough to see past a few damaged ones."""


@dataclass(frozen=True)
class Layout:
    """Canonical column names that a layout needs and those it takes when they are there."""

    name: str
    preference: bool
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    value_type: type | None = None
    """Type of the first needed column, where two layouts have the same columns."""
    labelled: bool = False
    """Whether each row says of its one answer if it is desirable."""


_EXTRAS = ("system", "tools", "chat_template_kwargs")

LAYOUTS: tuple[Layout, ...] = (
    Layout("preference", True, ("prompt", "chosen", "rejected"), _EXTRAS),
    Layout("question_preference", True, ("question", "chosen", "rejected"), _EXTRAS),
    Layout(
        "instruction_preference",
        True,
        ("instruction", "chosen_response", "rejected_response"),
        ("input", *_EXTRAS),
    ),
    Layout("rejected_response", True, ("messages", "rejected_response"), _EXTRAS),
    Layout("preference_conversations", True, ("chosen", "rejected"), _EXTRAS, list),
    Layout("preference_transcripts", True, ("chosen", "rejected"), _EXTRAS, str),
    Layout("prompt_completion_label", False, ("prompt", "completion", "label"), _EXTRAS, labelled=True),
    Layout("messages_label", False, ("messages", "label"), _EXTRAS, labelled=True),
    Layout("question_answer_label", False, ("question", "answer", "label"), _EXTRAS, labelled=True),
    Layout("prompt_completion", False, ("prompt", "completion"), _EXTRAS),
    Layout("messages", False, ("messages",), _EXTRAS),
    Layout("conversations", False, ("conversations",), _EXTRAS),
    Layout("instruction", False, ("instruction", "output"), ("input", *_EXTRAS)),
    Layout("question_answer", False, ("question", "answer"), _EXTRAS),
    Layout("text", False, ("text",)),
    Layout("prompt", False, ("prompt",), ("answer", *_EXTRAS)),
    Layout("question", False, ("question",), ("answer", *_EXTRAS)),
)
"""Most specific first: the first one whose columns are there is taken."""

_PROMPTS_ONLY = ("prompt", "question")

ALIASES: dict[str, tuple[str, ...]] = {
    "output": ("response",),
    "answer": ("response",),
    "input": ("context",),
    "system": ("system_prompt",),
    "chosen_response": ("chosen",),
    "rejected_response": ("rejected",),
}
"""Names that well-known data sets use for a canonical column."""


@dataclass(frozen=True)
class Resolved:
    """A layout on the columns of one source."""

    layout: Layout
    columns: dict[str, str]
    """Canonical name -> column, for every needed column and those taken."""


def layouts_for(kind: Kind) -> list[Layout]:
    """Layouts that a stage of this kind can use. Evaluation takes the prompt out of any that has one."""
    if kind == "sft":
        return [x for x in LAYOUTS if not (x.preference or x.labelled) and x.name not in _PROMPTS_ONLY]
    if kind == "unpaired":
        return [x for x in LAYOUTS if x.labelled or x.preference]
    if kind == "preference":
        return [x for x in LAYOUTS if x.preference]
    # `question` in place of question_answer: an evaluation's answer may be a number, or missing.
    return [x for x in LAYOUTS if x.name not in ("text", "question_answer") and not x.labelled]


def resolve_layout(rows: Sequence[dict[str, Any]], spec: DataSpec, kind: Kind) -> Resolved:
    """The layout of a source's rows: the explicit one, or the first that most of the rows have.

    UserError names the columns found, what would be needed, and the nearest `columns:` mapping.
    """
    rows = [row for row in rows[:LOOKED_AT] if row]
    found = list(dict.fromkeys(column for row in rows for column in row))
    if unknown := [f"{name}: {column}" for name, column in spec.columns.items() if column not in found]:
        raise UserError(
            f"data source {spec.source!r}: `columns` names columns that no row has ({', '.join(unknown)}); "
            f"the rows have: {', '.join(found) or 'nothing'}"
        )
    if spec.layout is not None:
        return _explicit(spec, kind, found)
    candidates = [_on_columns(layout, spec, found) for layout in layouts_for(kind)]
    counts = [_rows_with(candidate, rows) if candidate else 0 for candidate in candidates]
    for wanted in (len(rows) / 2, 1):
        for candidate, count in zip(candidates, counts, strict=True):
            if candidate is not None and count >= max(wanted, 1):
                return candidate
    raise UserError(_no_layout(spec, kind, found, rows))


def _explicit(spec: DataSpec, kind: Kind, found: list[str]) -> Resolved:
    layout = next(x for x in LAYOUTS if x.name == spec.layout)
    if layout not in layouts_for(kind):
        names = ", ".join(x.name for x in layouts_for(kind))
        raise UserError(
            f"data source {spec.source!r}: layout {layout.name} has no {kind} rows; those that do: {names}"
        )
    resolved = _on_columns(layout, spec, found)
    if resolved is None:
        missing = [c for c in layout.needs if _column(c, spec, found) is None]
        raise UserError(
            f"data source {spec.source!r}: layout {layout.name} needs the columns {', '.join(missing)}; "
            f"the rows have: {', '.join(found)}{_mapping_hint(missing, found)}"
        )
    return resolved


def _column(canonical: str, spec: DataSpec, found: list[str]) -> str | None:
    if canonical in spec.columns:
        return spec.columns[canonical]
    return next((c for c in (canonical, *ALIASES.get(canonical, ())) if c in found), None)


def _on_columns(layout: Layout, spec: DataSpec, found: list[str]) -> Resolved | None:
    needed = {c: _column(c, spec, found) for c in layout.needs}
    if None in needed.values() or len(set(needed.values())) < len(needed):
        return None
    taken = {c: column for c in layout.takes if (column := _column(c, spec, found)) is not None}
    return Resolved(layout, {**taken, **{c: column for c, column in needed.items() if column is not None}})


def _rows_with(resolved: Resolved, rows: Sequence[dict[str, Any]]) -> int:
    needed = [resolved.columns[c] for c in resolved.layout.needs]
    wanted = resolved.layout.value_type
    return sum(
        all(c in row for c in needed) and (wanted is None or isinstance(_as_json(row[needed[0]]), wanted))
        for row in rows
    )


def _as_json(value: Any) -> Any:
    """A list for a message list that a csv file holds as JSON text."""
    return [] if isinstance(value, str) and value.startswith("[{") else value


STAGES_OF: dict[Kind, str] = {
    "sft": "an sft stage",
    "preference": "a dpo or reward stage",
    "unpaired": "a kto stage",
    "prompt": "prompts",
}
"""Who takes rows of a kind."""


def _no_layout(spec: DataSpec, kind: Kind, found: list[str], rows: Sequence[dict[str, Any]]) -> str:
    start = f"data source {spec.source!r}: the columns {', '.join(found)} are no layout for "
    start += STAGES_OF[kind]
    if kind == "sft" and _fits("preference", spec, found, rows):
        return (
            f"{start}: they are preferences, which a dpo or reward stage takes. To train on the chosen "
            "answers, write `columns: {completion: chosen}`"
        )
    if kind == "unpaired" and _fits("sft", spec, found, rows):
        return (
            f"{start}: they don't say which answers are desirable; add a column of true and false and name "
            "it `label`, or give pairs of a chosen and a rejected answer"
        )
    if kind == "preference" and _fits("sft", spec, found, rows):
        return (
            f"{start}: they hold one answer each, which an sft stage takes; a preference needs a chosen "
            "and a rejected one"
        )
    known = "; ".join(" + ".join(x.needs) for x in layouts_for(kind))
    needed = list(dict.fromkeys(c for x in layouts_for(kind) for c in x.needs))
    hint = _mapping_hint(needed, found)
    return f"{start}. Known: {known}. Other names go under `columns:`{hint}"


def _fits(kind: Kind, spec: DataSpec, found: list[str], rows: Sequence[dict[str, Any]]) -> bool:
    candidates = [_on_columns(layout, spec, found) for layout in layouts_for(kind)]
    return any(c is not None and _rows_with(c, rows) for c in candidates)


def _mapping_hint(missing: list[str], found: list[str]) -> str:
    pairs = [(c, near[0]) for c in missing if (near := difflib.get_close_matches(c, found, 1, 0.6))]
    return f", for example `columns: {{{', '.join(f'{c}: {f}' for c, f in pairs)}}}`" if pairs else ""
