"""ModelHost: one base model with named adapters on one data-parallel rank, and all that is done with it.

Every rank of a host is given the whole global batch and takes its own share of rows. Losses divide
by totals of the global batch and gradients are summed over ranks, so one rank and many do the same
step. Policy, reference, critic and reward model are views: an adapter, with or without a scalar head,
or the bare base.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.algorithms.dpo import ld_weights
from actors.algorithms.loss import Loss
from actors.allocator import keep_freed_memory
from actors.batch import Batch
from actors.errors import InvariantViolation, UserError
from actors.host_spec import HostSpec
from actors.models import adapters
from actors.models.architectures import architecture_of
from actors.models.heads import HeadInit, head_parameters, make_head
from actors.models.loading import load_base, load_tokenizer, resolve_base
from actors.models.moe import RouterStats, aux_loss_coef
from actors.optim import names_without_decay
from actors.optim_spec import OptimSpec
from actors.packing import MicroBatch, counted_places
from actors.passes import PassRunner, Sums
from actors.ranks import Ranks
from actors.scoring import TokenScorer
from actors.sync.source import WeightSource
from actors.training import Training

START_ADAPTER = "start"
"""Adapter that holds what `model.base` names, when that is an adapter directory."""


class ModelHost:
    """One rank of a host. Methods are collective: call each on every rank with the same arguments."""

    def __init__(
        self,
        spec: HostSpec,
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Load the base and join the other ranks.

        Raises:
            UserError: the base can't be used, or packing was asked for where it is wrong.
        """
        _configure_torch(spec)
        self.spec = spec
        resolved = resolve_base(spec.model).checked()
        assert resolved.config is not None
        self.architecture = architecture_of(resolved.config)
        packing = self._packing(spec.packing)
        self.base = load_base(spec.model, spec.device, seed=spec.seed)
        self.config = self.base.config
        self.base.requires_grad_(False)
        self.model: Any = self.base
        self.ranks = Ranks(rank, world_size, init_method, timeout_s, spec.device)
        self.runner = PassRunner(
            TokenScorer(self.base),
            RouterStats(self.base),
            self.ranks,
            aux_loss_coef(spec.model, self.config),
            packing,
            spec.max_tokens_per_micro_batch,
            self.config.hidden_size,
            spec.seed,
            torch.device(spec.device),
        )
        self._dropouts = [m for m in self.base.modules() if isinstance(m, nn.Dropout)]
        self.heads: dict[str, nn.Linear] = {}
        """Scalar heads by role."""
        self._trainings: dict[str | None, Training] = {}
        """By role; the last prepared one is last."""
        self._loads: dict[str | None, np.ndarray] = {}
        """Tokens per expert by role; of the last one that was updated last."""
        self.weight_source = WeightSource(self)
        self.base.eval()
        if resolved.adapter_path is not None:
            self.add_adapter(START_ADAPTER, resolved.adapter_path, trainable=False)

    def _packing(self, asked: bool | str) -> bool:
        if asked is True and not self.architecture.packable:
            raise UserError(
                f"packing: {self.architecture.model_type} mixes packed sequences; set packing: auto"
            )
        return self.architecture.packable if asked == "auto" else bool(asked)

    def set_batching(self, packing: bool | str, max_tokens_per_micro_batch: int) -> None:
        """How the next stage's batches are cut up; the base stays as it is.

        Raises:
            UserError: packing was asked for where the architecture mixes packed sequences.
        """
        self.runner = replace(
            self.runner, packing=self._packing(packing), max_tokens=max_tokens_per_micro_batch
        )

    # --- Adapters -------------------------------------------------------------------------------

    def add_adapter(self, name: str, path: str | Path | None = None, trainable: bool = True) -> None:
        """Add an adapter: saved at `path`, or fresh from the model's LoRA settings (A drawn, B zero).

        A saved reward model or critic brings its head along. With a base that was given as an adapter
        directory, fresh means: starting from that adapter.

        Raises:
            UserError: the adapter doesn't fit the base, or the model has no LoRA settings.
        """
        if path is None and START_ADAPTER in adapters.adapter_names(self.model):
            self.copy_adapter(START_ADAPTER, name, trainable)
            return
        lora = self.spec.model.lora
        if path is None and lora is None:
            raise UserError(f"model.lora is null, so there is no adapter '{name}' to make")
        impl = lora.expert_impl if lora is not None else "auto"
        if self.model is self.base:
            # From here on the base is wrapped; PEFT freezes it.
            if path is None:
                assert lora is not None
                self.model = adapters.attach_lora(self.base, lora, name, self.spec.seed)
            else:
                self.model = adapters.attach_saved(
                    self.base, path, name, trainable=trainable, expert_impl=impl
                )
            if self.spec.model.gradient_checkpointing:
                adapters.enable_gradient_checkpointing(self.model)
        else:
            source: Any = path if path is not None else lora
            adapters.add_adapter(self.model, name, source, trainable=trainable, seed=self.spec.seed)
        head = adapters.read_head(path) if path is not None else None
        if head is not None:
            self._set_head(name, head)
        self._dropouts = [m for m in self.base.modules() if isinstance(m, nn.Dropout)]
        self._set_mode(train=False)

    def copy_adapter(self, source: str, target: str, trainable: bool = False) -> None:
        """Set `target` to the weights of `source`, its head included; it is added if it isn't there."""
        if target in adapters.adapter_names(self.model):
            adapters.copy_adapter_weights(self.model, source, target)
        else:
            with tempfile.TemporaryDirectory(prefix="raylign-adapter-") as directory:
                adapters.save_adapter(self.model, source, directory)
                self.add_adapter(target, directory, trainable)
        if source in self.heads:
            self._set_head(target, self.heads[source].weight)

    def add_head(self, role: str, init: HeadInit = "zero") -> None:
        """Give an adapter a fresh scalar head that trains with it; one that it has already is kept.

        `normal` is drawn from N(0, initializer_range) by the host's seed, as transformers does it.
        """
        if role not in self.heads:
            self._set_head(role, make_head(self.config, init, self.spec.seed, self.spec.device).weight)

    def _set_head(self, role: str, weight: torch.Tensor) -> None:
        """Set or add a head; one that is there stays the same object, as an optimizer may hold it."""
        if role not in adapters.adapter_names(self.model):
            raise KeyError(f"no adapter '{role}' to give a head to")
        if role not in self.heads:
            self.heads[role] = make_head(self.config, "zero", 0, self.spec.device)
        with torch.no_grad():
            self.heads[role].weight.copy_(weight)

    def _as(self, role: str | None) -> AbstractContextManager[None]:
        """Run as an adapter; None is the model as it was given, with its adapter if it had one."""
        if role is None and START_ADAPTER in adapters.adapter_names(self.model):
            role = START_ADAPTER
        return adapters.role(self.model, role)

    # --- Training -------------------------------------------------------------------------------

    def prepare_training(
        self, role: str | None, spec: OptimSpec, total_steps: int, keep: bool = False
    ) -> dict[str, Any]:
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
            self.base.requires_grad_(True)
            parameters = dict(self.base.named_parameters())
            if self.spec.model.gradient_checkpointing:
                adapters.enable_gradient_checkpointing(self.base)
        else:
            adapters.set_trainable(self.model, [role, *(name for name in self._trainings if name)])
            head = self.heads.get(role)
            if head is not None:
                head.requires_grad_(True)
            parameters = {**adapters.adapter_parameters(self.model, role), **head_parameters(head)}
        exempt = names_without_decay(self.model) if spec.weight_decay > 0 else set()
        training = self._trainings[role] = Training(role, parameters, spec, total_steps, exempt)
        return {"trainable_parameters": training.n_parameters, "tensors": len(parameters)}

    def _release(self, roles: Iterable[str | None]) -> None:
        for role in roles:
            training = self._trainings.pop(role, None)
            if training is not None:
                training.flat.release()
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
        training.flat.zero_grad()
        sums = self._run(batch, loss, training.role, step, train=True)
        for grad in training.flat.grads:
            self.ranks.sum_(grad)
        metrics = sums.reduced(self.ranks)
        metrics.update(training.step(step, metrics["loss"], batch.n_tokens, loss.gradient_may_vanish))
        if sums.router_load is not None:
            metrics.update(sums.router_load.metrics())
            self._loads.pop(training.role, None)
            self._loads[training.role] = sums.router_load.load
        metrics["step_seconds"] = time.perf_counter() - begun
        metrics["tokens_per_second"] = batch.n_tokens / metrics["step_seconds"]
        return metrics

    def evaluate(self, batch: Batch, loss: Loss, role: str | None) -> dict[str, float]:
        """The loss and its metrics over a batch of any size, without dropout or gradient."""
        return self._run(batch, loss, role, step=0, train=False).reduced(self.ranks)

    def _run(self, batch: Batch, loss: Loss, role: str | None, step: int, train: bool) -> Sums:
        there = [*batch.columns, *batch.token_columns]
        missing = [c for c in loss.required_columns if c not in there]
        if missing:
            raise KeyError(f"{type(loss).__name__} needs columns {missing}; the batch has {there}")
        self._set_mode(train, dropout=loss.uses_dropout)
        runner = replace(self.runner, head=self.heads.get(role or ""))
        with self._as(role):
            return runner.run(batch, loss, step, train)

    # --- Log-probabilities, values, scores ------------------------------------------------------

    def token_logprobs(self, batch: Batch, role: str | None, temperature: float = 1.0) -> np.ndarray:
        """float64 (counted tokens,): log-probability of each counted token, in the batch's order.

        Under softmax(logits / temperature), as tokens sampled at that temperature have it.
        """
        return self._per_token(batch, role, lambda micro: self.runner.scorer.logps(micro, temperature))

    def values(self, batch: Batch, role: str) -> np.ndarray:
        """float64 (counted tokens,): the role's head at the state before each counted token."""
        head = self._head_of(role)
        return self._per_token(batch, role, lambda micro: self.runner.scorer.values(micro, head))

    def scores(self, batch: Batch, role: str) -> np.ndarray:
        """float64 (sequences,): the role's head at each sequence's last token."""
        head, k = self._head_of(role), batch.sequences_per_row
        return self._gathered(
            batch,
            role,
            batch.n_sequences,
            lambda rows: torch.from_numpy((rows[:, None] * k + np.arange(k)).reshape(-1)),
            lambda micro: self.runner.scorer.scores(micro, head),
        )

    def _head_of(self, role: str) -> nn.Linear:
        if role not in self.heads:
            raise KeyError(f"role '{role}' has no head (with one: {', '.join(self.heads) or 'none'})")
        return self.heads[role]

    def _per_token(
        self, batch: Batch, role: str | None, compute: Callable[[MicroBatch], torch.Tensor]
    ) -> np.ndarray:
        def places(rows: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(counted_places(batch, rows))

        return self._gathered(batch, role, int(batch.loss_mask.sum()), places, compute)

    def _gathered(
        self,
        batch: Batch,
        role: str | None,
        size: int,
        places: Callable[[np.ndarray], torch.Tensor],
        compute: Callable[[MicroBatch], torch.Tensor],
    ) -> np.ndarray:
        """float64 (size,): what `compute` says of all ranks' micro-batches, at the `places` of their rows."""
        self._set_mode(train=False)
        rows, micros = self.runner.shard(batch)
        found = torch.zeros(size, dtype=torch.float64, device=self.spec.device)
        with self._as(role), torch.no_grad():
            for micro in micros:
                found[places(rows[micro.rows]).to(found.device)] = compute(micro).double()
        return self.ranks.sum_(found).cpu().numpy()

    def logprobs(self, batch: Batch, role: str | None, ld_alpha: float | None = None) -> np.ndarray:
        """float64 (sequences,): log-probability of each sequence's counted tokens.

        With `ld_alpha` (pairs only) as `DpoLoss.ld_alpha` sums them, for the reference of such a loss.
        """
        tokens = self.token_logprobs(batch, role)
        if ld_alpha is not None:
            tokens = tokens * ld_weights(batch, ld_alpha)
        sequence = np.repeat(np.arange(batch.n_sequences), batch.label_counts)
        return np.bincount(sequence, weights=tokens, minlength=batch.n_sequences)

    def _set_mode(self, train: bool, dropout: bool = False) -> None:
        """Walk the modules only when the mode changes: it costs a millisecond."""
        if self.model.training != train:
            self.model.train(train)
        for module in self._dropouts:
            module.training = train and dropout

    # --- What can be looked at and kept ---------------------------------------------------------

    @property
    def _who(self) -> str:
        return f"host rank {self.ranks.rank}"

    def describe(self) -> dict[str, Any]:
        """Facts for logs and reports."""
        trained = [p for training in self._trainings.values() for p in training.flat.parameters.values()]
        return {
            "architecture": self.architecture.model_type,
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "trainable_parameters": sum(p.numel() for p in trained),
            "adapters": adapters.adapter_names(self.model),
            "heads": list(self.heads),
            "dtype": self.spec.model.dtype,
            "device": self.spec.device,
            "packing": self.runner.packing,
            "experts_implementation": getattr(self.config, "_experts_implementation", None),
            "aux_loss_coef": self.runner.aux_coef,
            "rank": self.ranks.rank,
            "world_size": self.ranks.world_size,
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def router_load(self, role: str | None = None) -> np.ndarray | None:
        """int64 (layers, experts): tokens per expert in a role's last update, over all ranks.

        `role` None: the one that was updated last. None for a dense model, and before the first update.
        """
        if role is not None:
            return self._loads.get(role)
        return next(reversed(self._loads.values()), None)

    def frozen_digest(self) -> str:
        """Digest of everything that training must not change, other roles' heads included."""
        heads = {f"head of {role}": head for role, head in self.heads.items()}
        return adapters.frozen_digest(nn.ModuleDict({"model": self.model, **heads}))

    def save_adapter(self, role: str, directory: str | Path) -> None:
        """Write one adapter in PEFT's layout, with its head if it has one (rank 0)."""
        head = self.heads.get(role)
        parameters = {**adapters.adapter_parameters(self.model, role), **head_parameters(head)}
        self._check_replicas(parameters.values())
        if self.ranks.rank == 0:
            adapters.save_adapter(self.model, role, directory, None if head is None else head.weight)
        self.ranks.wait()

    def save_model(self, directory: str | Path) -> None:
        """Write the whole model and its tokenizer in transformers' layout (rank 0); for `lora: null`."""
        if self.model is not self.base:
            raise UserError("the model has adapters: save those, or merge them")
        self._check_replicas(self.base.parameters())
        if self.ranks.rank == 0:
            # Parameters in training are views of one storage, which transformers takes for tied weights.
            state = {name: value.detach().clone() for name, value in self.base.state_dict().items()}
            self.config.use_cache = True
            try:
                self.base.save_pretrained(str(directory), state_dict=state)
            finally:
                self.config.use_cache = False
            load_tokenizer(self.spec.model).save_pretrained(str(directory))
        self.ranks.wait()

    def save_checkpoint(self, directory: str | Path, role: str | None = None) -> None:
        """Write all that `load_checkpoint` needs to go on bit for bit (rank 0).

        Args:
            directory: one for each role.
            role: which of the prepared roles; None: the one prepared last.
        """
        training = self._training_of(role)
        self._check_replicas(training.flat.parameters.values())
        if self.ranks.rank == 0:
            training.save(Path(directory))
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

    def _check_replicas(self, parameters: Any) -> None:
        """Ranks hold replicas; a drift would otherwise show in nothing but worse results."""
        if self.ranks.world_size == 1:
            return
        with torch.no_grad():
            sums = torch.stack([p.double().sum() for p in parameters])
        if not self.ranks.agree(sums):
            raise InvariantViolation(self._who, "save", "the ranks hold different weights", "report this")

    def close(self) -> None:
        """Leave the group of ranks, and let engines go."""
        self.weight_source.close()
        self.ranks.close()


def _configure_torch(spec: HostSpec) -> None:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    if torch.device(spec.device).type == "cpu":
        keep_freed_memory()
    if torch.device(spec.device).type == "cpu" and torch.get_num_threads() > 1:
        # With several threads the backward of indexing adds in any order; resumed runs then differ in the
        # last bits. Filling fresh memory, the other half of that switch, would only cost time.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
