"""What a host does to train a role: prepare it, step, and keep what a resume needs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from actors.algorithms.loss import Loss
from actors.batches.batch import Batch
from actors.errors import UserError
from actors.models.lora import adapters
from actors.models.lora.heads import head_parameters
from actors.models.parallel.fsdp import gather_gradients
from actors.models.parallel.tensor_parallel import share_names
from actors.trainer.forward_backward import Sums
from actors.trainer.optimizer import names_without_decay
from actors.trainer.scores import HostScoring
from actors.trainer.spec import OptimSpec
from actors.trainer.train_state import Training


class HostTraining(HostScoring):
    """The training part of a `ModelHost`."""

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
        self._release([role] if keep else list(self._trainings))
        if role is None:
            if self.model is not self.base:
                raise UserError(
                    "a base with adapters on it can't be trained as a whole: set model.lora: null"
                )
            if self.spec.sharding == "base":
                raise UserError(
                    "sharding: base is for a frozen base; with model.lora: null set it to full or experts"
                )
            for name, parameter in self.base.named_parameters():
                parameter.requires_grad_(not name.endswith(self.architecture.untrained))
            if self.sharded:
                gather_gradients(self.base)
            parameters = {n: p for n, p in self.base.named_parameters() if p.requires_grad}
            if self.spec.model.gradient_checkpointing:
                adapters.enable_gradient_checkpointing(self.base)
        else:
            adapters.set_trainable(self.model, [role, *(name for name in self._trainings if name)])
            head = self.heads.get(role)
            if head is not None:
                head.requires_grad_(True)
            parameters = {**adapters.adapter_parameters(self.model, role), **head_parameters(head)}
        exempt = names_without_decay(self.model) if spec.weight_decay > 0 else set()
        shares = share_names(self.model) if self.ranks.tensor_parallel_size > 1 else set()
        training = Training(role, parameters, spec, total_steps, exempt, self.ranks, shares)
        self._trainings[role] = training
        return {"trainable_parameters": training.n_parameters, "tensors": len(parameters)}

    def _release(self, roles: Iterable[str | None]) -> None:
        for role in roles:
            training = self._trainings.pop(role, None)
            if training is not None:
                training.release()
            if role in self.heads:
                self.heads[role].requires_grad_(False)

    @property
    def training(self) -> Training:
        """Of the role that was prepared last."""
        if not self._trainings:
            raise RuntimeError("prepare_training comes before update, save_checkpoint and load_checkpoint")
        return next(reversed(self._trainings.values()))

    def _training_of(self, role: str | None) -> Training:
        if role is not None and role not in self._trainings:
            raise RuntimeError(f"prepare_training comes before anything that trains '{role}'")
        return self.training if role is None else self._trainings[role]

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
        training = self._training_of(role)
        batch = loss.completed(batch, lambda part: self.logprobs(part, training.role))
        training.zero_grad()
        sums = self._run(batch, loss, training.role, step, train=True)
        training.reduce_gradients()
        metrics = sums.reduced(self.ranks)
        loss.check(metrics)
        vanish, balances = loss.gradient_may_vanish, self.runner.aux_coef > 0
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
        batch = loss.completed(batch, lambda part: self.logprobs(part, role))
        return self._run(batch, loss, role, step=0, train=False).reduced(self.ranks)

    def _run(self, batch: Batch, loss: Loss, role: str | None, step: int, train: bool) -> Sums:
        there = [*batch.columns, *batch.token_columns]
        missing = [c for c in loss.required_columns if c not in there]
        if missing:
            raise KeyError(f"{type(loss).__name__} needs columns {missing}; the batch has {there}")
        if loss.reads != "logps":
            # Given experts are those of the policy's samples; a critic or reward model routes for itself.
            batch = batch.unrouted()
        self._set_mode(train, dropout=loss.uses_dropout)
        runner = replace(self.runner, head=self.heads.get(role or ""))
        with self._as(role):
            sums = runner.run(batch, loss, step, train)
        self._settle()
        return sums

    def save_checkpoint(self, directory: str | Path, role: str | None = None) -> None:
        """Write all that `load_checkpoint` needs to go on bit for bit (rank 0).

        Args:
            directory: one for each role.
            role: which of the prepared roles; None: the one prepared last.
        """
        training = self._training_of(role)
        self._check_replicas(training.parameters.values())
        if self.ranks.rank == 0 or training.is_sharded:
            training.save(Path(directory), write=self.ranks.rank == 0)
        self.ranks.wait()

    def load_checkpoint(self, directory: str | Path, role: str | None = None) -> int:
        """Go on from a role's checkpoint, after `prepare_training` with the same settings.

        Returns:
            Steps done so far: the number of the next step.

        Raises:
            UserError: incomplete, damaged, or of other settings.
        """
        training = self._training_of(role)
        training.load(Path(directory))
        return training.steps_done
