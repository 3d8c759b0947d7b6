"""Optimizer steps: preparing a role to train, stepping, and the loss without a step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from actors.algorithms.loss import Loss
from actors.batches.batch import Batch
from actors.errors import UserError
from actors.models.lora import adapters
from actors.models.lora.heads import head_parameters
from actors.models.parallel.fsdp import gather_gradients
from actors.models.parallel.tensor_parallel import share_names
from actors.trainer.host_state import HostState
from actors.trainer.optimizer import names_without_decay
from actors.trainer.scores import Scores
from actors.trainer.spec import OptimSpec
from actors.trainer.sums import Sums
from actors.trainer.train_state import Training


class Updates:
    """The training part of a `ModelHost`."""

    def __init__(self, state: HostState, scores: Scores) -> None:
        self._state, self._scores = state, scores
        self.trainings: dict[str | None, Training] = {}
        """By role; the one prepared last is last."""
        self._loads: dict[str | None, np.ndarray] = {}
        """Tokens per expert by role; of the role updated last it is last."""

    # --- Roles that train -----------------------------------------------------------------------

    def prepare_training(
        self, role: str | None, spec: OptimSpec, total_steps: int, keep: bool = False
    ) -> dict[str, int]:
        """Let exactly this adapter and its head train (None: every parameter of the base), with a fresh
        optimizer.

        Args:
            role: the adapter.
            spec: optimizer, schedule and clipping.
            total_steps: length of the schedule.
            keep: roles prepared earlier go on training, each with its own optimizer and schedule.

        Returns:
            `{"trainable_parameters": int, "tensors": int}`.
        """
        state = self._state
        self._release([role] if keep else list(self.trainings))
        parameters = self._whole_base() if role is None else self._adapter_and_head(role)
        exempt = names_without_decay(state.model) if spec.weight_decay > 0 else set()
        shares = share_names(state.model) if state.ranks.tensor_parallel_size > 1 else set()
        training = Training(role, parameters, spec, total_steps, exempt, state.ranks, shares)
        self.trainings[role] = training
        return {"trainable_parameters": training.n_parameters, "tensors": len(parameters)}

    def _whole_base(self) -> dict[str, nn.Parameter]:
        """Parameters of the base but those that its architecture never trains; from here on trainable."""
        state = self._state
        if state.model is not state.base:
            raise UserError("a base with adapters on it can't be trained as a whole: set model.lora: null")
        if state.spec.sharding.endswith("base"):
            raise UserError(
                f"sharding: {state.spec.sharding} is for a frozen base; with model.lora: null set it to "
                "full, experts or experts+full"
            )
        for name, parameter in state.base.named_parameters():
            parameter.requires_grad_(not name.endswith(state.architecture.untrained))
        if state.sharded:
            gather_gradients(state.base)
        if state.spec.model.gradient_checkpointing:
            adapters.enable_gradient_checkpointing(state.base)
        return {name: p for name, p in state.base.named_parameters() if p.requires_grad}

    def _adapter_and_head(self, role: str) -> dict[str, nn.Parameter]:
        """Parameters of one adapter and its head, from here on trainable beside those of `trainings`."""
        model, head = self._state.model, self._state.heads.get(role)
        adapters.set_trainable(model, [role, *(name for name in self.trainings if name)])
        if head is not None:
            head.requires_grad_(True)
        return {**adapters.adapter_parameters(model, role), **head_parameters(head)}

    def _release(self, roles: Iterable[str | None]) -> None:
        for role in roles:
            training = self.trainings.pop(role, None)
            if training is not None:
                training.release()
            if role in self._state.heads:
                self._state.heads[role].requires_grad_(False)

    def snapshot(self) -> dict[str, Any]:
        """All that steps change, for `put` on a rank that was prepared alike."""
        return {
            "trainings": {role: training.snapshot() for role, training in self.trainings.items()},
            "loads": dict(self._loads),
        }

    def put(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot; roles that were prepared after it keep what they have."""
        for role, kept in state["trainings"].items():
            if role in self.trainings:
                self.trainings[role].put(kept)
        self._loads = dict(state["loads"])

    @property
    def training(self) -> Training:
        """Of the role that was prepared last."""
        self._state.refuse_parked()
        if not self.trainings:
            raise RuntimeError("prepare_training comes before update, save_checkpoint and load_checkpoint")
        return next(reversed(self.trainings.values()))

    def training_of(self, role: str | None) -> Training:
        """Of a role that was prepared; None: the one prepared last."""
        self._state.refuse_parked()
        if role is not None and role not in self.trainings:
            raise RuntimeError(f"prepare_training comes before anything that trains '{role}'")
        return self.training if role is None else self.trainings[role]

    # --- Steps ----------------------------------------------------------------------------------

    def update(self, batch: Batch, loss: Loss, step: int, role: str | None = None) -> dict[str, float]:
        """One optimizer step on a global batch.

        Args:
            batch: all rows of the step, the same on every rank.
            loss: what to minimise.
            step: number of this step, from 0; dropout is drawn from it.
            role: which of the prepared roles trains; None: the one prepared last.

        Returns:
            TRL's metric names over the global batch, `moe/...`, and throughput.

        Raises:
            InvariantViolation: loss or gradient is not finite, or a trainable parameter gets no gradient.
        """
        begun = time.perf_counter()
        training = self.training_of(role)
        batch = loss.completed(batch, lambda part: self._scores.logprobs(part, training.role))
        training.zero_grad()
        sums = self._run(batch, loss, training.role, step, train=True)
        training.reduce_gradients()
        metrics = sums.reduced(self._state.ranks)
        loss.check(metrics)
        vanish, balances = loss.gradient_may_vanish, self._state.runner.aux_coef > 0
        metrics.update(training.step(step, metrics["loss"], batch.n_tokens, vanish, balances))
        if sums.router_load is not None:
            metrics.update(sums.router_load.metrics())
            self._loads.pop(training.role, None)
            self._loads[training.role] = sums.router_load.load
        metrics["step_seconds"] = time.perf_counter() - begun
        metrics["tokens_per_second"] = batch.n_tokens / metrics["step_seconds"]
        return metrics

    def evaluate(self, batch: Batch, loss: Loss, role: str | None) -> dict[str, float]:
        """The loss and its metrics over a batch of any size, without dropout or gradient."""
        batch = loss.completed(batch, lambda part: self._scores.logprobs(part, role))
        return self._run(batch, loss, role, step=0, train=False).reduced(self._state.ranks)

    def router_load(self, role: str | None = None) -> np.ndarray | None:
        """int64 (layers, experts): tokens per expert in a role's last update, over all ranks.

        `role` None: the one that was updated last. None for a dense model, and before the first update.
        """
        if role is not None:
            return self._loads.get(role)
        return next(reversed(self._loads.values()), None)

    def _run(self, batch: Batch, loss: Loss, role: str | None, step: int, train: bool) -> Sums:
        there = [*batch.columns, *batch.token_columns]
        missing = [c for c in loss.required_columns if c not in there]
        if missing:
            raise KeyError(f"{type(loss).__name__} needs columns {missing}; the batch has {there}")
        if loss.reads != "logps":
            # Given experts are those of the policy's samples; a critic or reward model routes for itself.
            batch = batch.unrouted()
        state = self._state
        state.set_mode(train, dropout=loss.uses_dropout)
        runner = replace(state.runner, head=state.heads.get(role or ""))
        with state.as_role(role):
            sums = runner.run(batch, loss, step, train)
        state.free_gathered()
        return sums
