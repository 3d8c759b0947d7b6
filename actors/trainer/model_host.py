"""ModelHost: one base model with named adapters on one rank, and all that is done with it.

Every rank of a group is given the whole global batch and takes its own share of rows; tensor-parallel ranks
take the same. Losses divide by totals of the global batch and gradients are summed over ranks, so one rank
and many do the same step. Policy, reference, critic and reward model are views: an adapter, with or without
a scalar head, or the bare base.
"""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import torch
from torch import nn

from actors.errors import UserError
from actors.models.base.loading import resolve_base
from actors.models.lora import adapters
from actors.models.lora.heads import HeadInit, make_head
from actors.models.parallel.fsdp import shard_with_layers
from actors.models.spec import LoraSpec
from actors.trainer.host_state import START_ADAPTER, HostState
from actors.trainer.kept_state import KeptState
from actors.trainer.process_groups import Ranks
from actors.trainer.residence import Residence
from actors.trainer.saving import Saving
from actors.trainer.scores import Scores
from actors.trainer.spec import HostSpec
from actors.trainer.torch_setup import configure_torch
from actors.trainer.updates import Updates
from actors.trainer.weight_source import WeightSource

__all__ = ["START_ADAPTER", "ModelHost"]


class ModelHost:
    """The model of one rank: adapters come and go here, the parts do the rest.

    All calls are collective: make each on every rank with the same arguments, as
    `actors.trainer.remote.ModelWorkers` does.
    """

    updates: Updates
    scores: Scores
    saving: Saving
    weight_source: WeightSource
    residence: Residence
    kept: KeptState

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
        configure_torch(spec)
        resolved = resolve_base(spec.model).checked()
        ranks = Ranks(
            rank,
            world_size,
            init_method,
            timeout_s,
            spec.device,
            spec.tensor_parallel_size,
            spec.sequence_parallel_size,
        )
        self.state = HostState(spec, resolved, ranks)
        self.scores = Scores(self.state)
        self.updates = Updates(self.state, self.scores)
        self.saving = Saving(self.state, self.updates)
        self.residence = Residence(self.state, self.updates)
        self.kept = KeptState(self.state, self.updates)
        self.weight_source = WeightSource(self.state, leads=rank == 0, sharded=self.state.sharded)
        if resolved.adapter_path is not None:
            self.add_adapter(START_ADAPTER, resolved.adapter_path, trainable=False)

    def set_batching(self, packing: bool | str, max_tokens_per_micro_batch: int) -> None:
        """Set how the next stage's batches are cut up; the base stays as it is.

        Raises:
            UserError: packing was asked for where the architecture mixes packed sequences.
        """
        self.state.set_batching(packing, max_tokens_per_micro_batch)

    def frozen_digest(self) -> str:
        """Digest of everything that training must not change, other roles' heads included.

        The same with and without sharding; collective with it.
        """
        heads = {f"head of {role}": head for role, head in self.state.heads.items()}
        return adapters.frozen_digest(nn.ModuleDict({"model": self.state.model, **heads}))

    def describe(self) -> dict[str, object]:
        """Facts for logs and reports."""
        state = self.state
        trained = [p for training in self.updates.trainings.values() for p in training.parameters.values()]
        return {
            "architecture": state.architecture.model_type,
            "parameters": sum(p.numel() for p in state.base.parameters()),
            "trainable_parameters": sum(p.numel() for p in trained),
            "adapters": adapters.adapter_names(state.model),
            "heads": list(state.heads),
            "dtype": state.spec.model.dtype,
            "quantization": state.spec.model.quantization,
            "device": state.spec.device,
            "packing": state.runner.packing,
            "experts_implementation": getattr(state.config, "_experts_implementation", None),
            "aux_loss_coef": state.runner.aux_coef,
            "rank": state.ranks.rank,
            "world_size": state.ranks.world_size,
            "sharding": state.spec.sharding if state.sharded else "none",
            "tensor_parallel_size": state.ranks.tensor_parallel_size,
            "sequence_parallel_size": state.ranks.sequence_parallel_size,
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def close(self) -> None:
        """Leave the group of ranks, and let engines go."""
        self.weight_source.close()
        self.state.ranks.close()

    # --- Adapters -------------------------------------------------------------------------------

    def add_adapter(self, name: str, path: str | Path | None = None, trainable: bool = True) -> None:
        """Add an adapter: saved at `path`, or fresh from the model's LoRA settings (A drawn, B zero).

        A saved reward model or critic brings its head along. With a base that was given as an adapter
        directory, fresh means: starting from that adapter.

        Raises:
            UserError: the adapter doesn't fit the base, or the model has no LoRA settings.
        """
        state = self.state
        if path is None and START_ADAPTER in adapters.adapter_names(state.model):
            self.copy_adapter(START_ADAPTER, name, trainable)
            return
        source = path if path is not None else state.spec.model.lora
        if source is None:
            raise UserError(f"model.lora is null, so there is no adapter '{name}' to make")
        if state.model is state.base:
            self._wrap(name, source, trainable)
        else:
            adapters.add_adapter(state.model, name, source, trainable=trainable, seed=state.spec.seed)
        if state.sharded and state.spec.sharding.endswith("full"):
            shard_with_layers(state.base, adapters.adapter_parameters(state.model, name))
        head = adapters.read_head(path) if path is not None else None
        if head is not None:
            self._set_head(name, head)
        state.find_dropouts()
        state.set_mode(train=False)

    def _wrap(self, name: str, source: LoraSpec | str | Path, trainable: bool) -> None:
        """Put PEFT around the base, with a first adapter; PEFT freezes the base."""
        state, lora = self.state, self.state.spec.model.lora
        if isinstance(source, LoraSpec):
            state.model = adapters.attach_lora(state.base, source, name, state.spec.seed)
        else:
            impl = lora.expert_impl if lora is not None else "auto"
            state.model = adapters.attach_saved(
                state.base, source, name, trainable=trainable, expert_impl=impl
            )
        if state.spec.model.gradient_checkpointing:
            adapters.enable_gradient_checkpointing(state.model)

    def copy_adapter(self, source: str, target: str, trainable: bool = False) -> None:
        """Set `target` to the weights of `source`, its head included; it is added if it isn't there."""
        state = self.state
        if target in adapters.adapter_names(state.model):
            adapters.copy_adapter_weights(state.model, source, target)
        else:
            with tempfile.TemporaryDirectory(prefix="raylign-adapter-") as directory:
                adapters.save_adapter(state.model, source, directory)
                self.add_adapter(target, directory, trainable)
        if source in state.heads:
            self._set_head(target, state.heads[source].weight)

    def add_head(self, role: str, init: HeadInit = "zero") -> None:
        """Give an adapter a fresh scalar head that trains with it; one that it has already is kept.

        `normal` is drawn from N(0, initializer_range) by `HostSpec.seed`, as transformers does it.
        """
        state = self.state
        if role not in state.heads:
            self._set_head(role, make_head(state.config, init, state.spec.seed, state.spec.device).weight)

    def _set_head(self, role: str, weight: torch.Tensor) -> None:
        """Set or add a head; one that is there stays the same object, as an optimizer may hold it."""
        state = self.state
        if role not in adapters.adapter_names(state.model):
            raise KeyError(f"no adapter '{role}' to give a head to")
        if role not in state.heads:
            state.heads[role] = make_head(state.config, "zero", 0, state.spec.device)
        with torch.no_grad():
            state.heads[role].weight.copy_(weight)
