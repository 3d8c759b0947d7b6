"""Table of the layouts that rows can have, and the search for their names among a source's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.data.reading.messages import is_json_messages
from pipeline.data.spec import DataSpec

Kind = Literal["sft", "preference", "unpaired", "prompt"]


@dataclass(frozen=True)
class Layout:
    """One layout: canonical names of the columns that it needs, and of those that it takes if present."""

    name: str
    preference: bool
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    value_type: type | None = None
    """Type of the first needed column, where two layouts have the same columns."""
    labelled: bool = False
    """True: each row has one answer and says whether it is desirable."""
    exact: frozenset[str] = frozenset()
    """Canonical names for which no alias is accepted in this layout."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every canonical name that `columns:` can give for this layout."""
        return (*self.needs, *self.takes)


_TURNS = ("system", "tools", "chat_template_kwargs")
_ASKED = ("history", *_TURNS)
_INSTRUCTED = ("input", *_ASKED)
_PAIR = ("margin",)

LAYOUTS: tuple[Layout, ...] = (
    Layout("preference", True, ("prompt", "chosen", "rejected"), _ASKED + _PAIR),
    Layout("question_preference", True, ("question", "chosen", "rejected"), _ASKED + _PAIR),
    Layout(
        "instruction_preference",
        True,
        ("instruction", "chosen_response", "rejected_response"),
        _INSTRUCTED + _PAIR,
    ),
    Layout("messages_preference", True, ("messages", "chosen", "rejected"), _TURNS + _PAIR),
    Layout("rejected_response", True, ("messages", "rejected_response"), _TURNS + _PAIR),
    Layout("preference_conversations", True, ("chosen", "rejected"), _TURNS + _PAIR, list),
    Layout("preference_transcripts", True, ("chosen", "rejected"), _TURNS + _PAIR, str),
    Layout("prompt_completion_label", False, ("prompt", "completion", "label"), _ASKED, labelled=True),
    Layout("messages_label", False, ("messages", "label"), _TURNS, labelled=True),
    Layout("question_answer_label", False, ("question", "answer", "label"), _ASKED, labelled=True),
    Layout("instruction_label", False, ("instruction", "output", "label"), _INSTRUCTED, labelled=True),
    Layout("prompt_completion", False, ("prompt", "completion"), _ASKED),
    Layout("messages", False, ("messages",), _TURNS, exact=frozenset({"messages"})),
    Layout("conversations", False, ("conversations",), _TURNS),
    Layout("instruction", False, ("instruction", "output"), _INSTRUCTED),
    Layout("query_calls", False, ("query", "tools", "answers"), ("system", "chat_template_kwargs")),
    Layout("problem_solution", False, ("problem", "solution"), _ASKED),
    Layout("question_answer", False, ("question", "answer"), _ASKED),
    Layout("transcript", False, ("chat",), _TURNS),
    Layout("text", False, ("text",)),
    Layout("prompt", False, ("prompt",), ("answer", *_ASKED)),
    Layout("question", False, ("question",), ("answer", *_ASKED)),
)
"""Most specific first: the first one whose columns are there is taken."""

_PROMPTS_ONLY = ("prompt", "question")
_NO_PROMPTS = ("text", "question_answer", "problem_solution", "query_calls")
"""`question` stands in their place: an evaluation's answer may be a number, or missing."""

ALIASES: dict[str, tuple[str, ...]] = {
    "completion": ("response",),
    "output": ("response",),
    "answer": ("response",),
    "question": ("query", "problem"),
    "messages": ("conversations", "conversation"),
    "conversations": ("conversation",),
    "input": ("context",),
    "system": ("system_prompt",),
    "chosen_response": ("chosen",),
    "rejected_response": ("rejected",),
    "label": ("kto_tag",),
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
    return [_as_prompts(x) for x in LAYOUTS if x.name not in _NO_PROMPTS and not x.labelled]


def _as_prompts(layout: Layout) -> Layout:
    """The layout with the column `answer`, which has precedence over the layout's own answer."""
    if layout.name in _PROMPTS_ONLY:
        return layout
    return replace(layout, takes=(*layout.takes, "answer"), exact=layout.exact | {"answer", "completion"})


def column_of(canonical: str, layout: Layout, spec: DataSpec, found: Sequence[str]) -> str | None:
    """The column that holds `canonical`: what `columns:` says, or of that name, or of a known alias."""
    if canonical in spec.columns:
        return spec.columns[canonical]
    names = (canonical, *(() if canonical in layout.exact else ALIASES.get(canonical, ())))
    spoken_for = spec.columns.values()
    return next((c for c in names if c in found and c not in spoken_for), None)


def on_columns(layout: Layout, spec: DataSpec, found: Sequence[str]) -> Resolved | None:
    """The layout on these columns; None where it misses one, or can't use all that `columns:` says."""
    if not set(spec.columns) <= set(layout.names):
        return None
    needed = {c: column_of(c, layout, spec, found) for c in layout.needs}
    if None in needed.values() or len(set(needed.values())) < len(needed):
        return None
    columns = {c: column for c, column in needed.items() if column is not None}
    for name in layout.takes:
        column = column_of(name, layout, spec, found)
        if column is not None and column not in columns.values():
            columns[name] = column
    return Resolved(layout, columns)


def rows_with(resolved: Resolved, rows: Sequence[dict[str, Any]], *, nulls: bool = False) -> int:
    """Number of rows with a value (with `nulls`: at least the column) for all that the layout needs."""
    needed = [resolved.columns[c] for c in resolved.layout.needs]
    if nulls:
        return sum(all(c in row for c in needed) for row in rows)
    wanted = resolved.layout.value_type
    return sum(
        all(row.get(c) is not None for c in needed)
        and (wanted is None or isinstance(_as_list(row[needed[0]]), wanted))
        for row in rows
    )


def _as_list(value: Any) -> Any:
    """The value, or an empty list for a message list that a csv file holds as JSON text."""
    return [] if isinstance(value, str) and is_json_messages(value) else value
