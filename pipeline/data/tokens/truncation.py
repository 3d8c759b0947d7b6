"""Cuts rows at a stage's `max_length`, and refuses those of which nothing is left to train on."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.data.reading.bad_rows import EMPTY_ANSWER, PROMPT_FILLS, SAME_ANSWERS, TOO_LONG, RowProblem
from pipeline.data.reading.layouts import Kind
from pipeline.data.tokens.encode import TokenRow

Truncation = Literal["keep_start", "keep_end", "error"]


class Truncator:
    """Cuts rows at the limit and counts what it cut."""

    def __init__(self, max_length: int | None, truncation: Truncation, kind: Kind) -> None:
        self.limit, self.truncation, self.kind = max_length, truncation, kind
        self.sequences = self.tokens = 0

    def __call__(self, row: TokenRow) -> TokenRow:
        over = [max(0, len(ids) - self.limit) if self.limit is not None else 0 for ids in row.ids]
        if any(over) and self.truncation == "error":
            raise RowProblem(
                TOO_LONG, f"{max(len(ids) for ids in row.ids)} tokens, the limit is {self.limit}"
            )
        keep = slice(None, self.limit) if self.truncation == "keep_start" else slice(-(self.limit or 0), None)
        ids = [x[keep] if n else x for x, n in zip(row.ids, over, strict=True)]
        masks = [x[keep].copy() if n else x for x, n in zip(row.masks, over, strict=True)]
        for mask, n in zip(masks, over, strict=True):
            mask[:1] = False  # the first token has no predictor
            if not mask.any():
                detail = f"{row.prompt_length} tokens, the limit is {self.limit}" if row.prompt_length else ""
                raise (
                    RowProblem(PROMPT_FILLS, detail)
                    if n
                    else RowProblem(EMPTY_ANSWER, "no token to train on")
                )
        if len(ids) == 2 and np.array_equal(ids[0], ids[1]):
            cut = f"both {len(ids[0])} tokens, cut at max_length" if any(over) else "as tokens"
            raise RowProblem(SAME_ANSWERS, cut)
        self.sequences += sum(n > 0 for n in over)
        self.tokens += sum(over)
        return TokenRow(row.record, ids, masks, row.prompt_length, row.merged)
