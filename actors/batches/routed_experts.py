"""Experts that a rollout engine routed its tokens to, in the form in which the trainer gets them.

An engine computes every token of a sample but the last one that it samples: of a prompt of P tokens and a
completion of C, the positions 0 to P + C - 2. For the last position the engine chooses no experts, and
nothing that is trained depends on it: no token is predicted from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def expert_dtype(n_experts: int) -> np.dtype:
    """The smallest unsigned integer that holds every expert's number and, beyond them, `free`."""
    return np.dtype(np.uint8 if n_experts < 256 else np.uint16)


def free(dtype: np.dtype) -> int:
    """The number in place of an expert's where the engine chose none: there the trainer's own router
    decides."""
    return int(np.iinfo(dtype).max)


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of each computed position of some samples."""

    experts: np.ndarray
    """uint8 or uint16 (positions, layers, top_k): of all samples, one after the other. Only layers with
    experts count; the order of a token's experts is the engine's and means nothing."""
    offsets: np.ndarray
    """int64 (samples + 1,): sample `s` is `experts[offsets[s]:offsets[s + 1]]`."""

    @staticmethod
    def of(samples: Sequence[np.ndarray]) -> RoutedExperts:
        """Join (positions, layers, top_k) of each sample; at least one."""
        offsets = np.cumsum([0, *(len(one) for one in samples)], dtype=np.int64)
        return RoutedExperts(np.concatenate(list(samples)), offsets)

    @staticmethod
    def join(parts: Sequence[RoutedExperts]) -> RoutedExperts:
        """Parts of one call in sample order."""
        return RoutedExperts.of([one for part in parts for one in part.samples()])

    def samples(self) -> list[np.ndarray]:
        """(positions, layers, top_k), sample by sample."""
        return np.split(self.experts, self.offsets[1:-1])

    def of_sequences(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """(tokens, layers, top_k): with a `free` position at the end of each sample's prompt + completion.

        Args:
            lengths: tokens of each sample, prompt included.

        Raises:
            ValueError: a sample has not one position less than tokens.
        """
        found, wanted = np.diff(self.offsets), np.asarray(lengths, dtype=np.int64) - 1
        if not np.array_equal(found, wanted):
            raise ValueError(f"experts of {_some(found)} positions for samples that have {_some(wanted)}")
        dtype = self.experts.dtype
        ends = np.cumsum(wanted + 1) - 1
        whole = np.full((int((wanted + 1).sum()), *self.experts.shape[1:]), free(dtype), dtype)
        computed = np.ones(len(whole), dtype=bool)
        computed[ends] = False
        whole[computed] = self.experts
        return whole


def _some(lengths: np.ndarray) -> str:
    return ", ".join(map(str, lengths[:4])) + (" ..." if len(lengths) > 4 else "")
