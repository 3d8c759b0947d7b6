"""Training of one role: parameters, optimizer, schedule, and the checks around each step."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.errors import InvariantViolation
from actors.models.parallel.fsdp import is_sharded
from actors.trainer import checkpoint
from actors.trainer.optimizer import GradientCheck, make_optimizer, make_scheduler
from actors.trainer.parameter_buckets import Bucket, FlatParameters, SlicedParameters
from actors.trainer.process_groups import Ranks
from actors.trainer.spec import OptimSpec
from actors.trainer.state_bytes import bytes_of, fill, tensor_of


class Training:
    """From `prepare_training` to the next stage. `step` wants gradients already summed over ranks."""

    def __init__(
        self,
        role: str | None,
        parameters: Mapping[str, nn.Parameter],
        spec: OptimSpec,
        total_steps: int,
        without_decay: Collection[str] = (),
        ranks: Ranks | None = None,
        shares: Collection[str] = (),
    ) -> None:
        """`shares`: parameters of which each rank of the same rows has a share of the gradient."""
        self.role, self.spec, self.total_steps = role, spec, total_steps
        self.parameters = dict(parameters)
        self.ranks = ranks or Ranks()
        replicas = {n: p for n, p in self.parameters.items() if not is_sharded(p)}
        self._flat = FlatParameters(replicas, without_decay)
        self._shares = frozenset(shares)
        self._sliced = SlicedParameters(
            {n: p for n, p in self.parameters.items() if n not in replicas}, without_decay
        )
        self.optimizer = make_optimizer(self.buckets, spec)
        self.scheduler = make_scheduler(self.optimizer, spec, total_steps)
        self.check = GradientCheck(self.parameters, self.ranks)
        self.committing = threading.Lock()
        """Held while what a checkpoint holds changes, or another thread writes it."""
        self.steps_done = 0
        self.num_tokens = 0

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def is_sharded(self) -> bool:
        """True where a rank holds slices of what is trained; `save` and `step` are then collective."""
        return bool(self._sliced.parameters)

    @property
    def buckets(self) -> list[Bucket]:
        """Flat tensors that the optimizer steps on, on this rank."""
        return [*self._flat.buckets, *self._sliced.buckets]

    def zero_grad(self) -> None:
        self._flat.zero_grad()
        self._sliced.zero_grad()

    def reduce_gradients(self) -> None:
        """Sum the gradients of all ranks, after the backward pass. Those of slices are sums already over the
        ranks that hold a model together."""
        copies = self.ranks.tensor_parallel_size
        if copies > 1:
            # Ranks of the same rows have the same gradient of what they compute alike.
            for name, grad in self._flat.named_grads():
                if name not in self._shares:
                    grad.div_(copies)
        for grad in self._flat.grads:
            self.ranks.sum_gradient_(grad)
        self._sliced.collect()
        for grad in self._sliced.grads:
            if copies > 1:
                self.ranks.sum_(grad)
            else:
                self.ranks.sum_copies_(grad)

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm over all gradients, the same on every rank."""
        if not self.is_sharded:
            return self._flat.grad_norm()
        others = self.ranks.sum_slices_(self._sliced.square_norm())
        replicas = self._flat.grad_norm().to(others.device).double()
        return (replicas.square() + others).sqrt().float()

    def release(self) -> None:
        """Drop the gradients; the parameters keep their values."""
        self._flat.release()
        self._sliced.release()

    def step(
        self,
        step: int,
        loss: float,
        n_tokens: int,
        gradient_may_vanish: bool = False,
        balances: bool = False,
    ) -> dict[str, float]:
        """Check, clip and apply the gradients.

        Args:
            step: number of this step, from 0.
            loss: its value over the global batch.
            n_tokens: in the global batch.
            gradient_may_vanish: no gradient anywhere is no fault; parameters are then looked at in a
                later step.
            balances: the routers' auxiliary loss has a gradient too, which reaches all but the last layer's
                experts and a scalar head: where the loss itself has none, theirs are missing by right, all.

        Returns:
            `grad_norm` (before clipping), `learning_rate` (of this step), `num_tokens` (so far).

        Raises:
            InvariantViolation: loss or gradient is not finite, or a parameter that should have a
                gradient has none. The weights are then those of the step before.
        """
        norm = self.grad_norm()
        metrics = {"grad_norm": float(norm), "learning_rate": float(self.scheduler.get_last_lr()[0])}
        self._check_finite(step, {"loss": loss, "grad_norm": metrics["grad_norm"]})
        if metrics["grad_norm"] > 0 or not gradient_may_vanish:
            self._check_gradients(step, gradient_may_vanish and balances)
        if self.spec.max_grad_norm > 0:
            members = [bucket.flat for bucket in self.buckets]
            torch.nn.utils.clip_grads_with_norm_(members, self.spec.max_grad_norm, norm)
        with self.committing:
            self.optimizer.step()
            self.scheduler.step()
            self.steps_done = step + 1
            self.num_tokens += n_tokens
        return {**metrics, "num_tokens": float(self.num_tokens)}

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise InvariantViolation(
                who=self.role or "model",
                phase=f"update of step {step}",
                reason=f"{' and '.join(bad)}; the weights are still those of the step before",
                next_step="lower learning_rate, or look at the rows of this step",
            )

    def _check_gradients(self, step: int, may_be_balance_alone: bool) -> None:
        missing = self.check.missing()
        if missing and not (may_be_balance_alone and self.check.only_behind_routers(missing)):
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise InvariantViolation(
                who=self.role or "model",
                phase=f"update of step {step}",
                reason=f"{len(missing)} trainable parameters got no gradient: {shown}",
                next_step="take their group out of model.lora.targets, or report this architecture",
            )

    def save(self, directory: Path, write: bool = True) -> None:
        """Write a checkpoint's files into `directory`, whole tensors by name.

        Collective where parameters are sharded; those with `write` write.
        """
        checkpoint.write_checkpoint(directory, self, {**self._settings(), **self._progress()}, write)

    def load(self, directory: Path) -> None:
        """Go on from a checkpoint, written with this or another sharding and number of ranks.

        Raises:
            UserError: incomplete, damaged, or made with other settings.
        """
        settings = self._settings()
        if not self.spec.needs_length:  # Then a longer stage goes on from a shorter one.
            del settings["total_steps"]
        self._go_on(checkpoint.read_checkpoint(directory, self, settings))

    def snapshot(self) -> dict[str, Any]:
        """All that changes in steps on this rank, as a process that is made alike takes it over by `put`."""
        return {
            **self._progress(),
            "ungraded": self.check.pending,
            "flat": [bytes_of(bucket.flat) for bucket in self.buckets],
            "optimizer": [
                {key: bytes_of(value) for key, value in self.optimizer.state.get(bucket.flat, {}).items()}
                for bucket in self.buckets
            ],
        }

    def put(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot of this rank, or of another one that holds the same."""
        for bucket, flat, kept in zip(self.buckets, state["flat"], state["optimizer"], strict=True):
            fill(bucket.flat.detach(), flat)
            self.optimizer.state.pop(bucket.flat, None)
            if kept:
                self.optimizer.state[bucket.flat] = {
                    key: self._moment(bucket, key, value) for key, value in kept.items()
                }
        self.check.pending = state["ungraded"]
        self._go_on(state)

    def _moment(self, bucket: Bucket, key: str, kept: Any) -> torch.Tensor:
        if key == "step":
            # Adam keeps it on the CPU unless it is fused.
            device = bucket.flat.device if self.optimizer.defaults.get("fused") else torch.device("cpu")
            return tensor_of(kept, torch.float32).reshape(()).to(device)
        return tensor_of(kept, bucket.flat.dtype).reshape(bucket.flat.shape).to(bucket.flat.device)

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "num_tokens": self.num_tokens,
            "scheduler": self.scheduler.state_dict(),
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.steps_done, self.num_tokens = int(state["step"]), int(state["num_tokens"])

    def _settings(self) -> dict[str, object]:
        return {"total_steps": self.total_steps, "optim": self.spec.model_dump(mode="json")}
