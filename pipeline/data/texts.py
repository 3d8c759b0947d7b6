"""Records -> the texts that are tokenised, with what counts in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from actors.errors import UserError
from actors.models.turn_ends import training_template
from pipeline.data.bad_rows import BadRow, RowGate, RowProblem
from pipeline.data.chat import WHAT_TO_DO, ChatFormat, Span, Unmaskable, chat_format
from pipeline.data.records import Record, Records


@dataclass(frozen=True)
class RowText:
    """One row as text. What counts: the answer after `prompt`, or the `spans`, or everything."""

    record: int
    chat: bool
    """Rendered by the chat template, which writes the special tokens itself."""
    sequences: list[str]
    """One for SFT, (chosen, rejected) for preferences."""
    prompt: str | None = None
    """The part before the answers, tokenised on its own as well."""
    spans: list[list[Span]] | None = None
    """For each sequence, the characters that count."""


@dataclass
class RowTexts:
    """All rows as texts, and how they were made."""

    rows: list[RowText]
    formats: Counter[str] = field(default_factory=Counter)
    masking: str = ""


class TextMaker:
    """Renders records for one tokenizer: plain strings as they stand, the rest through its template."""

    def __init__(self, records: Records, tokenizer: Any) -> None:
        self._records, self._tokenizer = records, tokenizer
        self._template: str | None = None

    @cached_property
    def _chat(self) -> ChatFormat:
        return chat_format(self._tokenizer, self._template)

    @cached_property
    def _eos(self) -> str:
        if not self._tokenizer.eos_token:
            raise UserError(
                "the base's tokenizer has no end-of-text token (eos_token): a model can't learn to stop"
            )
        return self._tokenizer.eos_token

    def training_rows(self, gate: RowGate, train_on: str) -> RowTexts:
        """Every record that can be rendered; the others go to `gate`.

        UserError when the template is missing or can't be masked, with what to do.
        """
        masked_by = ""
        try:
            result, bad = self._training_rows(train_on)
        except Unmaskable:
            result, bad = self._with_training_template(train_on)
            masked_by = " of TRL's training template"
        for row, on_bad_row in bad:
            gate.add(row, on_bad_row)
        result.masking += masked_by
        return result

    def _with_training_template(self, train_on: str) -> tuple[RowTexts, list[tuple[BadRow, str]]]:
        self._template = training_template(self._tokenizer)
        del self._chat  # made again, with that template
        try:
            if self._template is not None:
                return self._training_rows(train_on)
        except Unmaskable:
            pass
        raise UserError(
            "the base's chat template changes earlier turns when a message is added, so that the assistant's "
            f"turns can't be told from the rest: {WHAT_TO_DO}"
        )

    def prompts(self, gate: RowGate) -> Iterator[tuple[int, bool, str]]:
        """(record, whether by chat template, text up to where the answer begins)."""
        for index, record in enumerate(self._records.rows):
            chat = self._is_chat(record)
            try:
                text = (
                    self._chat.render(record.prompt, record.template_kwargs, for_generation=True)
                    if chat
                    else None
                )
            except RowProblem as problem:
                gate.add(BadRow(record.file, record.row, problem.reason, problem.detail), "error")
                continue
            yield index, chat, text if text is not None else (record.plain or ("",))[0]

    def _training_rows(self, train_on: str) -> tuple[RowTexts, list[tuple[BadRow, str]]]:
        result = RowTexts([])
        bad: list[tuple[BadRow, str]] = []
        for index, record in enumerate(self._records.rows):
            chat = self._is_chat(record)
            try:
                row = self._chat_row(index, record, train_on) if chat else self._plain_row(index, record)
            except RowProblem as problem:
                on_bad_row = self._records.sources[record.source].spec.on_bad_row
                bad.append((BadRow(record.file, record.row, problem.reason, problem.detail), on_bad_row))
                continue
            if row.spans is not None:
                result.masking = self._chat.masking
            result.formats["chat" if chat else "text"] += 1
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
        ended = [a if a.endswith(self._eos) else a + self._eos for a in answers]
        return RowText(index, False, [prompt + a for a in ended], None if record.is_text else prompt)

    def _chat_row(self, index: int, record: Record, train_on: str) -> RowText:
        prompt, kwargs = record.prompt, record.template_kwargs
        wholes = [[*prompt, *answer] for answer in record.answers]
        if train_on == "all" or (prompt and all(len(answer) == 1 for answer in record.answers)):
            sequences = [self._chat.render(whole, kwargs) for whole in wholes]
            head = self._chat.render(prompt, kwargs, for_generation=True) if prompt else None
            return RowText(index, True, sequences, head)
        rendered = [self._chat.render_with_answers(whole, len(prompt), kwargs) for whole in wholes]
        return RowText(index, True, [text for text, _ in rendered], None, [spans for _, spans in rendered])
