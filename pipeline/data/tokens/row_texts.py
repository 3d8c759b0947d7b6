"""Renders records as the texts that are tokenised, with the part of each that is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from actors.errors import UserError
from pipeline.data.reading.bad_rows import LEFT_OUT, NOT_TRAINED, PROMPT_CHANGES, BadRow, RowGate, RowProblem
from pipeline.data.reading.messages import Message
from pipeline.data.reading.records import Record, Records
from pipeline.data.tokens.chat_format import WHAT_TO_DO, ChatFormat, Span, Unmaskable
from pipeline.data.tokens.chat_templates import RowFormat, Templates
from pipeline.data.tokens.completeness import Rendering, last_end
from pipeline.data.tokens.control_tokens import ControlTokens
from pipeline.monitoring.phases import counted


@dataclass(frozen=True)
class RowText:
    """One row as text. Trained are the answer after `prompt`, or the `spans`, or everything."""

    record: int
    chat: bool
    """Rendered by the chat template, which writes the special tokens itself."""
    sequences: list[str]
    """One for SFT, (chosen, rejected) for preferences."""
    prompt: str | None = None
    """The part before the answers, tokenised on its own as well."""
    spans: list[list[Span]] | None = None
    """For each sequence, the characters that are trained."""


@dataclass
class RowTexts:
    """All rows as texts, with counts of how they were made."""

    rows: list[RowText]
    formats: Counter[str] = field(default_factory=Counter)
    masking: str = ""
    rendered: int = 0
    """Rows of plain text that hold turns of the template already; they are trained, and the user is told."""
    incomplete: set[ChatFormat] = field(default_factory=set)
    """Formats whose templates left out something of a row."""


class TextMaker:
    """Renders records for one tokenizer: plain strings as they stand, the rest through its template."""

    def __init__(self, records: Records, tokenizer: Any) -> None:
        self._records, self._tokenizer = records, tokenizer
        self._templates = Templates(tokenizer)

    @cached_property
    def _eos(self) -> str:
        if not self._tokenizer.eos_token:
            raise UserError(
                "the base's tokenizer has no end-of-text token (eos_token): a model can't learn to stop"
            )
        return self._tokenizer.eos_token

    def training_rows(self, gate: RowGate, train_on: str) -> RowTexts:
        """Every record that can be rendered; the others go to `gate`.

        Rows of which the template leaves something out are tried with TRL's training template of the same
        model, where there is one. UserError when the template is missing or can't be masked, with what to do.
        """
        result, bad = self._masked_rows(train_on)
        if result.incomplete and (templates := self._templates.with_training(result.incomplete)):
            own, self._templates = self._templates, templates
            try:
                other = self._masked_rows(train_on)
            except UserError:
                other = result, bad
            if len(other[1]) < len(bad):
                result, bad = other
            else:
                self._templates = own
        for row, on_bad_row in bad:
            gate.add(row, on_bad_row)
        return result

    def _masked_rows(self, train_on: str) -> tuple[RowTexts, list[tuple[BadRow, str]]]:
        """Call `_training_rows`, with TRL's training template where the tokenizer's own can't be masked."""
        while True:
            try:
                return self._training_rows(train_on)
            except Unmaskable as error:
                templates = self._templates.with_training([error.args[0]])
            if templates is None:
                raise UserError(
                    "the base's chat template changes earlier turns when a message is added, so that the "
                    f"assistant's turns can't be told from the rest: {WHAT_TO_DO}"
                )
            self._templates = templates

    def prompts(self, gate: RowGate) -> Iterator[tuple[int, bool, str]]:
        """(record, whether by chat template, text up to where the answer begins); bad rows go to `gate`."""
        records = self._records.rows
        for index, record in enumerate(counted(records, "rendered", len(records))):
            try:
                text = self._prompt(record) if self._is_chat(record) else None
            except RowProblem as problem:
                gate.add(*self._records.bad(record, problem))
                continue
            yield index, text is not None, text if text is not None else (record.plain or ("",))[0]

    def _prompt(self, record: Record) -> str:
        way = self._templates.of(record.template_kwargs)
        way.control.check(record.prompt, record.plain)
        text = way.chat.render(record.prompt, record.template_kwargs, for_generation=True)
        made = Rendering(text, None, frozenset(), len(record.prompt))
        way.complete.check(record.prompt, record.template_kwargs, made)
        return text

    def _training_rows(self, train_on: str) -> tuple[RowTexts, list[tuple[BadRow, str]]]:
        result = RowTexts([])
        bad: list[tuple[BadRow, str]] = []
        records = self._records.rows
        for index, record in enumerate(counted(records, "rendered", len(records))):
            way = self._templates.of(record.template_kwargs) if self._is_chat(record) else None
            try:
                row = self._chat_row(index, record, way, train_on) if way else self._plain_row(index, record)
            except RowProblem as problem:
                bad.append(self._records.bad(record, problem))
                if way and problem.reason in (LEFT_OUT, PROMPT_CHANGES):
                    result.incomplete.add(way.chat)
                continue
            if way and row.spans is not None:
                result.masking = way.masking
            result.formats["chat" if way else "text"] += 1
            result.rendered += not way and self._holds_turns(row)
            result.rows.append(row)
        return result, bad

    def _is_chat(self, record: Record) -> bool:
        if record.plain is None:
            return True
        if record.is_text:
            return False
        wanted = self._records.sources[record.source].spec.format
        return wanted == "chat" or (wanted == "auto" and bool(self._tokenizer.chat_template))

    def _plain_row(self, index: int, record: Record) -> RowText:
        prompt, *answers = record.plain or ("",)
        # Text that went through a template may have a line break behind its last token.
        ended = [a if a.rstrip().endswith(self._eos) else a + self._eos for a in answers]
        return RowText(index, False, [prompt + a for a in ended], None if record.is_text else prompt)

    @cached_property
    def _control(self) -> ControlTokens | None:
        """Control tokens of the template, which plain text does not go through; None without a usable one."""
        try:
            return self._templates.of({}).control if self._tokenizer.chat_template else None
        except UserError:
            return None

    def _holds_turns(self, row: RowText) -> bool:
        return self._control is not None and any(map(self._control.begins_turn, row.sequences))

    def _chat_row(self, index: int, record: Record, way: RowFormat, train_on: str) -> RowText:
        prompt, kwargs = record.prompt, record.template_kwargs
        sequences, spans = [], []
        for answer in record.answers:
            whole = [*prompt, *answer]
            way.control.check(whole, record.plain)
            made = _render(way.chat, record, whole, train_on)
            way.complete.check(whole, kwargs, made)
            sequences.append(made.text)
            spans.append(made.spans)
        if train_on == "all" and record.untrained:
            spans = [_all_but(way.chat, record, text) for text in sequences]
        known = [found for found in spans if found is not None]
        if known:
            return RowText(index, True, sequences, None, known)
        head = way.chat.render(prompt, kwargs, for_generation=True) if prompt else None
        if head is not None and train_on != "all":
            _check_prompt_stays(head, sequences, prompt)
        return RowText(index, True, sequences, head)


def _render(chat: ChatFormat, record: Record, whole: list[Message], train_on: str) -> Rendering:
    """A conversation as text with its trained spans. RowProblem when there are none."""
    first, kwargs = len(record.prompt), record.template_kwargs
    speaks = [i for i, message in enumerate(whole) if message["role"] == "assistant" and i >= first]
    trained = [i for i in speaks if i not in record.untrained]
    if not trained:
        raise RowProblem(NOT_TRAINED, "its own flags leave every turn of the assistant out of the loss")
    if train_on == "all":
        return Rendering(chat.render(whole, kwargs), None, frozenset(), 0)
    if first and len(whole) == first + 1:
        return Rendering(chat.render(whole, kwargs), None, frozenset(), first)
    text, spans = chat.render_with_answers(whole, trained, kwargs)
    if not spans:
        raise RowProblem(NOT_TRAINED, "the chat template marks no turn of the assistant")
    return Rendering(text, spans, frozenset(trained), first)


def _check_prompt_stays(head: str, sequences: list[str], prompt: list[Message]) -> None:
    """Raise RowProblem where the texts of prompt and of prompt + answer differ before the prompt's last turn
    ends: the rest of the prompt would be trained as if it were the answer."""
    for text in sequences:
        if text.startswith(head):
            continue
        end = last_end(head, (prompt[-1]["content"] or "").strip())
        if end is not None and not text.startswith(head[:end]):
            turn = f"turn {len(prompt)} ({prompt[-1]['role']})"
            raise RowProblem(PROMPT_CHANGES, f"{turn}, or what stands before it, which is prompt")


def _all_but(chat: ChatFormat, record: Record, text: str) -> list[Span]:
    """Spans of everything but the turns that the row leaves out of the loss."""
    whole = [*record.prompt, *record.completion]
    _, left_out = chat.render_with_answers(whole, sorted(record.untrained), record.template_kwargs)
    edges = [0, *(edge for span in left_out for edge in span), len(text)]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
