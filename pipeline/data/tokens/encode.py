"""Tokenises texts: token ids and loss masks, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.errors import UserError
from pipeline.data.tokens.row_texts import RowText

_CHUNK = 4096
"""Rows tokenised in one call: the tokenizer works on all of them in parallel, and their texts, ids and
offsets take little memory next to the result."""


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens; a preference row has two sequences, chosen first."""

    record: int
    """Index of the record that it was made from."""
    ids: list[np.ndarray]
    """int32 (tokens,), of each sequence."""
    masks: list[np.ndarray]
    """bool (tokens,), of each sequence: True where a token is trained."""
    prompt_length: int
    merged: bool = False
    """True: tokens of the prompt alone are no prefix of those of prompt + answer."""


def encode(rows: list[RowText], tokenizer: Any, train_on: str) -> Iterator[TokenRow]:
    """Rows as tokens, in the order of their records."""
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        done = [*_encode_group([r for r in chunk if r.chat], tokenizer, train_on)]
        done += _encode_group([r for r in chunk if not r.chat], tokenizer, train_on)
        yield from sorted(done, key=lambda row: row.record)


def _encode_group(rows: list[RowText], tokenizer: Any, train_on: str) -> Iterator[TokenRow]:
    """Rows that are all rendered by the template, or all plain."""
    plain = bool(rows) and not rows[0].chat

    def tokens(texts: Sequence[str | None]) -> Iterator[list[int]]:
        return iter(token_ids_of(tokenizer, texts, plain)["input_ids"])

    heads = tokens([r.prompt for r in rows if r.prompt is not None])
    ids = tokens([text for r in rows if r.spans is None for text in r.sequences])
    spoken = [r for r in rows if r.spans is not None]
    mapped = token_ids_of(tokenizer, [text for r in spoken for text in r.sequences], False, offsets=True)
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
    tokenizer: Any, texts: Sequence[str | None], plain: bool, offsets: bool = False
) -> dict[str, list[Any]]:
    """The tokenizer's `input_ids` of many texts, on request with their `offset_mapping`.

    A chat template writes the special tokens of its texts. A `plain` text begins with those that the
    tokenizer sets before a text by itself (BOS), once, also where it has them written out. What it sets
    behind a text (EOS) is left out: a prompt goes on, and rows have their end written out.

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
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
    if plain and (first := tokens_before_texts(tokenizer)):
        return {"input_ids": [_begun_with(first, ids) for ids in found["input_ids"]]}
    return found


def tokens_before_texts(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer sets before every text by itself: BOS, or none."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    return next((whole[:i] for i in starts if whole[i : i + len(bare)] == bare), [])


def _begun_with(first: list[int], ids: list[int]) -> list[int]:
    """`ids` behind the tokens `first`, less those of them that it begins with."""
    there = next(n for n in range(len(first), -1, -1) if ids[:n] == first[len(first) - n :])
    return first[: len(first) - there] + ids


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
