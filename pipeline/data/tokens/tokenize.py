"""Tokenises records: token ids and loss masks, in columns.

Rows with a prompt and one answer are tokenised as TRL 1.16's SFTTrainer and DPOTrainer do it: prompt and
prompt + answer each on their own; the answer begins where the two differ. Whole conversations are tokenised
once, and the assistant's turns are trained (TRL's `assistant_only_loss`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from actors.algorithms import LABEL, MARGIN
from actors.batches import Batch
from actors.errors import UserError
from actors.models.turn_ends import turn_ends
from pipeline.data.reading.bad_rows import (
    MISSING_COLUMN,
    RowGate,
    RowProblem,
    Skipped,
)
from pipeline.data.reading.field_values import finite_number
from pipeline.data.reading.layouts import Kind
from pipeline.data.reading.records import Record, Records
from pipeline.data.tokens.encode import TokenRow, encode, token_ids_of
from pipeline.data.tokens.row_texts import TextMaker
from pipeline.data.tokens.truncation import Truncation, Truncator
from pipeline.data.tokens.vocabulary import Vocabulary
from pipeline.monitoring.phases import counted


@dataclass(frozen=True)
class TokenStats:
    """Counts of a tokenised data set, for `inspect` and the run's log."""

    rows: int
    tokens: int
    label_tokens: int
    longest: int
    """Tokens of the longest sequence, after truncation."""
    median: int
    truncated: int
    """Sequences cut at `max_length`."""
    cut_tokens: int
    formats: dict[str, int] = field(default_factory=dict)
    """Rows by form: `chat` (through the template) or `text` (as they stand)."""
    masking: str = ""
    """Method by which the assistant's turns were found in whole conversations; empty without these."""
    rendered: int = 0
    """Rows of plain text that hold turns of the chat template; they are trained unchanged."""
    merged_boundaries: int = 0
    """Rows whose prompt's tokens are no prefix of prompt + answer: the answer begins where they differ."""


@dataclass(frozen=True)
class TokenizedData:
    """All rows of a stage as tokens; a preference row is two sequences, chosen first."""

    sequences: Batch
    """Every row, in the order of the records."""
    record_index: np.ndarray
    """int64 (rows,): index of each row's record in the `Records` it was made from."""
    skipped: Skipped
    """Rows left out, here and while reading."""
    stats: TokenStats

    @property
    def n_rows(self) -> int:
        return self.sequences.n_rows

    def __len__(self) -> int:
        return self.n_rows

    @property
    def lengths(self) -> np.ndarray:
        """int64 (sequences,): tokens of each sequence."""
        return self.sequences.lengths

    def batch(self, rows: np.ndarray | Sequence[int]) -> Batch:
        """The given rows as a batch for a model worker."""
        return self.sequences.select(rows)

    @property
    def fingerprint(self) -> str:
        """sha256 over token ids, masks, offsets and columns: the same data from elsewhere have the same."""
        data = self.sequences
        digest = hashlib.sha256(str(data.sequences_per_row).encode())
        for column in (data.token_ids, data.loss_mask, data.offsets, *data.columns.values()):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a mixture after template and tokenizer, before a stage's own limits."""

    rows: list[TokenRow]
    gate: RowGate
    """Holds the rows that the template refused."""
    formats: dict[str, int]
    masking: str
    rendered: int


def encode_rows(
    records: Records, tokenizer: Any, train_on: Literal["answer", "all"] = "answer"
) -> EncodedRows:
    """The slow part of `tokenize`, which is the same for all stages that train on these rows.

    UserError: the tokenizer can't serve them.
    """
    gate = RowGate()
    texts = TextMaker(records, tokenizer).training_rows(gate, train_on)
    rows = list(counted(encode(texts.rows, tokenizer, train_on), "tokenized", len(texts.rows)))
    return EncodedRows(rows, gate, dict(texts.formats), texts.masking, texts.rendered)


def tokenize(
    records: Records,
    tokenizer: Any,
    *,
    kind: Kind | None = None,
    max_length: int | None = None,
    truncation: Truncation = "keep_start",
    train_on: Literal["answer", "all"] = "answer",
    scored: bool = False,
    encoded: EncodedRows | None = None,
    vocab_size: int | None = None,
) -> TokenizedData:
    """Token ids and loss masks of all records.

    A sequence beyond `max_length` is cut and counted, or with `truncation="error"` a bad row; a row that
    has nothing left to train on is a bad row either way. `scored` is for a reward model, which reads a
    sequence's last token: whatever the template writes after the end of the answer's turn is left out, as
    samples end there too, and the column `margin` is kept where rows have it.
    `encoded`: what `encode_rows` has made of them already. `vocab_size`: rows of the base's embedding; a
    row with a token beyond them is a bad row.
    Bad rows follow their source's `on_bad_row`. UserError lists all of them, or says why the tokenizer
    can't serve these rows.
    """
    if (kind or records.kind) != records.kind or records.kind == "prompt":
        raise ValueError(f"records are {records.kind!r} rows, not {kind or 'rows to train on'!r}")
    encoded = encoded or encode_rows(records, tokenizer, train_on)
    gate = copy.deepcopy(encoded.gate)  # this stage reports its rows, and so does the next one
    cut, tails = Truncator(max_length, truncation, records.kind), _Tails(tokenizer)
    vocabulary = Vocabulary(tokenizer, vocab_size)
    with_margins = scored and any(record.columns.get(MARGIN) is not None for record in records.rows)
    rows: list[TokenRow] = []
    margins: list[float] = []
    for row in encoded.rows:
        record = records[row.record]
        try:
            vocabulary.check(*row.ids)
            margin = _margin(record) if with_margins else 0.0
            rows.append(cut(tails.cut(row) if scored else row))
            margins.append(margin)
        except RowProblem as problem:
            gate.add(*records.bad(record, problem))
    skipped = Skipped.merged([records.skipped, gate.close()])
    if not rows:
        raise UserError(f"no rows left to train on ({skipped.summary() or 'the data is empty'})")
    data = Batch.from_sequences(
        [ids for row in rows for ids in row.ids],
        [mask for row in rows for mask in row.masks],
        2 if records.kind == "preference" else 1,
        _columns(records, rows, margins if with_margins else None),
    )
    places = np.asarray([row.record for row in rows], dtype=np.int64)
    return TokenizedData(data, places, skipped, _stats(data, rows, encoded, cut))


def _stats(data: Batch, rows: list[TokenRow], encoded: EncodedRows, cut: Truncator) -> TokenStats:
    return TokenStats(
        rows=len(rows),
        tokens=data.n_tokens,
        label_tokens=int(data.loss_mask.sum()),
        longest=int(data.lengths.max()),
        median=int(np.median(data.lengths)),
        truncated=cut.sequences,
        cut_tokens=cut.tokens,
        formats=encoded.formats,
        masking=encoded.masking,
        rendered=encoded.rendered,
        merged_boundaries=sum(row.merged for row in rows),
    )


def _columns(records: Records, rows: list[TokenRow], margins: list[float] | None) -> dict[str, np.ndarray]:
    """Columns of the rows: margins of scored pairs, labels of unpaired answers."""
    columns = {} if margins is None else {MARGIN: np.asarray(margins)}
    if records.kind == "unpaired":
        columns[LABEL] = np.array([records[row.record].columns[LABEL] for row in rows], dtype=bool)
    return columns


def prompt_rows(
    records: Records, tokenizer: Any, vocab_size: int | None = None
) -> tuple[Records, list[str], list[list[int]]]:
    """Prompts as the model reads them before it answers: the records that can be used, their texts and
    token ids, one for each record.

    A prompt that the chat template refuses, or leaves something out of, or with a token beyond the
    `vocab_size` rows of the base's embedding, is a bad row and follows its source's `on_bad_row`: the records
    that come back know which were left out. UserError lists those that may not be.
    """
    gate, vocabulary = RowGate(), Vocabulary(tokenizer, vocab_size)
    prompts = list(TextMaker(records, tokenizer).prompts(gate))
    ids: dict[int, list[int]] = {}
    for chat in (False, True):
        group = [(index, text) for index, is_chat, text in prompts if is_chat == chat]
        encoded = token_ids_of(tokenizer, [text for _, text in group], plain=not chat)["input_ids"]
        ids.update(zip([index for index, _ in group], encoded, strict=True))
    kept: list[tuple[int, str]] = []
    for index, _, text in prompts:
        record = records[index]
        try:
            vocabulary.check(ids[index])
            kept.append((index, text))
        except RowProblem as problem:
            gate.add(*records.bad(record, problem))
    skipped = gate.close()
    if skipped.total:
        rows = [records[index] for index, _ in kept]
        records = replace(records, rows=rows, skipped=Skipped.merged([records.skipped, skipped]))
    return records, [text for _, text in kept], [ids[index] for index, _ in kept]


class _Tails:
    """Cuts sequences where a generated sample would end: after the token that ends the answer's turn, where
    only white space and other such tokens follow it.

    Qwen's template, for one, writes a line break there, and Phi-3's the end of the text as well: no sample
    ever has them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ends = tokenizer, np.array(turn_ends(tokenizer).ids, np.int32)
        self._blank: dict[bytes, bool] = {}

    def cut(self, row: TokenRow) -> TokenRow:
        lengths = [self._length(ids) for ids in row.ids]
        return replace(
            row,
            ids=[ids[:n] for ids, n in zip(row.ids, lengths, strict=True)],
            masks=[mask[:n] for mask, n in zip(row.masks, lengths, strict=True)],
        )

    def _length(self, ids: np.ndarray) -> int:
        length = end = len(ids)
        (ends,) = np.nonzero(np.isin(ids, self._ends))
        for place in ends[::-1]:
            if not self._is_blank(ids[place + 1 : end]):
                break
            length, end = place + 1, place
        return length

    def _is_blank(self, tail: np.ndarray) -> bool:
        key = tail.tobytes()
        if key not in self._blank:  # A template has one tail for all its rows; decoding it takes the time.
            self._blank[key] = not self._tokenizer.decode(tail).strip()
        return self._blank[key]


def _margin(record: Record) -> float:
    """The row's margin: how much higher the chosen answer must score."""
    value = record.columns.get(MARGIN)
    if value is None:
        raise RowProblem(MISSING_COLUMN, f"{MARGIN}, which other rows have")
    return finite_number(value, MARGIN)
