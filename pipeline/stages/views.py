"""Roles as a stage calls them: an adapter on the ranks of some model workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    from actors.algorithms import Loss
    from actors.batches import Batch
    from actors.cluster import AgreedFuture
    from actors.trainer.remote import ModelWorkers, SharedBatch
    from actors.trainer.spec import OptimSpec


def put(batch: Batch) -> SharedBatch:
    """A batch in the object store: written there once, however many roles and ranks read it."""
    import ray

    return ray.put(batch)


class Scorer(Protocol):
    """Scores of samples, whoever serves them: a reward model on ranks is a `View`."""

    @property
    def host(self) -> str:
        """Name of the processes that serve it."""

    def scores(self, batch: SharedBatch) -> AgreedFuture[np.ndarray]:
        """float64 (samples,)."""

    def frozen_digest(self) -> str:
        """Of all that must not move in those processes."""


@dataclass(frozen=True)
class View:
    """One role: an adapter, with or without a head, on the model workers that compute it."""

    workers: ModelWorkers
    role: str | None
    """Adapter; None is the bare base."""

    @property
    def host(self) -> str:
        """Name of the processes that this role runs on."""
        return self.workers.group.name

    def shares_ranks_with(self, other: View) -> bool:
        """True where one call waits for the other's: the same processes do both."""
        return self.workers.group is other.workers.group

    def ready(self, batch: Batch) -> SharedBatch:
        """A batch made ready to be sent to these ranks: in the object store, if several read it. One gets it
        with the call, a look-up sooner."""
        return put(batch) if self.workers.group.size > 1 else batch

    # --- Numbers --------------------------------------------------------------------------------

    def token_logprobs(self, batch: SharedBatch, temperature: float) -> AgreedFuture[np.ndarray]:
        """float64 (counted tokens,)."""
        return self.workers.token_logprobs(batch, self.role, temperature)

    def top_logprobs(self, batch: SharedBatch, k: int, temperature: float) -> AgreedFuture[np.ndarray]:
        """float64 (counted tokens, 2 k): ids of the most probable tokens, then their log-probabilities."""
        return self.workers.top_logprobs(batch, self.role, k, temperature)

    def logprobs(self, batch: SharedBatch, ld_alpha: float | None = None) -> AgreedFuture[np.ndarray]:
        """float64 (sequences,): summed as a DPO loss with this `ld_alpha` sums them."""
        return self.workers.logprobs(batch, self.role, ld_alpha)

    def values(self, batch: SharedBatch) -> AgreedFuture[np.ndarray]:
        """float64 (counted tokens,): the value head at the state before each."""
        return self.workers.values(batch, self._adapter)

    def scores(
        self, batch: SharedBatch, *, phase: Literal["logprobs", "evaluate"] = "logprobs"
    ) -> AgreedFuture[np.ndarray]:
        """float64 (samples,): the score head at each sample's last token."""
        return self.workers.scores(batch, self._adapter, phase=phase)

    def evaluate(self, batch: SharedBatch, loss: Loss) -> dict[str, float]:
        """The loss and its metrics over a batch, without dropout or gradient."""
        return self.workers.evaluate(batch, loss, self.role)

    def router_load(self) -> np.ndarray | None:
        """int64 (layers, experts): tokens per expert in this role's last update; None if there is none."""
        return self.workers.router_load(self.role)

    def route_agreement(self) -> np.ndarray | None:
        """float64 (layers,): share of given experts that the routers of these ranks would have chosen too, in
        the last log-probabilities of a batch with experts."""
        return self.workers.route_agreement()

    def frozen_digest(self) -> str:
        """Of all that must not move on the ranks of this role; every rank takes part, if it has slices."""
        return self.workers.frozen_digest()

    # --- Training -------------------------------------------------------------------------------

    def prepare(self, optim: OptimSpec, total: int, *, keep: bool = False) -> None:
        """Let this role train; `keep`: roles prepared before it on the same ranks train on."""
        self.workers.prepare_training(self.role, optim, total, keep)

    def update(self, batch: SharedBatch, loss: Loss, number: int) -> AgreedFuture[dict[str, float]]:
        """Optimizer step `number` of this role; its metrics."""
        return self.workers.update(batch, loss, number, self.role)

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write all that training needs to go on bit for bit."""
        self.workers.save_checkpoint(directory, self.role)

    def save_before(self, directory: str | Path, steps: int) -> bool:
        """As `save_checkpoint`, while optimizer step `steps` is being worked on, and as if it had not begun;
        False where that can't be done."""
        return self.workers.save_before(directory, steps, self.role)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Go on from a checkpoint, after `prepare` with the same settings."""
        self.workers.load_checkpoint(directory, self.role)

    def save(self, directory: str | Path) -> None:
        """Write what was trained: the adapter with its head, or the whole model of a role without one."""
        if self.role is None:
            self.workers.save_model(directory)
        else:
            self.workers.save_adapter(self.role, directory)

    @property
    def _adapter(self) -> str:
        """The adapter of a role that has a head."""
        assert self.role is not None, "the bare base has no head"
        return self.role


def frozen_digests(views: Iterable[Scorer]) -> dict[str, str]:
    """Of all that must not move on each group of ranks that serves some of these roles, by its name."""
    return {name: view.frozen_digest() for name, view in {view.host: view for view in views}.items()}
