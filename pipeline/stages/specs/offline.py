"""Stages that train on answers that are there: SFT, preferences, reward models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from actors.algorithms import (
    DpoLoss,
    DpoSettings,
    KtoLoss,
    KtoSettings,
    Loss,
    RewardLoss,
    RewardSettings,
    SftLoss,
)
from pipeline.data.reading.layouts import Kind
from pipeline.stages.specs.base import ReferenceSettings, StageSpec


class OfflineStage(StageSpec, ABC):
    """Settings and facts of stages whose answers are in their data."""

    online: ClassVar[Literal[False]] = False

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Columns under which its loss reads the reference's log-probabilities, one for each sequence of a
        row; none without a reference."""
        return ()

    @property
    def reference_ld_alpha(self) -> float | None:
        """Weight, in those log-probabilities, of tokens beyond the shorter answer's length; None: 1."""
        return None

    @property
    def needs_mismatched(self) -> bool:
        """Its loss also reads each prompt with the answer of another one."""
        return False

    @property
    def scores_pairs(self) -> bool:
        """Its rows are pairs with a score at the end of each answer."""
        return False

    @abstractmethod
    def loss(self) -> Loss:
        """The loss of its rows, by its own settings."""


class SftStage(OfflineStage):
    """Supervised fine-tuning: token-mean negative log-likelihood."""

    records: ClassVar[Kind] = "sft"
    has_reference: ClassVar[Literal[False]] = False

    type: Literal["sft"] = "sft"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""
    train_on: Literal["answer", "all"] = "answer"
    """Tokens that count in the loss: the assistant's (end-of-turn token included), or all."""

    @property
    def tokens_trained(self) -> Literal["answer", "all"]:
        return self.train_on

    def loss(self) -> Loss:
        return SftLoss()


class ReferencedStage(ReferenceSettings, OfflineStage):
    """An offline stage whose loss compares with a reference policy."""

    has_reference: ClassVar[Literal[True]] = True


class DpoStage(DpoSettings, ReferencedStage):
    """Direct preference optimization and its relatives, on pairs of answers."""

    records: ClassVar[Kind] = "preference"

    type: Literal["dpo"] = "dpo"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""

    @property
    def reference_ld_alpha(self) -> float | None:
        return self.ld_alpha

    def loss(self) -> Loss:
        return DpoLoss.from_settings(self)


class KtoStage(KtoSettings, ReferencedStage):
    """Kahneman-Tversky optimization: answers that are desirable or not, without pairs (or from pairs)."""

    records: ClassVar[Kind] = "unpaired"

    type: Literal["kto"] = "kto"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""
    batch_size: int = Field(default=32, ge=2)
    """Rows per optimizer step, over all ranks; of their answers the reference point is made."""

    @property
    def needs_mismatched(self) -> bool:
        return self.has_reference_point

    def loss(self) -> Loss:
        return KtoLoss.from_settings(self)


class RewardStage(RewardSettings, OfflineStage):
    """A reward model: a scalar head on an adapter of its own, from pairs of answers (Bradley-Terry)."""

    records: ClassVar[Kind] = "preference"
    has_reference: ClassVar[Literal[False]] = False
    makes: ClassVar[Literal["policy", "reward_model"]] = "reward_model"

    type: Literal["reward"] = "reward"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate."""

    @property
    def scores_pairs(self) -> bool:
        return True

    def loss(self) -> Loss:
        return RewardLoss.from_settings(self)
