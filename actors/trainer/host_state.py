"""Shared state of a `ModelHost`: the model with its adapters and heads, and the ranks that it is on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.cluster.spec import splits_experts, splits_layers
from actors.cluster.turn_plan import both_awake
from actors.errors import InvariantViolation, UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.base.loading import Split, load_base
from actors.models.base.resolving import ResolvedBase
from actors.models.lora import adapters
from actors.models.moe.router_replay import RouteReplay
from actors.models.moe.router_stats import RouterStats, aux_loss_coef
from actors.models.parallel.fsdp import is_sharded, reshard
from actors.trainer.forward_backward import PassRunner
from actors.trainer.process_groups import Ranks
from actors.trainer.spec import HostSpec
from actors.trainer.token_scorer import TokenScorer

_SPLITS: dict[tuple[bool, bool], Split] = {
    (False, False): "tensors",
    (False, True): "layers",
    (True, False): "experts",
    (True, True): "layers and experts",
}
"""By whether experts are split, and whether layers are."""

START_ADAPTER = "start"
"""Adapter that holds what `model.base` names, when that is an adapter directory."""


class HostState:
    """One rank's model. `ModelHost` owns it and changes what it holds; the parts compute with it."""

    def __init__(self, spec: HostSpec, resolved: ResolvedBase, ranks: Ranks) -> None:
        """Load the base, frozen and in evaluation mode."""
        assert resolved.config is not None
        self.spec, self.ranks = spec, ranks
        self.architecture = architecture_of(resolved.config)
        holds_slices = spec.sharding != "none" and ranks.world_size > 1
        mesh = ranks.mesh
        if holds_slices:
            mesh = ranks.split_mesh(spec.expert_parallel_size or ranks.world_size)
        self.parked = False
        """Weights have left the device, which an engine has: nobody may ask for them (`residence`)."""
        split = _SPLITS[splits_experts(spec.sharding), splits_layers(spec.sharding)]
        self._base: PreTrainedModel = load_base(spec.model, spec.device, spec.seed, mesh, split)
        self.base.requires_grad_(False)
        self._model: PreTrainedModel | PeftModel = self.base
        self.config = self.base.config
        self.heads: dict[str, nn.Linear] = {}
        """Scalar heads by role."""
        self.runner = self._runner(lockstep=holds_slices)
        self.find_dropouts()
        self.base.eval()

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, its layers wrapped by PEFT once there is an adapter.

        Raises:
            InvariantViolation: it is parked.
        """
        self.refuse_parked()
        return self._base

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The PeftModel around `base`, or `base` itself without adapters. Raises as `base`."""
        self.refuse_parked()
        return self._model

    @model.setter
    def model(self, model: PeftModel) -> None:
        self._model = model

    def refuse_parked(self) -> None:
        """Stop whoever computes while an engine has the device.

        Raises:
            InvariantViolation: the weights are parked.
        """
        if self.parked:
            raise both_awake(self.who, "it was asked for weights that are parked while engines are awake")

    def _runner(self, lockstep: bool) -> PassRunner:
        spec, scorer = self.spec, TokenScorer(self.base, self.ranks.row_group)
        runner = PassRunner(
            scorer,
            RouterStats(self.base),
            self.ranks,
            aux_loss_coef(spec.model, self.config),
            self._packs(spec.packing, scorer),
            spec.max_tokens_per_micro_batch,
            self.config.hidden_size,
            spec.seed,
            torch.device(spec.device),
            lockstep=lockstep,
        )
        if spec.model.moe.router_replay == "rollout":
            scorer.replay = RouteReplay(self.base)
        return runner

    def _packs(self, asked: bool | str, scorer: TokenScorer) -> bool:
        form = self.architecture.packs
        packable = form == "bins" or (form == "padding_free" and scorer.by_sequence)
        if asked is True and not packable:
            raise UserError(
                f"packing: {self.architecture.model_type} mixes packed sequences; set packing: auto"
            )
        packs = packable if asked == "auto" else bool(asked)
        ranks = self.ranks.sequence_parallel_size
        if ranks > 1 and not (packs and scorer.by_sequence):
            raise UserError(
                f"sequence_parallel_size: {ranks} ranks share out packed rows only, and rows of this "
                f"{self.architecture.model_type} model are padded; set 1, or packing: auto and "
                "attn_implementation: sdpa"
            )
        return packs

    def set_batching(self, packing: bool | str, max_tokens_per_micro_batch: int) -> None:
        """As `ModelHost.set_batching`."""
        packs = self._packs(packing, self.runner.scorer)
        self.runner = replace(self.runner, packing=packs, max_tokens=max_tokens_per_micro_batch)

    @property
    def who(self) -> str:
        """Name of this rank in errors."""
        return f"model worker of rank {self.ranks.rank}"

    @property
    def sharded(self) -> bool:
        """Ranks hold slices of the base: every pass and every look at weights is then collective."""
        return self.runner.lockstep or self.ranks.tensor_parallel_size > 1

    def as_role(self, role: str | None) -> AbstractContextManager[None]:
        """Compute as an adapter; None is the model as it was given, with its adapter if it had one."""
        if role is None and START_ADAPTER in adapters.adapter_names(self.model):
            role = START_ADAPTER
        return adapters.role(self.model, role)

    def find_dropouts(self) -> None:
        """Note where dropout happens; a new adapter brings its own."""
        self._dropouts = [module for module in self.base.modules() if isinstance(module, nn.Dropout)]

    def set_mode(self, train: bool, dropout: bool = False) -> None:
        """Walk the modules only when the mode changes: it costs a millisecond."""
        if self.model.training != train:
            self.model.train(train)
        for module in self._dropouts:
            module.training = train and dropout

    def free_gathered(self) -> None:
        """Give back what a pass over a sharded base left gathered."""
        if self.sharded:
            reshard(self.base)

    def check_replicas(self, parameters: Iterable[Tensor]) -> None:
        """Ranks hold replicas of what is not sharded; a drift would otherwise show in nothing but worse
        results.

        Raises:
            InvariantViolation: they differ.
        """
        replicas = [p for p in parameters if not is_sharded(p)]
        if self.ranks.world_size == 1 or not replicas:
            return
        with torch.no_grad():
            sums = torch.stack([p.double().sum() for p in replicas])
        if not self.ranks.agree(sums):
            raise InvariantViolation(self.who, "save", "the ranks hold different weights", "report this")
