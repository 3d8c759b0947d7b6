"""Messages for rows without a layout: a `columns:` that was tried on them, or other advice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.reading.bad_rows import RowProblem
from pipeline.data.reading.convert_row import convert
from pipeline.data.reading.field_values import true_or_false
from pipeline.data.reading.layouts import ALIASES, Kind, Layout, column_of, layouts_for, on_columns, rows_with
from pipeline.data.reading.raw_rows import Row
from pipeline.data.spec import DataSpec

STAGES_OF: dict[Kind, str] = {
    "sft": "an sft stage",
    "preference": "a dpo or reward stage",
    "unpaired": "a kto stage",
    "prompt": "prompts",
}
"""Kind of rows -> stages that take them, in messages."""

_QUESTIONS = (
    "question",
    "query",
    "instruction",
    "prompt",
    "problem",
    "input",
    "user",
    "human",
    "context",
    "post",
)
_ANSWERS = (
    "response",
    "answer",
    "output",
    "completion",
    "solution",
    "reply",
    "target",
    "assistant",
    "summary",
    "chosen",
)
_TURNS = ("conversation", "dialog", "dialogue", "chat", "turns", "data", "messages", "chosen")
_GOOD = (
    "chosen_response",
    "better",
    "preferred",
    "accepted",
    "winner",
    "response_chosen",
    "chosen_answer",
    "good",
)
_WORSE = (
    "rejected_response",
    "worse",
    "dispreferred",
    "loser",
    "response_rejected",
    "rejected_answer",
    "bad",
)

SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt", "question", "instruction"), _QUESTIONS),
    **dict.fromkeys(("completion", "answer", "output"), _ANSWERS),
    **dict.fromkeys(("messages", "conversations"), _TURNS),
    **dict.fromkeys(("chosen", "chosen_response"), _GOOD),
    **dict.fromkeys(("rejected", "rejected_response"), _WORSE),
    "label": ("labels", "desirable", "is_desirable", "thumbs_up", "liked", "correct", "is_correct"),
}
"""Columns that may well be what is missing. They are only proposed, unlike `ALIASES`."""

_NUMBERED = re.compile(r"^((?:response|answer|completion|output|human_ref)s?)_?(?:\d|[a-zA-Z])$")

_TRIED = 20
"""Rows that a proposal is tried on."""


def no_layout(spec: DataSpec, kind: Kind, found: list[str], rows: Sequence[dict[str, Any]]) -> str:
    """The reason why these columns are no layout for a stage of this kind, with a remedy."""
    start = f"data source {spec.source!r}: the columns {', '.join(found)} are no layout for {STAGES_OF[kind]}"
    proposal = suggestion(spec, kind, found, rows)
    if kind == "sft" and _fits("preference", spec, found, rows):
        chosen = f". To train on the chosen answers, write `columns: {proposal}`" if proposal else ""
        return f"{start}: they are preferences, which a dpo or reward stage takes{chosen}"
    if proposal:
        return f"{start}. Other names go under `columns:`{written(proposal)}"
    if (several := _several_answers(found, rows)) and kind != "prompt":
        form = {
            "sft": "one row for each answer to train, with prompt and completion",
            "unpaired": "one row for each answer, with prompt, completion and label",
        }.get(kind, "one row for each pair, with prompt, chosen and rejected")
        return f"{start}: several answers in a row ({several}); write {form}"
    label = next((c for c in ("label", *ALIASES["label"]) if c in found), None)
    if kind == "unpaired" and label is None and _fits("sft", spec, found, rows):
        return (
            f"{start}: they don't say which answers are desirable; add a column of true and false and name "
            "it `label`, or give pairs of a chosen and a rejected answer"
        )
    if kind == "preference" and _fits("sft", spec, found, rows):
        return (
            f"{start}: they hold one answer each, which an sft stage takes; a preference needs a chosen "
            "and a rejected one"
        )
    if kind != "prompt" and _fits("prompt", spec, found, rows):
        return (
            f"{start}: they hold prompts without answers, which online stages and evaluations take; answers "
            f"under another name need `columns:`"
        )
    known = "; ".join(dict.fromkeys(" + ".join(x.needs) for x in layouts_for(kind)))
    return f"{start}. Known: {known}. Other names go under `columns:`"


def suggestion(
    spec: DataSpec,
    kind: Kind,
    found: Sequence[str],
    rows: Sequence[dict[str, Any]],
    layouts: Sequence[Layout] | None = None,
) -> str:
    """`{prompt: query, completion: reply}` where that makes a layout of these rows, else empty.

    What `columns:` says already is kept. Every proposal is tried: rows have to come out of it.
    """
    for layout in sorted(layouts or layouts_for(kind), key=lambda x: len(_missing(x, spec, found))):
        missing = _missing(layout, spec, found)
        used = [column_of(c, layout, spec, found) for c in layout.needs]
        free = [c for c in found if c not in used and c not in spec.columns.values()]
        proposed: dict[Any, str] = {}
        for canonical in missing:
            column = next(iter(_candidates(canonical, [c for c in free if c not in proposed.values()])), None)
            if column is not None:
                proposed[canonical] = column
        if missing and len(proposed) == len(missing):
            mapped = spec.model_copy(update={"columns": {**spec.columns, **proposed}})
            if _works(mapped, layout, kind, found, rows):
                return f"{{{', '.join(f'{c}: {column}' for c, column in mapped.columns.items())}}}"
    return ""


def written(proposal: str) -> str:
    """A proposal as the end of a message; empty without one."""
    return f", for example `columns: {proposal}`" if proposal else ""


def _missing(layout: Layout, spec: DataSpec, found: Sequence[str]) -> list[str]:
    return [c for c in layout.needs if column_of(c, layout, spec, found) is None]


def _candidates(canonical: str, free: Sequence[str]) -> Iterable[str]:
    written_so = {column.lower().replace(" ", "_").replace("-", "_"): column for column in free}
    names = (canonical, *ALIASES.get(canonical, ()), *SYNONYMS.get(canonical, ()))
    yield from (written_so[name] for name in names if name in written_so)
    # A misspelling: nearer than `label` and `level`, `answer` and `answer_0`, `text` and `context`.
    yield from difflib.get_close_matches(canonical, free, 1, 0.88)


def _works(
    spec: DataSpec, layout: Layout, kind: Kind, found: Sequence[str], rows: Sequence[dict[str, Any]]
) -> bool:
    resolved = on_columns(layout, spec, found)
    if resolved is None or not rows_with(resolved, rows[:_TRIED]):
        return False
    for number, row in enumerate(rows[:_TRIED], 1):
        try:
            convert(Row(spec.source, number, row), resolved, kind)
            if kind == "unpaired" and layout.labelled:
                true_or_false(row.get(resolved.columns["label"]), "label")
            return True
        except RowProblem:
            continue
    return False


def _fits(kind: Kind, spec: DataSpec, found: Sequence[str], rows: Sequence[dict[str, Any]]) -> bool:
    candidates = [on_columns(layout, spec, found) for layout in layouts_for(kind)]
    return any(c is not None and rows_with(c, rows) for c in candidates)


def _several_answers(found: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Names of the columns that hold several answers of one prompt; empty where there are none.

    One column of ranked or scored answers (Nectar, UltraFeedback), or numbered columns (PKU-SafeRLHF, SHP).
    """
    numbered: dict[str, list[str]] = {}
    for column in found:
        if match := _NUMBERED.match(column):
            numbered.setdefault(match[1], []).append(column)
    if columns := next((" and ".join(f"`{c}`" for c in x) for x in numbered.values() if len(x) > 1), ""):
        return columns
    for row in rows[:_TRIED]:
        for column in found:
            value = row.get(column)
            if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], dict):
                continue
            if {"answer", "response", "completion", "text"} & value[0].keys() and "role" not in value[0]:
                return f"`{column}`"
    return ""
