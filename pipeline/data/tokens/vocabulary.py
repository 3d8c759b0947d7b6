"""Refuses rows with tokens that the base's embedding has no row for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data.reading.bad_rows import BEYOND_EMBEDDING, RowProblem


class Vocabulary:
    """The tokens that a base knows. Its tokenizer may have more: somebody added them there alone."""

    def __init__(self, tokenizer: Any, rows: int | None) -> None:
        """`rows`: of the base's embedding; None: not known, then every token is taken for known."""
        self._tokenizer, self._rows = tokenizer, rows
        self._all_known = rows is None or len(tokenizer) <= rows

    def check(self, *sequences: Sequence[int] | np.ndarray) -> None:
        """Raises RowProblem for the first token that the base has no row for."""
        if self._all_known:
            return
        assert self._rows is not None
        for ids in sequences:
            if len(ids) and (beyond := np.asarray(ids) >= self._rows).any():
                token = int(np.asarray(ids)[beyond][0])
                name = self._tokenizer.convert_ids_to_tokens(token)
                raise RowProblem(
                    BEYOND_EMBEDDING,
                    f"{name!r} ({token}); the base has rows for the first {self._rows} of its tokenizer's "
                    f"{len(self._tokenizer)} tokens: resize the base's embedding "
                    "(`resize_token_embeddings`) and save it, or leave the token out",
                )
