"""ModelHost: one base model with named adapters on one rank, and all that is done with it.

Every rank of a host is given the whole global batch and takes its own share of rows; tensor-parallel ranks
take the same. Losses divide by totals of the global batch and gradients are summed over ranks, so one rank
and many do the same step. Policy, reference, critic and reward model are views: an adapter, with or without
a scalar head, or the bare base.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from actors.errors import UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.base.loading import load_base, resolve_base
from actors.models.lora import adapters
from actors.models.lora.heads import HeadInit, make_head
from actors.models.moe.router_replay import RouteReplay
from actors.models.moe.router_stats import RouterStats, aux_loss_coef
from actors.models.parallel import fsdp as sharding
from actors.trainer.forward_backward import PassRunner
from actors.trainer.host_state import START_ADAPTER
from actors.trainer.process_groups import Ranks
from actors.trainer.saving import HostFiles
from actors.trainer.scores import HostScoring
from actors.trainer.spec import HostSpec
from actors.trainer.token_scorer import TokenScorer
from actors.trainer.torch_setup import _configure_torch
from actors.trainer.updates import HostTraining
from actors.trainer.weight_source import WeightSource

__all__ = ["START_ADAPTER", "ModelHost"]


class ModelHost(HostTraining, HostScoring, HostFiles):
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
        self.ranks = Ranks(rank, world_size, init_method, timeout_s, spec.device, spec.tensor_parallel_size)
        sharded = spec.sharding != "none" and world_size > 1
        split: Literal["layers", "experts"] = "experts" if spec.sharding == "experts" else "layers"
        self.base = load_base(
            spec.model, spec.device, spec.seed, world_size if sharded else 1, split, self.ranks.mesh
        )
        self.config = self.base.config
        self.base.requires_grad_(False)
        self.model: Any = self.base
        scorer = TokenScorer(self.base)
        self.runner = PassRunner(
            scorer,
            RouterStats(self.base),
            self.ranks,
            aux_loss_coef(spec.model, self.config),
            self._packing(spec.packing, scorer),
            spec.max_tokens_per_micro_batch,
            self.config.hidden_size,
            spec.seed,
            torch.device(spec.device),
            lockstep=sharded,
        )
        if spec.model.moe.router_replay == "rollout":
            self.runner.scorer.replay = RouteReplay(self.base)
        self._dropouts = [m for m in self.base.modules() if isinstance(m, nn.Dropout)]
        self.heads = {}
        self._trainings = {}
        self._loads = {}
        self._agreement = None
        self.weight_source = WeightSource(self, leads=rank == 0, sharded=self.sharded)
        self.base.eval()
        if resolved.adapter_path is not None:
            self.add_adapter(START_ADAPTER, resolved.adapter_path, trainable=False)

    def _packing(self, asked: bool | str, scorer: TokenScorer) -> bool:
        packs = self.architecture.packs
        packable = packs == "bins" or (packs == "padding_free" and scorer.by_sequence)
        if asked is True and not packable:
            raise UserError(
                f"packing: {self.architecture.model_type} mixes packed sequences; set packing: auto"
            )
        return packable if asked == "auto" else bool(asked)

    def set_batching(self, packing: bool | str, max_tokens_per_micro_batch: int) -> None:
        """How the next stage's batches are cut up; the base stays as it is.

        Raises:
            UserError: packing was asked for where the architecture mixes packed sequences.
        """
        self.runner = replace(
            self.runner,
            packing=self._packing(packing, self.runner.scorer),
            max_tokens=max_tokens_per_micro_batch,
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
        if self.sharded and self.spec.sharding == "full":
            sharding.shard_with_layers(self.base, adapters.adapter_parameters(self.model, name))
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

    def close(self) -> None:
        """Leave the group of ranks, and let engines go."""
        self.weight_source.close()
        self.ranks.close()
