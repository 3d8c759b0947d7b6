"""Roles as an online stage calls them: an adapter on the ranks of some group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.algorithms.loss import Loss
    from actors.batches.batch import Batch
    from actors.cluster.worker_group import GroupFuture, WorkerGroup
    from actors.trainer.spec import OptimSpec


def put(batch: Batch) -> Any:
    """A batch in the object store: written there once, however many roles and ranks read it."""
    import ray

    return ray.put(batch)


@dataclass(frozen=True)
class View:
    """What one role computes with. Batches may be references into the object store."""

    group: WorkerGroup
    role: str | None
    """Adapter; None is the bare base."""

    @property
    def host(self) -> str:
        """Name of the processes that this role runs on."""
        return self.group.name

    def token_logprobs(self, batch: Any, temperature: float) -> GroupFuture:
        """float64 (counted tokens,), from every rank."""
        return self.group.submit("token_logprobs", batch, self.role, temperature, phase="logprobs")

    def values(self, batch: Any) -> GroupFuture:
        """float64 (counted tokens,): the value head at the state before each, from every rank."""
        return self.group.submit("values", batch, self.role, phase="logprobs")

    def scores(self, batch: Any) -> GroupFuture:
        """float64 (samples,): the score head at each sample's last token, from every rank."""
        return self.group.submit("scores", batch, self.role, phase="logprobs")

    def update(self, batch: Any, loss: Loss, number: int) -> GroupFuture:
        """Optimizer step `number` of this role; metrics from every rank."""
        return self.group.submit("update", batch, loss, number, self.role, phase="update")

    def prepare(self, optim: OptimSpec, total: int, *, keep: bool = False) -> None:
        """Let this role train; `keep`: roles prepared before it on the same ranks train on."""
        self.group.call("prepare_training", self.role, optim, total, keep=keep, phase="load")

    def save_checkpoint(self, directory: str) -> None:
        self.group.call("save_checkpoint", directory, self.role, phase="save")

    def load_checkpoint(self, directory: str) -> None:
        self.group.call("load_checkpoint", directory, self.role, phase="restore")

    def router_load(self) -> Any:
        """int64 (layers, experts): tokens per expert in this role's last update; None if there is none."""
        return self.group.call_rank(0, "router_load", self.role, phase="call")

    def route_agreement(self) -> Any:
        """float64 (layers,): share of given experts that the routers of the group's ranks would have chosen
        too, in the last log-probabilities of a batch with experts."""
        return self.group.call_rank(0, "route_agreement", phase="call")

    def frozen_digest(self) -> str:
        """Of all that must not move on the ranks of this role; every rank takes part, if it has slices."""
        return str(self.group.call("frozen_digest", phase="call")[0])


def frozen_digests(views: Iterable[View]) -> dict[str, str]:
    """Of all that must not move on each host that serves some of these roles, by the host's name."""
    return {name: view.frozen_digest() for name, view in {view.host: view for view in views}.items()}
