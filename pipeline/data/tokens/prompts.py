"""Prompts of an online stage: token ids to generate from, and the columns that its rewards read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batches import Generations
from actors.errors import UserError
from pipeline.data.reading.bad_rows import TOO_LONG, RowGate, RowProblem, Skipped
from pipeline.data.reading.messages import Message
from pipeline.data.reading.records import Record, Records
from pipeline.data.tokens.tokenize import TokenStats, prompt_rows

Prompt = str | list[Message]
"""A prompt as its row has it: plain text, or messages. Reward functions get it in this form (TRL's rule)."""


@dataclass(frozen=True)
class PromptData:
    """All prompts of a stage; row `i` is the same in every list."""

    prompts: list[Prompt]
    texts: list[str]
    """Texts that the model reads: prompts after the chat template."""
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]
    """The rows' other columns, e.g. `answer`; None where a row lacks it."""
    skipped: Skipped
    fingerprint: str
    messages: list[list[Message]] = field(default_factory=list)
    """Prompts as messages, and the next: what a conversation begins with. Empty where nobody asks."""
    template_kwargs: list[dict[str, Any]] = field(default_factory=list)
    """Variables of the chat template."""

    @property
    def n_rows(self) -> int:
        return len(self.token_ids)

    @property
    def stats(self) -> TokenStats:
        lengths = np.array([len(ids) for ids in self.token_ids])
        total = int(lengths.sum())
        return TokenStats(
            self.n_rows, total, 0, int(lengths.max()), int(np.median(lengths)), truncated=0, cut_tokens=0
        )

    def select(self, rows: Sequence[int] | np.ndarray, copies: int = 1) -> PromptData:
        """The given rows, each `copies` times in a row (one for every sample)."""
        order = [int(row) for row in rows for _ in range(copies)]
        return PromptData(
            [self.prompts[i] for i in order],
            [self.texts[i] for i in order],
            [self.token_ids[i] for i in order],
            {name: [values[i] for i in order] for name, values in self.columns.items()},
            self.skipped,
            self.fingerprint,
            [self.messages[i] for i in order] if self.messages else [],
            [self.template_kwargs[i] for i in order] if self.messages else [],
        )

    def of_samples(
        self, rows: Sequence[int] | np.ndarray, samples: Generations, copies: int | None = None
    ) -> PromptData:
        """The prompts of these rows' samples, `copies` of each (None: as many as there are), with what
        environments added to them."""
        chosen = self.select(rows, copies=copies or samples.n)
        if samples.episodes is None:
            return chosen
        prompts = [
            own if one.prompt == messages else list(one.prompt)
            for own, messages, one in zip(chosen.prompts, chosen.messages, samples.episodes, strict=True)
        ]
        texts, ids = zip(*((one.prompt_text, one.prompt_ids) for one in samples.episodes), strict=True)
        return replace(chosen, prompts=prompts, texts=list(texts), token_ids=list(ids))

    def completions(self, texts: Sequence[str]) -> list[Any]:
        """Generated texts in the form of their prompts: strings, or lists of one assistant message."""
        return in_form_of(self.prompts, texts)


def as_row(record: Record) -> Prompt:
    """The prompt as its row has it."""
    return record.plain[0] if record.plain is not None else record.prompt


def in_form_of(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Any]:
    """Answers in the form of their prompts: strings, or lists of one assistant message."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def read_prompts(
    records: Records,
    tokenizer: Any,
    *,
    max_prompt_tokens: int | None = None,
    vocab_size: int | None = None,
) -> PromptData:
    """Tokenise the prompts of `records`.

    A prompt beyond `max_prompt_tokens` leaves no room for its answer and is a bad row: it follows its
    source's `on_bad_row`, as does one that the chat template refuses. UserError lists those that may not be
    left out.
    """
    records, texts, token_ids = prompt_rows(records, tokenizer, vocab_size)
    gate = RowGate()
    kept = []
    for index, (record, ids) in enumerate(zip(records.rows, token_ids, strict=True)):
        if max_prompt_tokens is None or len(ids) <= max_prompt_tokens:
            kept.append(index)
            continue
        detail = f"{len(ids)} tokens, max_length - max_completion_length leaves {max_prompt_tokens}"
        gate.add(*records.bad(record, RowProblem(TOO_LONG, detail)))
    skipped = Skipped.merged([records.skipped, gate.close()])
    if not kept:
        raise UserError(f"no prompts left ({skipped.summary() or 'the data is empty'})")
    rows = [records[i] for i in kept]
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return PromptData(
        [as_row(row) for row in rows],
        [texts[i] for i in kept],
        [token_ids[i] for i in kept],
        {name: [row.columns.get(name) for row in rows] for name in names},
        skipped,
        records.fingerprint + ("" if len(kept) == len(records) else f"-{max_prompt_tokens}"),
        [row.prompt for row in rows],
        [row.template_kwargs for row in rows],
    )
