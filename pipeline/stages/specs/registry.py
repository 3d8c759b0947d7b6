"""Every type of stage, by name. The one module that others import stages from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.stages.specs.base import StageSpec
from pipeline.stages.specs.offline import (
    DpoOptions,
    DpoStage,
    KtoStage,
    ReferencedStage,
    RewardStage,
    SftStage,
)
from pipeline.stages.specs.online import (
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
    "DpoOptions",
    "DpoStage",
    "GrpoStage",
    "KtoStage",
    "OnlineDpoStage",
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
    | OnlineDpoStage,
    Field(discriminator="type"),
]
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
}
