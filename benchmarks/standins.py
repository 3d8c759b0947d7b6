"""Actors of driver.py that answer at once with something right, so that a step is all the driver's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.batches import Generations
from actors.batches.slices import Asked, Progress, Work
from actors.sync.protocol import (
    CommitReport,
    EngineFacts,
    Expected,
    Offer,
    Prepared,
    Readback,
    StageAck,
    digest_of_all,
)

LOGP = -1.0
"""Log-probability of every token, everywhere."""
TOKEN = 65
TENSORS = 100


def _digests(tensors: int) -> dict[str, str]:
    """As long as real ones are: 18,000 of them take 1.6 MB."""
    return {
        f"model.layers.{i % 48}.mlp.experts.{i // 48}.gate_proj.weight": f"{i:032x}" for i in range(tensors)
    }


def _facts(version: int, tensors: int) -> dict[str, Any]:
    return {
        "version": version, "bytes": 1 << 20, "tensors": tensors, "digest": "d", "manifest_digest": "m"
    }  # fmt: skip


class Engine:
    """A rollout engine whose samples all have `tokens` tokens."""

    def __init__(self, tokens: int, tensors: int = TENSORS) -> None:
        self.tokens, self.weights = tokens, _Weights(tensors)

    def load(self, base: str, *how: object) -> dict[str, float]:
        return {}

    def advance(
        self, key: int, seconds: float | None, asked: Asked | None = None, give_back: Sequence[int] = ()
    ) -> Progress:
        assert asked is not None
        n = len(asked.numbers)
        made = Generations(
            token_ids=np.full(n * self.tokens, TOKEN, np.int32),
            logprobs=np.full(n * self.tokens, LOGP, np.float32),
            offsets=np.arange(n + 1, dtype=np.int64) * self.tokens,
            finish=np.zeros(n, np.int8),
            n=1,
            label="stand-in",
            seconds=0.0,
            token_versions=np.full(n * self.tokens, self.weights.version, np.int32),
        )
        return Progress(list(asked.numbers), made, {}, [], 0.0, Work())

    def score_tokens(
        self, token_ids: Sequence[Sequence[int]], starts: Sequence[int], *how: object
    ) -> list[np.ndarray]:
        return [np.full(len(ids) - start, LOGP) for ids, start in zip(token_ids, starts)]

    def expert_load(self) -> None:
        return None


class _Weights:
    """The engine's end of a sync."""

    version = -1

    def __init__(self, tensors: int) -> None:
        self.digests = _digests(tensors)
        self.all_digests = digest_of_all(self.digests)

    def describe(self) -> EngineFacts:
        return EngineFacts("float32", "here")

    def listen(self, engines: Sequence[int], timeout_s: float) -> dict[int, str]:
        return dict.fromkeys(engines, "nowhere:0")

    def accept(self, engines: Sequence[int], backend: str = "gloo") -> dict[int, str]:
        return {}

    def connect(self, address: str, timeout_s: float) -> None:
        return None

    def open_channel(self, backend: str = "gloo") -> None:
        return None

    def stage(self, version: int, pass_on_to: Sequence[int] = ()) -> StageAck:
        return StageAck(**_facts(version, len(self.digests)))

    def commit(self, version: int, keep: bool = False) -> CommitReport:
        self.version = version
        return CommitReport(version, len(self.digests), len(self.digests), {})

    def readback(self, version: int, known: str = "") -> Readback:
        # What it takes to digest the digests is the engine's.
        assert known == self.all_digests
        return Readback(version, known)

    def discard(self, version: int) -> None:
        return None


class _Source:
    """The trainer's end of a sync."""

    def __init__(self, tensors: int, leads: bool) -> None:
        self.digests, self.leads = _digests(tensors), leads

    def listen(self, engines: Sequence[int], timeout_s: float) -> dict[int, str]:
        return dict.fromkeys(engines, "nowhere:0")

    def accept(self, engines: Sequence[int], backend: str = "gloo") -> dict[int, str]:
        return {}

    def prepare(
        self, version: int, role: str | None, payload: str, dtype: str, buffer_bytes: int | None = None
    ) -> Prepared | None:
        offer = Offer(**_facts(version, len(self.digests)))
        return Prepared(offer, {"gather": 0.0, "pack": 0.0}) if self.leads else None

    def send(self, engines: Sequence[int]) -> dict[int, str]:
        return {}

    def expected(self, role: str | None, dtype: str) -> Expected | None:
        return Expected(self.digests, 0.0) if self.leads else None

    def close(self) -> None:
        return None


class Trainer:
    """A policy rank."""

    def __init__(self, tensors: int = TENSORS, rank: int = 0) -> None:
        self.weight_source = _Source(tensors, leads=rank == 0)
        self.scores = self.updates = self

    def token_logprobs(self, batch: Any, role: str | None, temperature: float = 1.0) -> np.ndarray:
        return np.full(int(batch.loss_mask.sum()), LOGP)

    def update(self, batch: Any, loss: Any, step: int, role: str | None = None) -> dict[str, float]:
        return {"loss": 0.0, "ratio/max_deviation": 0.0, "num_tokens": 0.0, "step_seconds": 0.0}

    def router_load(self, role: str | None = None) -> None:
        return None


def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Something that differs within a group; the cost of a user's own function is not the driver's."""
    return [float(i % 2) for i in range(len(completion_ids))]
