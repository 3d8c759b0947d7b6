"""Trainer and engines as a weight sync sees them: every call into their processes, with its types.

Each method is one remote call of the method that it names in `ModelHost` or `RolloutEngine`, where it is
documented; `tests/actors/rollout/test_remote.py` compares the signatures. All of them return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.cluster.futures import AgreedFuture, GroupFuture, WorkerFuture
from actors.cluster.worker_group import WorkerGroup

if TYPE_CHECKING:
    import numpy as np

    from actors.batches.batch import Batch
    from actors.sync.channel import Backend
    from actors.sync.payload import Kind
    from actors.sync.protocol import (
        CommitReport,
        EngineFacts,
        Expected,
        Prepared,
        Readback,
        SentParts,
        StageAck,
    )
    from actors.sync.spec import SlotSpec

SOURCE = "weight_source"
"""Path of the weight source in a model worker."""
WEIGHTS = "weights"
"""Path of the weight updater in an engine."""


@dataclass(frozen=True)
class RemoteWeightSource:
    """The policy's weights, on rank 0 of its group; calls that are collective go to all ranks, of
    which the others answer None."""

    group: WorkerGroup

    def listen(self, engines: Sequence[int], timeout_s: float) -> WorkerFuture[dict[int, str]]:
        return self.group.submit_rank(0, f"{SOURCE}.listen", engines, timeout_s, phase="sync")

    def accept(self, engines: Sequence[int], backend: Backend = "gloo") -> WorkerFuture[dict[int, str]]:
        return self.group.submit_rank(0, f"{SOURCE}.accept", engines, backend, phase="sync")

    def prepare(
        self, version: int, role: str | None, payload: Kind, dtype: str, buffer_bytes: int | None = None
    ) -> GroupFuture[Prepared | None]:
        return self.group.submit(
            f"{SOURCE}.prepare", version, role, payload, dtype, buffer_bytes, phase="sync"
        )

    def send(self, engines: Sequence[int]) -> WorkerFuture[dict[int, str]]:
        return self.group.submit_rank(0, f"{SOURCE}.send", engines, phase="sync")

    def send_later(self, engines: Sequence[int]) -> GroupFuture[SentParts | None]:
        return self.group.submit(f"{SOURCE}.send_later", engines, phase="sync")

    def expected(self, role: str | None, dtype: str) -> GroupFuture[Expected | None]:
        return self.group.submit(f"{SOURCE}.expected", role, dtype, phase="sync")

    def token_logprobs(
        self, batch: Batch, role: str | None, temperature: float = 1.0
    ) -> AgreedFuture[np.ndarray]:
        return self.group.submit_alike("scores.token_logprobs", batch, role, temperature, phase="sync")

    def disconnect(self, engine: int) -> WorkerFuture[None]:
        return self.group.submit_rank(0, f"{SOURCE}.disconnect", engine, phase="sync")

    def close(self) -> WorkerFuture[None]:
        return self.group.submit_rank(0, f"{SOURCE}.close", phase="sync")


@dataclass(frozen=True)
class UpdatableEngines:
    """Engines whose weights a trainer updates, one rank a call."""

    group: WorkerGroup

    def load(
        self,
        rank: int,
        base: str,
        adapter: str | None = None,
        label: str = "",
        updatable: bool = False,
        slots: SlotSpec | None = None,
    ) -> WorkerFuture[dict[str, float]]:
        return self.group.submit_rank(rank, "load", base, adapter, label, updatable, slots, phase="load")

    def describe(self, rank: int) -> WorkerFuture[EngineFacts]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.describe", phase="sync")

    def listen(self, rank: int, engines: Sequence[int], timeout_s: float) -> WorkerFuture[dict[int, str]]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.listen", engines, timeout_s, phase="sync")

    def accept(
        self, rank: int, engines: Sequence[int], backend: Backend = "gloo"
    ) -> WorkerFuture[dict[int, str]]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.accept", engines, backend, phase="sync")

    def connect(self, rank: int, address: str, timeout_s: float) -> WorkerFuture[None]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.connect", address, timeout_s, phase="sync")

    def open_channel(self, rank: int, backend: Backend = "gloo") -> WorkerFuture[None]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.open_channel", backend, phase="sync")

    def stage(self, rank: int, version: int, pass_on_to: Sequence[int] = ()) -> WorkerFuture[StageAck]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.stage", version, pass_on_to, phase="sync")

    def discard(self, rank: int, version: int) -> WorkerFuture[None]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.discard", version, phase="sync")

    def commit(self, rank: int, version: int, keep: bool = False) -> WorkerFuture[CommitReport]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.commit", version, keep, phase="sync")

    def readback(self, rank: int, version: int, known: str = "") -> WorkerFuture[Readback]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.readback", version, known, phase="sync")

    def score_tokens(
        self,
        rank: int,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        version: int | None = None,
    ) -> WorkerFuture[list[np.ndarray]]:
        return self.group.submit_rank(rank, "score_tokens", token_ids, starts, version, phase="sync")
