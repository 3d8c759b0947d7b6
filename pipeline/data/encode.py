"""Texts -> token ids and masks, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.errors import UserError
from pipeline.data.texts import RowText

_CHUNK = 4096
"""Rows tokenised in one call: the tokenizer works on all of them in parallel, and their texts, ids and
offsets stay small beside the result."""


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens; a preference row has two sequences, chosen first."""

    record: int
    """Index of the record that it was made from."""
    ids: list[np.ndarray]
    """int32 (tokens,), of each sequence."""
    masks: list[np.ndarray]
    """bool (tokens,), of each sequence: what counts."""
    prompt_length: int
    merged: bool = False
    """The prompt on its own is no prefix of prompt + answer."""


def encode(rows: list[RowText], tokenizer: Any, train_on: str) -> Iterator[TokenRow]:
    """Rows as tokens, in the order of their records."""
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        done = [*_encode_group([r for r in chunk if r.chat], tokenizer, train_on)]
        done += _encode_group([r for r in chunk if not r.chat], tokenizer, train_on)
        yield from sorted(done, key=lambda row: row.record)


def _encode_group(rows: list[RowText], tokenizer: Any, train_on: str) -> Iterator[TokenRow]:
    """Rows that are all rendered by the template, or all plain."""
    special = bool(rows) and not rows[0].chat

    def tokens(texts: Sequence[str | None]) -> Iterator[list[int]]:
        return iter(token_ids_of(tokenizer, texts, special)["input_ids"])

    heads = tokens([r.prompt for r in rows if r.prompt is not None])
    ids = tokens([text for r in rows if r.spans is None for text in r.sequences])
    spoken = [r for r in rows if r.spans is not None]
    mapped = token_ids_of(tokenizer, [text for r in spoken for text in r.sequences], special, offsets=True)
    spoken_ids = iter(zip(mapped["input_ids"], mapped.get("offset_mapping", []), strict=True))
    for row in rows:
        if row.spans is not None:
            pairs = [next(spoken_ids) for _ in row.sequences]
            masks = [_span_mask(offsets, spans) for (_, offsets), spans in zip(pairs, row.spans, strict=True)]
            yield TokenRow(row.record, [np.asarray(x, np.int32) for x, _ in pairs], masks, 0)
            continue
        wholes = [next(ids) for _ in row.sequences]
        head = next(heads) if row.prompt is not None else []
        length = min(_common_prefix(head, whole) for whole in wholes)
        counted = 0 if train_on == "all" else length
        masks = [np.arange(len(whole)) >= counted for whole in wholes]
        arrays = [np.asarray(whole, np.int32) for whole in wholes]
        yield TokenRow(row.record, arrays, masks, length, length < len(head))


def token_ids_of(
    tokenizer: Any, texts: Sequence[str | None], special: bool, offsets: bool = False
) -> dict[str, list[Any]]:
    """The tokenizer's `input_ids` of many texts, on request with their `offset_mapping`.

    Raises:
        UserError: offsets are wanted of a tokenizer that has none.
    """
    if not texts:
        return {"input_ids": []}
    if offsets and not tokenizer.is_fast:
        raise UserError(
            "the base's tokenizer has no fast version, which masking whole conversations needs: "
            "give the rows as prompt + completion"
        )
    return tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _common_prefix(head: list[int], whole: list[int]) -> int:
    if whole[: len(head)] == head:
        return len(head)
    return next(
        (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
    )


def _span_mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """bool (tokens,): tokens that share a character with a span."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for first, end in spans:
        mask |= (starts < end) & (ends > first)
    return mask
