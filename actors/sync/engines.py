"""The engines of a weight sync, seen from the driver: connected, asked, lost, replaced.

Decides nothing about versions; that is `actors.sync.protocol` and `actors.sync.weight_sync`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.cluster.futures import WorkerFuture
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, RunFailure, UserError
from actors.sync.protocol import NO_VERSION, Engine, Failure, Offer, WeightsEvent
from actors.sync.spec import Backend

CHANNEL_SHARE = 0.8
"""Of `limits.sync`: deadline inside a channel, so that who waits in vain for a peer says so itself."""


def load_base(rollout: WorkerGroup, base_dir: str) -> dict[int, WorkerFuture]:
    """Let the engines load the bare base, ready for updates; returns at once. By rank."""
    return {rank: _load(rollout, base_dir, rank) for rank in range(rollout.size)}


def _load(rollout: WorkerGroup, base_dir: str, rank: int) -> WorkerFuture:
    return rollout.submit_rank(rank, "load", base_dir, updatable=True, phase="load")


class Engines:
    """What is known of each engine, and the connection of each to the trainer."""

    def __init__(self, policy: WorkerGroup, rollout: WorkerGroup, base_dir: str, backend: Backend) -> None:
        self.policy, self.rollout, self.base_dir, self.backend = policy, rollout, base_dir, backend
        self.engines = {rank: Engine() for rank in range(rollout.size)}
        self._lives: dict[int, int] = {}
        """Restarts of each engine's process when it was connected: it is lost once there are more."""
        self._dtype = ""

    # --- Engines that come and go ---------------------------------------------------------------

    def _replace(self, rank: int) -> None:
        """A fresh engine in place of a lost one, with the base, connected."""
        self._mark(rank, WeightsEvent.FAILED, self.engines[rank].reason)
        if rank not in self.rollout.fleet.serving:
            self.rollout.restart(rank)
        self.rollout.rebuild(rank)
        self._load_again(rank)

    def _load_again(self, rank: int) -> None:
        self._mark(rank, WeightsEvent.RESTARTED)
        _load(self.rollout, self.base_dir, rank).result()
        self._open_channel(rank)

    def _is_gone(self, rank: int) -> bool:
        """Its process is dead, or is not the one that was connected."""
        member = self.rollout.fleet.members[rank]
        return rank not in self.rollout.fleet.serving or member.generation != self._lives.get(rank)

    def _open_channel(self, rank: int) -> None:
        timeout_s = CHANNEL_SHARE * self.rollout.limits.of("sync")
        address = self.policy.call_rank(0, "weight_source.listen", rank, timeout_s, phase="sync")
        # The trainer waits only for an engine that is at the door: one that dies before keeps nobody.
        self._dtype = self.rollout.call_rank(rank, "connect", address, timeout_s, phase="sync")
        joining = self.rollout.submit_rank(rank, "open_channel", self.backend, phase="sync")
        accepting = self.policy.submit_rank(0, "weight_source.accept", rank, self.backend, phase="sync")
        joining.result()
        accepting.result()
        self._lives[rank] = self.rollout.fleet.members[rank].generation

    # --- Calls ----------------------------------------------------------------------------------

    def _ask(self, rank: int, method: str, *args: Any) -> WorkerFuture | Failure:
        """A call of one engine, or why it can't be called any more."""
        try:
            return self.rollout.submit_rank(rank, method, *args, phase="sync")
        except RunFailure as failure:
            return Failure(failure.reason, died=True)

    def _answers(self, asked: Mapping[int, WorkerFuture | Failure]) -> dict[int, Any]:
        """Each engine's answer, or why there is none: one that fails doesn't hide what the others did."""
        answers: dict[int, Any] = {}
        for rank, call in asked.items():
            try:
                answers[rank] = call if isinstance(call, Failure) else call.result()
            except (RunFailure, UserError) as error:
                reason = error.reason if isinstance(error, RunFailure) else str(error)
                answers[rank] = Failure(reason, died=self._is_gone(rank))
        return answers

    def _mark(self, rank: int, event: WeightsEvent, reason: str = "", version: int = NO_VERSION) -> None:
        self.engines[rank] = self.engines[rank].after(event, version, reason)

    def _lose(self, rank: int, version: int, reason: str, offer: Offer | None = None) -> InvariantViolation:
        """An engine that is not what it should be serves nobody any more."""
        self._mark(rank, WeightsEvent.FAILED, reason)
        return self._violation(self.rollout.who(rank), version, reason, offer)

    def _violation(
        self, who: str, version: int, reason: str, offer: Offer | None = None
    ) -> InvariantViolation:
        digest = f" ({offer.tensors} tensors, {offer.bytes} bytes, digest {offer.digest})" if offer else ""
        return InvariantViolation(
            who,
            "sync",
            f"version {version}{digest}: {reason}",
            "generations of these weights can't be trusted: keep the logs, and report the architecture",
        )
