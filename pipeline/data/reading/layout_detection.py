"""Finds the layout of a source's rows: as `layout:` and `columns:` say, else by the columns' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.errors import UserError
from pipeline.data.reading.field_values import is_blank
from pipeline.data.reading.layout_hints import STAGES_OF, no_layout, suggestion, written
from pipeline.data.reading.layouts import (
    ALIASES,
    Kind,
    Layout,
    Resolved,
    column_of,
    layouts_for,
    on_columns,
    rows_with,
)
from pipeline.data.spec import DataSpec

LOOKED_AT = 200
"""Rows, spread over all of them, that layouts are tried on: enough to see past damaged ones."""


def resolve_layout(rows: Sequence[dict[str, Any]], spec: DataSpec, kind: Kind) -> Resolved:
    """The layout of a source's rows: the explicit one, or the first that most of the rows have.

    A column counts if any row has it. UserError names the columns found, what would be needed, and a
    `columns:` that was tried on these rows.
    """
    rows = [row for row in rows if row]
    shapes = dict.fromkeys(tuple(row) for row in rows)
    found = list(dict.fromkeys(column for shape in shapes for column in shape))
    _check_mapped(spec, kind, found)
    if spec.layout is not None:
        return _explicit(spec, kind, found, rows)
    candidates = [x for x in (on_columns(y, spec, found) for y in layouts_for(kind)) if x is not None]
    some = rows[:: max(1, len(rows) // LOOKED_AT)]
    counts = [rows_with(candidate, some) for candidate in candidates]
    chosen = next((x for x, n in zip(candidates, counts, strict=True) if n >= max(len(some) / 2, 1)), None)
    chosen = chosen or next((x for x in candidates if rows_with(x, rows)), None)
    # A column without a single value: then each row is reported as a bad row.
    chosen = chosen or next((x for x in candidates if rows_with(x, rows, nulls=True)), None)
    if chosen is None:
        raise UserError(no_layout(spec, kind, found, rows))
    if chosen.layout.name == "text" and {"parent_id", "role"} <= set(found) and not spec.columns:
        raise UserError(
            f"data source {spec.source!r}: each row is one message of a tree ({', '.join(found)}): join the "
            "messages from a root to a leaf into one row with `messages`, or set `layout: text` to train "
            "each message as plain text"
        )
    return _with_values(chosen, spec, found, rows)


def _with_values(
    chosen: Resolved, spec: DataSpec, found: list[str], rows: Sequence[dict[str, Any]]
) -> Resolved:
    """Replace an optional column without any value by its alias: `system` by `system_prompt`."""
    columns = dict(chosen.columns)
    for name in chosen.layout.takes:
        others = [c for c in ALIASES.get(name, ()) if c in found and c not in columns.values()]
        if columns.get(name) != name or name in spec.columns or not others or name in chosen.layout.exact:
            continue
        filled = (c for c in (name, *others) if any(not is_blank(row.get(c)) for row in rows))
        columns[name] = next(filled, name)
    return Resolved(chosen.layout, columns)


def _check_mapped(spec: DataSpec, kind: Kind, found: list[str]) -> None:
    """Refuse entries of `columns:` that name no column, name one twice, or that nothing would read."""
    start = f"data source {spec.source!r}: `columns`"
    if unknown := [f"{name}: {column}" for name, column in spec.columns.items() if column not in found]:
        raise UserError(
            f"{start} names columns that no row has ({', '.join(unknown)}); "
            f"the rows have: {', '.join(found) or 'nothing'}"
        )
    for column in (columns := list(spec.columns.values())):
        if columns.count(column) > 1:
            twice = [name for name, c in spec.columns.items() if c == column]
            raise UserError(f"{start} gives {column!r} to {' and '.join(twice)}: one of them can have it")
    layouts = layouts_for(kind)
    names = dict.fromkeys(name for layout in layouts for name in layout.names)
    if unread := [name for name in spec.columns if name not in names]:
        raise UserError(
            f"{start} says what {', '.join(unread)} is, which {STAGES_OF[kind]} does not read; it reads "
            f"{', '.join(names)}"
        )
    together = [layout for layout in layouts if set(spec.columns) <= set(layout.names)]
    if not together:
        near = [x for x in layouts if set(spec.columns) & set(x.needs)]
        raise UserError(
            f"{start}: no layout reads {', '.join(spec.columns)} together; those that read some of them: "
            f"{'; '.join(_said(layout) for layout in near)}"
        )


def _said(layout: Layout) -> str:
    return f"{layout.name} ({', '.join(layout.needs)}; with {', '.join(layout.takes) or 'nothing else'})"


def _explicit(spec: DataSpec, kind: Kind, found: list[str], rows: Sequence[dict[str, Any]]) -> Resolved:
    start = f"data source {spec.source!r}"
    layout = next((x for x in layouts_for(kind) if x.name == spec.layout), None)
    if layout is None:
        names = ", ".join(x.name for x in layouts_for(kind))
        raise UserError(f"{start}: layout {spec.layout} has no {kind} rows; those that do: {names}")
    if unread := [name for name in spec.columns if name not in layout.names]:
        raise UserError(
            f"{start}: layout {layout.name} does not read {', '.join(unread)}, which `columns` names; it "
            f"reads {', '.join(layout.names)}"
        )
    resolved = on_columns(layout, spec, found)
    if resolved is None:
        missing = [c for c in layout.needs if column_of(c, layout, spec, found) is None]
        raise UserError(
            f"{start}: layout {layout.name} needs the columns {', '.join(missing or layout.needs)}; the rows "
            f"have: {', '.join(found)}{written(suggestion(spec, kind, found, rows, [layout]))}"
        )
    return resolved
