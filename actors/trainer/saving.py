"""What a host tells about itself, and what it writes to disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.errors import UserError
from actors.models.base.loading import load_tokenizer
from actors.models.lora import adapters
from actors.models.lora.heads import head_parameters
from actors.models.parallel.fsdp import is_sharded
from actors.models.parallel.fsdp_files import write_sharded_model
from actors.models.turn_ends import write_turn_ends
from actors.trainer.host_state import HostParts


class HostFiles(HostParts):
    """The part of a `ModelHost` that can be looked at and kept."""

    def describe(self) -> dict[str, Any]:
        """Facts for logs and reports."""
        trained = [p for training in self._trainings.values() for p in training.parameters.values()]
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
            "sharding": self.spec.sharding if self.sharded else "none",
            "tensor_parallel_size": self.ranks.tensor_parallel_size,
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
        """Digest of everything that training must not change, other roles' heads included.

        The same with and without sharding; collective with it.
        """
        heads = {f"head of {role}": head for role, head in self.heads.items()}
        return adapters.frozen_digest(nn.ModuleDict({"model": self.model, **heads}))

    def save_adapter(self, role: str, directory: str | Path) -> None:
        """Write one adapter in PEFT's layout, with its head if it has one (rank 0)."""
        head = self.heads.get(role)
        parameters = {**adapters.adapter_parameters(self.model, role), **head_parameters(head)}
        self._check_replicas(parameters.values())
        # Collective where adapters are sharded; elsewhere the other ranks have nothing to do here.
        if self.ranks.rank == 0 or any(map(is_sharded, parameters.values())):
            weight = None if head is None else head.weight
            adapters.save_adapter(self.model, role, directory, weight, write=self.ranks.rank == 0)
        self.ranks.wait()

    def save_model(self, directory: str | Path) -> None:
        """Write the whole model and its tokenizer in transformers' layout (rank 0); for `lora: null`."""
        if self.model is not self.base:
            raise UserError("the model has adapters: save those, or merge them")
        self._check_replicas(self.base.parameters())
        if self.sharded:
            with _as_loaded(self.config):
                write_sharded_model(self.base, directory, write=self.ranks.rank == 0)
        elif self.ranks.rank == 0:
            # Parameters in training are views of one storage, which transformers takes for tied weights.
            state = {name: value.detach().clone() for name, value in self.base.state_dict().items()}
            with _as_loaded(self.config):
                self.base.save_pretrained(str(directory), state_dict=state)
        if self.ranks.rank == 0:
            load_tokenizer(self.spec.model).save_pretrained(str(directory))
            write_turn_ends(directory)
        self.ranks.wait()


@contextmanager
def _as_loaded(config: Any) -> Iterator[None]:
    """A config as it is meant to be saved: a cache is off here because training has no use for one."""
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = False
