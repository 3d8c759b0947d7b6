"""Every type of stage, by name. The one module that others import stages from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipeline.stages.specs.base import StageSpec
from pipeline.stages.specs.critic import CriticSettings
from pipeline.stages.specs.offline import (
    DpoStage,
    KtoStage,
    OfflineStage,
    ReferencedStage,
    RewardStage,
    SftStage,
)
from pipeline.stages.specs.online import (
    DistillStage,
    GrpoStage,
    OnlineDpoStage,
    PolicyGradientStage,
    PpoStage,
    ReinforcePpStage,
    RlooStage,
    RlStage,
)

__all__ = [
    "STAGE_TYPES",
    "AnyStage",
    "CriticSettings",
    "DistillStage",
    "DpoStage",
    "GrpoStage",
    "KtoStage",
    "NamedStage",
    "OfflineStage",
    "OnlineDpoStage",
    "OnlineStage",
    "PolicyGradientStage",
    "PpoStage",
    "ReferencedStage",
    "ReinforcePpStage",
    "RewardStage",
    "RlStage",
    "RlooStage",
    "SftStage",
    "Stage",
    "StageSpec",
]

Stage = Annotated[
    SftStage
    | DpoStage
    | KtoStage
    | RewardStage
    | PpoStage
    | GrpoStage
    | RlooStage
    | ReinforcePpStage
    | OnlineDpoStage
    | DistillStage,
    Field(discriminator="type"),
]
OnlineStage = PolicyGradientStage | OnlineDpoStage
"""An online stage, told apart by `learns_from`."""
AnyStage = OfflineStage | OnlineStage
"""A stage, told apart by `online`."""


@dataclass(frozen=True)
class NamedStage:
    """A stage as it stands in a run."""

    name: str
    spec: AnyStage
    seed: int
    """Of order, initialisation and dropout: its own, or the run's."""
    base: str
    """Directory or hub id of the run's base, whose vocabulary and end of turn its tokens follow."""


STAGE_TYPES: dict[str, type[StageSpec]] = {
    "sft": SftStage,
    "reward": RewardStage,
    "dpo": DpoStage,
    "kto": KtoStage,
    "ppo": PpoStage,
    "grpo": GrpoStage,
    "rloo": RlooStage,
    "reinforce_pp": ReinforcePpStage,
    "online_dpo": OnlineDpoStage,
    "distill": DistillStage,
}
