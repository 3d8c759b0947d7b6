"""Expected lengths of samples, learnt from those that were drawn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

RECENT = 4096
"""Samples from which the others' lengths are expected: those of a few steps, since a policy's answers change
while it learns."""


class Lengths:
    """New tokens of samples, by prompt. Before anything was seen every sample is as long as its limit. Safe
    under several threads."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._lock = threading.Lock()
        self._of_prompt: dict[int, tuple[int, float]] = {}
        """By hash of the prompt: number of its samples, their mean."""

    def saw(self, prompt: int, tokens: int) -> None:
        """A sample of the prompt with this hash ended after so many tokens."""
        with self._lock:
            self._recent.append(tokens)
            count, mean = self._of_prompt.get(prompt, (0, 0.0))
            self._of_prompt[prompt] = count + 1, mean + (tokens - mean) / (count + 1)

    def of(self, prompts: Sequence[int], limit: int) -> np.ndarray:
        """float64 (prompts,): expected tokens of a sample of each: the mean of its own samples, else that of
        all recent ones, else `limit`; never above it."""
        recent = self._sorted()
        mean = float(recent.mean()) if len(recent) else float(limit)
        found = [self._of_prompt.get(prompt, (0, mean))[1] for prompt in prompts]
        return np.minimum(np.asarray(found, np.float64), limit)

    def given(self, expected: np.ndarray, so_far: np.ndarray, limit: int) -> np.ndarray:
        """float64: expected tokens of samples that have so many already: the mean of recent lengths above
        that, and `limit` where none is."""
        recent = self._sorted()
        shorter = np.searchsorted(recent, so_far, side="right")
        sums = np.append(np.cumsum(recent[::-1])[::-1], 0.0)
        longer = len(recent) - shorter
        means = np.where(longer > 0, sums[shorter] / np.maximum(longer, 1), limit)
        return np.minimum(np.where(so_far > 0, np.maximum(means, expected), expected), limit)

    def _sorted(self) -> np.ndarray:
        with self._lock:
            return np.sort(np.array(self._recent, np.float64))
