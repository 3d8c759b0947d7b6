"""Prints rows as they were read, their tokens, and which of these are trained (`raylign inspect`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from actors.errors import UserError
from pipeline.data.reading.bad_rows import LISTED, Skipped
from pipeline.data.reading.layout_detection import resolve_layout
from pipeline.data.reading.layouts import Kind
from pipeline.data.reading.raw_rows import describe_files
from pipeline.data.reading.records import Record, Records, load_records
from pipeline.data.reading.sources import read_rows
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import TokenizedData, Truncation, prompt_rows, tokenize

_CONTEXT, _ANSWER = 600, 1200
"""Characters shown of a stretch that doesn't count and of one that does; the middle is left out."""

_ROLE_STYLE = {"system": "magenta", "user": "cyan", "assistant": "green"}


def inspect(
    specs: list[DataSpec],
    tokenizer: Any,
    *,
    kind: Kind | None = None,
    rows: int = 3,
    max_length: int | None = None,
    truncation: Truncation = "keep_start",
    train_on: Literal["answer", "all"] = "answer",
    seed: int = 0,
    vocab_size: int | None = None,
    console: Console | None = None,
    reading: AbstractContextManager[object] | None = None,
) -> int:
    """Print `rows` rows with their tokens and loss mask, then counts, lengths and what was skipped.

    Without `kind` it follows from the layout. Bad rows are listed whatever `on_bad_row` says, so that they
    can be looked at; the number of those at which a run would stop is returned. UserError only where nothing
    can be shown. `vocab_size`: rows of the base's embedding. `reading`: entered while rows and tokens are
    read, before anything is printed.
    """
    console = console or Console()
    limits = {"max_length": max_length, "truncation": truncation, "train_on": train_on}
    with reading or nullcontext():
        kind = kind or kind_of(specs[0], seed)
        found = _read(specs, kind, seed, tokenizer, vocab_size, limits)
        strict = [spec for spec in specs if spec.on_bad_row == "error"]
        stops = found.skipped.total if strict else 0
        if 0 < len(strict) < len(specs):
            stops = _read(strict, kind, seed, tokenizer, vocab_size, limits).skipped.total
    if found.data is None:
        for index in range(min(rows, len(found.records))):
            record = found.records[index]
            body = [_messages(record.prompt), Text(_middle_out(found.texts[index], _ANSWER), style="dim")]
            console.print(_panel(record, index, [*body, _columns(record)]))
        lines = [("tokens a prompt", _spread([len(x) for x in found.ids]))]
        _print_counts(console, found.records, lines, found.skipped, stops)
        return stops
    console.print(_legend(console))
    for index in range(min(rows, found.data.n_rows)):
        record = found.records[int(found.data.record_index[index])]
        console.print(_panel(record, index, _row(record, found.data, index, tokenizer, console)))
    _print_counts(console, found.records, _token_lines(found.data, max_length), found.skipped, stops)
    return stops


@dataclass(frozen=True)
class _Read:
    """Rows that can be used, those that can't, and the tokens of the former: of prompts `texts` and `ids`."""

    records: Records
    skipped: Skipped
    data: TokenizedData | None = None
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


def _read(
    specs: list[DataSpec],
    kind: Kind,
    seed: int,
    tokenizer: Any,
    vocab_size: int | None,
    limits: dict[str, Any],
) -> _Read:
    specs = [spec.model_copy(update={"on_bad_row": "skip"}) for spec in specs]
    records = load_records(specs, kind, seed=seed)
    if records.kind == "prompt":
        records, texts, ids = prompt_rows(records, tokenizer, vocab_size)
        if not ids:
            raise UserError(f"no prompt can be used ({records.skipped.summary()})")
        return _Read(records, records.skipped, None, texts, ids)
    data = tokenize(records, tokenizer, vocab_size=vocab_size, **limits)
    return _Read(records, data.skipped, data)


def kind_of(spec: DataSpec, seed: int = 0) -> Kind:
    """Kind of a source's rows: preferences, answers with a label, sft, or prompts only."""
    read = read_rows(spec, seed=seed, max_rows=100)
    rows = [row.values for row in read if row.problem is None]
    if not rows:
        bad = [str(row.problem) for row in read[:LISTED]]
        raise UserError(bad or f"data source {spec.source!r}: no rows (split {spec.split})")
    for kind in ("preference", "unpaired", "sft"):
        try:
            resolve_layout(rows, spec, kind)
        except UserError:
            continue
        return kind
    resolve_layout(rows, spec, "prompt")
    return "prompt"


def _legend(console: Console) -> Text:
    text = Text("tokens that count in the loss: ")
    return text.append_text(_counted("like this", console))


def _counted(text: str, console: Console) -> Text:
    """Colour on a terminal; brackets where colour would be lost."""
    if console.is_terminal and not console.no_color:
        return Text(text, style="bold black on green")
    return Text(f"[[{text}]]")


def _panel(record: Record, index: int, body: list[Any]) -> Panel:
    title = Text(f"row {index + 1}: {record.file}:{record.row}")
    return Panel(Group(*body), title=title, title_align="left")


def _row(record: Record, data: TokenizedData, index: int, tokenizer: Any, console: Console) -> list[Any]:
    per_row = data.sequences.sequences_per_row
    names = ("chosen", "rejected") if per_row == 2 else ("",)
    body: list[Any] = [] if record.is_text else [_messages(record.prompt)]
    for which, name in enumerate(names):
        if not record.is_text:
            body.append(_messages(record.answers[which], name))
    for which, name in enumerate(names):
        body.append(_tokens(data, index * per_row + which, name, tokenizer, console))
    body.append(_columns(record))
    return [part for part in body if part.plain]


def _messages(messages: list[dict[str, Any]], name: str = "") -> Text:
    text = Text()
    for message in messages:
        role = f"{message['role']} ({name})" if name else message["role"]
        style = "red" if name == "rejected" else _ROLE_STYLE.get(message["role"], "yellow")
        text.append(f"{role}: ", style=f"bold {style}")
        text.append(_middle_out(message["content"], _ANSWER) + "\n")
        if message.get("tool_calls"):
            text.append(f"  tool calls: {message['tool_calls']}\n", style="dim")
    text.rstrip()
    return text


def _columns(record: Record) -> Text:
    if not record.columns:
        return Text()
    values = ", ".join(f"{k}={_middle_out(str(v), 80)!r}" for k, v in record.columns.items())
    return Text(f"other columns: {values}", style="dim")


def _tokens(data: TokenizedData, sequence: int, name: str, tokenizer: Any, console: Console) -> Text:
    """One sequence as text, cut into stretches that count and that don't."""
    span = slice(data.sequences.offsets[sequence], data.sequences.offsets[sequence + 1])
    ids, mask = data.sequences.token_ids[span], data.sequences.loss_mask[span]
    text = Text(f"{name or 'tokens'} ({len(ids)}, {int(mask.sum())} count): ", style="bold")
    edges = np.flatnonzero(np.diff(mask)) + 1
    for stretch, counts in zip(np.split(ids, edges), np.split(mask, edges), strict=True):
        words = tokenizer.decode(stretch.tolist(), skip_special_tokens=False)
        if counts[0]:
            text.append_text(_counted(_middle_out(words, _ANSWER), console))
        else:
            text.append(_middle_out(words, _CONTEXT), style="not bold dim")
    return text


def _token_lines(data: TokenizedData, max_length: int | None) -> list[tuple[str, str]]:
    stats = data.stats
    lines = [
        ("rows to train on", f"{stats.rows:,}"),
        ("tokens", f"{stats.tokens:,}, of which {stats.label_tokens:,} count in the loss"),
        ("tokens a sequence", _spread(data.lengths.tolist())),
        ("of which count", _spread(data.sequences.label_counts.tolist())),
        ("form", ", ".join(f"{n:,} rows as {_FORMS[form]}" for form, n in stats.formats.items())),
    ]
    if stats.truncated:
        cut = f"{stats.truncated:,} sequences, {stats.cut_tokens:,} tokens left out"
        lines.append((f"cut at max_length {max_length}", cut))
    if stats.masking:
        lines.append(("answers found by", stats.masking))
    if stats.rendered:
        said = f"{stats.rendered:,} of the texts hold turns of the chat template; they are trained unchanged"
        lines.append(("rendered already", said))
    if stats.merged_boundaries:
        said = (
            f"{stats.merged_boundaries:,} rows: the prompt alone is rendered otherwise than before an answer"
        )
        lines.append(("merged boundaries", said))
    return lines


_FORMS = {"chat": "chat (through the base's template)", "text": "plain text"}


def _print_counts(
    console: Console, records: Records, lines: list[tuple[str, str]], skipped: Skipped, stops: int
) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for use in records.sources:
        used = f"{use.rows_used:,} of {use.rows_read:,} rows, layout {use.layout}"
        table.add_row(Text(use.spec.source, style="bold"), Text(used))
        table.add_row(
            Text("read", style="bold"), Text(describe_files(use.spec.source, use.spec.split, use.files))
        )
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(value))
    table.add_row(Text("can't be used", style="bold"), Text(skipped.summary() or "nothing"))
    console.print(table)
    for row in skipped.listing:
        console.print(Text(f"  {row}", style="yellow"))
    if skipped.total > len(skipped.listing):
        console.print(Text(f"  ... and {skipped.total - len(skipped.listing)} more", style="yellow"))
    if stops:
        which = "these rows" if stops == skipped.total else f"{stops:,} of these rows"
        console.print(
            Text(f"a run stops at {which}; with `on_bad_row: skip` on their source it leaves them out")
        )


def _spread(values: list[int]) -> str:
    low, middle, high, longest = np.percentile(values, [5, 50, 95, 100]).astype(int)
    return f"5 % {low:,}   median {middle:,}   95 % {high:,}   longest {longest:,}"


def _middle_out(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} [... {len(text) - limit:,} characters ...] {text[-limit // 2 :]}"
