"""Model workers as the driver sees them: their processes, and every call into them with its types.

Loads no torch. `tests/actors/trainer/test_remote.py` holds each signature against the method that it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from actors.cluster.environment import trainer_environment
from actors.cluster.futures import AgreedFuture, GroupFuture
from actors.cluster.lasting_group import Habits, LastingGroup
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.supervision import Supervision
from actors.cluster.worker_group import WorkerGroup
from actors.sync.remote import SOURCE

if TYPE_CHECKING:
    import numpy as np
    from ray import ObjectRef

    from actors.algorithms.loss import Loss
    from actors.batches.batch import Batch
    from actors.models.lora.heads import HeadInit
    from actors.trainer.spec import HostSpec, OptimSpec

    SharedBatch: TypeAlias = Batch | ObjectRef
    """A batch, or a reference to one in the object store."""

HOST = "actors.trainer.model_host:ModelHost"
UPDATE = "updates.update"
LOAD_CHECKPOINT = "saving.load_checkpoint"
HOST_MODULES = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "peft",
    "actors.trainer.model_host",
)
"""Modules that a rank needs before it can load a base, imported while the driver reads its data."""
CLOCKS = ("step_seconds", "tokens_per_second")
"""Metrics of an update that each rank has for itself."""


def _place(method: str, args: Sequence[object]) -> str:
    """Words for a call: of an update with its number, so that no other is like it."""
    if method != UPDATE:
        return method.rpartition(".")[2]
    role = args[3] if len(args) > 3 and args[3] is not None else "the base"
    return f"update {args[2]} of {role}"


class ModelGroup(LastingGroup):
    """Processes of `ModelHost`s: what a lost rank held is made again."""

    habits = Habits(
        makes=frozenset(
            ["set_batching", "add_adapter", "copy_adapter", "add_head", "updates.prepare_training"]
        )
        | {LOAD_CHECKPOINT},
        changes=frozenset([UPDATE, LOAD_CHECKPOINT]),
        sessions=frozenset(
            f"{SOURCE}.{name}" for name in ("listen", "accept", "send", "send_later", "disconnect", "close")
        )
        | {f"residence.{name}" for name in ("bytes", "park", "wake")},
        publishes=frozenset([f"{SOURCE}.prepare"]),
        snapshot="kept.take",
        restore="kept.put",
        place=_place,
        parts=lambda role: role.sharding != "none" or role.tensor_parallel_size > 1,
    )


def host_group(
    name: str,
    role: RoleSpec,
    limits: LimitsSpec,
    log_dir: str | Path,
    env: Mapping[str, str] | None = None,
    has_guests: bool = False,
    supervision: Supervision | None = None,
) -> ModelGroup:
    """A group for `HOST`: training ranks, reference ranks. Not started yet. `env`: further variables;
    `has_guests`: engines take turns with them; `supervision`: of the run."""
    variables = {**trainer_environment(role.gpus > 0, has_guests), **(env or {})}
    return ModelGroup(
        name,
        role,
        limits,
        log_dir,
        preload=HOST_MODULES,
        env=variables,
        has_guests=has_guests,
        supervision=supervision,
    )


@dataclass(frozen=True)
class ModelWorkers:
    """The `ModelHost`s of a group of ranks, called all together; what each call does is told there.

    Calls that take long return a future; the others wait. What all ranks have alike comes from the first one,
    with every rank's proof that it has the same: of 8 ranks' log-probabilities seven copies stay where they
    are. Each raises as `AgreedFuture.result` and `WorkerGroup.submit` do.
    """

    group: WorkerGroup

    def build(self, spec: HostSpec) -> GroupFuture[float]:
        """Load the base on every rank, in place of an earlier one; returns at once. Seconds of each rank."""
        return self.group.build(HOST, spec, distributed=True)

    def set_batching(self, packing: bool | str, max_tokens_per_micro_batch: int) -> None:
        self.group.call("set_batching", packing, max_tokens_per_micro_batch)

    def frozen_digest(self) -> str:
        return self.group.call_alike("frozen_digest")

    # --- Adapters -------------------------------------------------------------------------------

    def add_adapter(self, name: str, path: str | Path | None = None, trainable: bool = True) -> None:
        self.group.call("add_adapter", name, path, trainable, phase="load")

    def copy_adapter(self, source: str, target: str, trainable: bool = False) -> None:
        self.group.call("copy_adapter", source, target, trainable, phase="load")

    def add_head(self, role: str, init: HeadInit = "zero") -> None:
        self.group.call("add_head", role, init, phase="load")

    # --- Updates --------------------------------------------------------------------------------

    def prepare_training(
        self, role: str | None, spec: OptimSpec, total_steps: int, keep: bool = False
    ) -> dict[str, int]:
        return self.group.call_alike("updates.prepare_training", role, spec, total_steps, keep, phase="load")

    def update(
        self, batch: SharedBatch, loss: Loss, step: int, role: str | None = None
    ) -> AgreedFuture[dict[str, float]]:
        return self.group.submit_alike(UPDATE, batch, loss, step, role, phase="update", own=CLOCKS)

    def evaluate(self, batch: SharedBatch, loss: Loss, role: str | None) -> dict[str, float]:
        return self.group.call_alike("updates.evaluate", batch, loss, role, phase="evaluate")

    def router_load(self, role: str | None = None) -> np.ndarray | None:
        return self.group.call_rank(0, "updates.router_load", role)

    # --- Scores ---------------------------------------------------------------------------------

    def token_logprobs(
        self, batch: SharedBatch, role: str | None, temperature: float = 1.0
    ) -> AgreedFuture[np.ndarray]:
        return self.group.submit_alike("scores.token_logprobs", batch, role, temperature, phase="logprobs")

    def top_logprobs(
        self, batch: SharedBatch, role: str | None, k: int, temperature: float
    ) -> AgreedFuture[np.ndarray]:
        return self.group.submit_alike("scores.top_logprobs", batch, role, k, temperature, phase="logprobs")

    def logprobs(
        self, batch: SharedBatch, role: str | None, ld_alpha: float | None = None
    ) -> AgreedFuture[np.ndarray]:
        return self.group.submit_alike("scores.logprobs", batch, role, ld_alpha, phase="logprobs")

    def values(self, batch: SharedBatch, role: str) -> AgreedFuture[np.ndarray]:
        return self.group.submit_alike("scores.values", batch, role, phase="logprobs")

    def scores(
        self, batch: SharedBatch, role: str, *, phase: Literal["logprobs", "evaluate"] = "logprobs"
    ) -> AgreedFuture[np.ndarray]:
        return self.group.submit_alike("scores.scores", batch, role, phase=phase)

    def route_agreement(self) -> np.ndarray | None:
        return self.group.call_rank(0, "scores.route_agreement")

    # --- Saving ---------------------------------------------------------------------------------

    def save_adapter(self, role: str, directory: str | Path) -> None:
        self.group.call("saving.save_adapter", role, directory, phase="save")

    def save_model(self, directory: str | Path) -> None:
        self.group.call("saving.save_model", directory, phase="save")

    def save_checkpoint(self, directory: str | Path, role: str | None = None) -> None:
        self.group.call("saving.save_checkpoint", directory, role, phase="save")

    def save_before(self, directory: str | Path, steps: int, role: str | None = None) -> bool:
        return self.group.call_aside(0, "saving.save_before", directory, steps, role, phase="save")

    def load_checkpoint(self, directory: str | Path, role: str | None = None) -> int:
        return self.group.call_alike(LOAD_CHECKPOINT, directory, role, phase="restore")
