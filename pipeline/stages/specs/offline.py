"""Stages that train on answers that are there: SFT, preferences, reward models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from actors.spec import Spec
from pipeline.data.reading.layouts import Kind
from pipeline.stages.specs.base import StageSpec

if TYPE_CHECKING:
    from actors.algorithms.loss import Loss

DpoLossType = Literal[
    "sigmoid",
    "cdpo",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


DpoLosses = Annotated[
    list[DpoLossType],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=DpoLossType | list[DpoLossType]),
]


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
        from actors.algorithms.sft import SftLoss

        return SftLoss()


class DpoOptions(Spec):
    """What a stage with a preference loss can be told of it, offline or online."""

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull to the reference (tau in IPO)."""
    loss_type: DpoLosses = Field(default=["sigmoid"])
    """One of TRL's losses or cdpo, or a list of them, added up by `loss_weights`."""
    loss_weights: list[float] | None = None
    """Weight of each loss in `loss_type`; null: 1 each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of flipped preferences assumed by cdpo and robust (below 0.5); epsilon of exo_pair."""
    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence between policy and reference (f-DPO)."""
    f_alpha_divergence_coef: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Alpha of alpha_divergence."""
    use_weighting: bool = False
    """Weight pairs by the policy's length-normalized probabilities (WPO)."""
    discopop_tau: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """Temperature of discopop."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens beyond the shorter answer's length (LD-DPO); null: 1."""


class ReferencedStage(OfflineStage):
    """An offline stage whose loss compares with a reference policy."""

    has_reference: ClassVar[Literal[True]] = True

    reference: str | None = None
    """Reference policy: `base` or an earlier stage. Null: the weights that this stage starts from."""


class DpoStage(DpoOptions, ReferencedStage):
    """Direct preference optimization and its relatives, on pairs of answers."""

    records: ClassVar[Kind] = "preference"

    type: Literal["dpo"] = "dpo"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""

    @property
    def reference_columns(self) -> tuple[str, ...]:
        return ("ref_chosen_logps", "ref_rejected_logps")

    @property
    def reference_ld_alpha(self) -> float | None:
        return self.ld_alpha

    def loss(self) -> Loss:
        from actors.algorithms.dpo import DpoLoss

        return DpoLoss(**{name: getattr(self, name) for name in DpoLoss.model_fields})


class KtoStage(ReferencedStage):
    """Kahneman-Tversky optimization: answers that are desirable or not, without pairs (or from pairs)."""

    records: ClassVar[Kind] = "unpaired"

    type: Literal["kto"] = "kto"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""
    batch_size: int = Field(default=32, ge=2)
    """Rows per optimizer step, over all ranks; of their answers the reference point is made."""
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto`, or `apo_zero_unpaired`, which has no reference point: where desirable answers are better than
    the policy's own."""
    desirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of desirable rows. KTO's authors keep (weight x number) of these between 1 and 4/3 of that of
    undesirable ones."""
    undesirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of undesirable rows."""

    @property
    def reference_columns(self) -> tuple[str, ...]:
        return ("ref_logps", "ref_kl_logps") if self.needs_mismatched else ("ref_logps",)

    @property
    def needs_mismatched(self) -> bool:
        return self.loss_type == "kto"

    def loss(self) -> Loss:
        from actors.algorithms.kto import KtoLoss

        return KtoLoss(**{name: getattr(self, name) for name in KtoLoss.model_fields})


class RewardStage(OfflineStage):
    """A reward model: a scalar head on an adapter of its own, from pairs of answers (Bradley-Terry)."""

    records: ClassVar[Kind] = "preference"
    has_reference: ClassVar[Literal[False]] = False
    makes: ClassVar[Literal["policy", "reward_model"]] = "reward_model"

    type: Literal["reward"] = "reward"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    center_rewards_coefficient: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Weight of (reward of chosen + reward of rejected)^2, which keeps rewards around 0; null: none."""

    @property
    def scores_pairs(self) -> bool:
        return True

    def loss(self) -> Loss:
        from actors.algorithms.reward import RewardLoss

        return RewardLoss(center_rewards_coefficient=self.center_rewards_coefficient)
