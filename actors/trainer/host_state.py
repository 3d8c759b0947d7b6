"""What the parts of a `ModelHost` share; `actors.trainer.model_host` puts them together."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.errors import InvariantViolation
from actors.models.architectures.lookup import Architecture
from actors.models.lora import adapters
from actors.models.parallel.fsdp import is_sharded, reshard
from actors.trainer.forward_backward import PassRunner
from actors.trainer.process_groups import Ranks
from actors.trainer.spec import HostSpec
from actors.trainer.train_state import Training

START_ADAPTER = "start"
"""Adapter that holds what `model.base` names, when that is an adapter directory."""


class HostParts:
    """One rank of a host, as each of its parts sees it."""

    spec: HostSpec
    architecture: Architecture
    base: Any
    """The transformers model, its layers wrapped by PEFT once there is an adapter."""
    model: Any
    """The PeftModel around `base`, or `base` itself without adapters."""
    config: Any
    ranks: Ranks
    runner: PassRunner
    heads: dict[str, nn.Linear]
    """Scalar heads by role."""
    _trainings: dict[str | None, Training]
    """By role; the last prepared one is last."""
    _loads: dict[str | None, np.ndarray]
    """Tokens per expert by role; of the last one that was updated last."""
    _agreement: np.ndarray | None
    """Of `HostScoring.route_agreement`."""
    _dropouts: list[nn.Dropout]

    @property
    def _who(self) -> str:
        return f"host rank {self.ranks.rank}"

    @property
    def sharded(self) -> bool:
        """Whether ranks hold slices of the base; every pass and every look at weights is then collective."""
        return self.runner.lockstep or self.ranks.tensor_parallel_size > 1

    def _as(self, role: str | None) -> AbstractContextManager[None]:
        """Run as an adapter; None is the model as it was given, with its adapter if it had one."""
        if role is None and START_ADAPTER in adapters.adapter_names(self.model):
            role = START_ADAPTER
        return adapters.role(self.model, role)

    def _set_mode(self, train: bool, dropout: bool = False) -> None:
        """Walk the modules only when the mode changes: it costs a millisecond."""
        if self.model.training != train:
            self.model.train(train)
        for module in self._dropouts:
            module.training = train and dropout

    def _settle(self) -> None:
        """Give back what a pass over a sharded base left gathered."""
        if self.sharded:
            reshard(self.base)

    def _check_replicas(self, parameters: Iterable[Tensor]) -> None:
        """Ranks hold replicas of what is not sharded; a drift would otherwise show in nothing but worse
        results."""
        replicas = [p for p in parameters if not is_sharded(p)]
        if self.ranks.world_size == 1 or not replicas:
            return
        with torch.no_grad():
            sums = torch.stack([p.double().sum() for p in replicas])
        if not self.ranks.agree(sums):
            raise InvariantViolation(self._who, "save", "the ranks hold different weights", "report this")
