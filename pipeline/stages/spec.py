"""Every type of stage, by name. The one module that others import stages from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.stages.offline_spec import (
    DpoOptions,
    DpoStage,
    KtoStage,
    ReferencedStage,
    RewardStage,
    SftStage,
)
from pipeline.stages.online_spec import (
    GrpoStage,
    OnlineDpoStage,
    PolicyGradientStage,
    PpoStage,
    ReinforcePpStage,
    RlooStage,
    RlStage,
)
from pipeline.stages.stage_spec import StageSpec

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
