"""Losses, advantages, divergences and corrections of samples: pure functions and the settings that they read.

What other rooms take of the algorithms is named here; nothing of it imports torch before it is called.
"""

from actors.algorithms.advantages import (
    AdvantageSpec,
    DiscountSettings,
    GaeSettings,
    GroupSettings,
    GroupSize,
    ReinforceSettings,
    Scored,
    Whitening,
    WhitenSettings,
    advantages_of,
)
from actors.algorithms.checks import check_finite
from actors.algorithms.distillation import TOP_IDS, TOP_LOGPS, DistillLoss
from actors.algorithms.dpo import DpoLoss, DpoSettings, OnlineDpoLoss, ld_weights
from actors.algorithms.importance_sampling import CORRECTION, CorrectionSettings, importance_ratios
from actors.algorithms.kl import KlController, KlEstimator, kl_values
from actors.algorithms.kto import LABEL, KtoLoss, KtoSettings
from actors.algorithms.loss import Loss, SamplingTemperature
from actors.algorithms.policy import PolicyLoss
from actors.algorithms.policy_losses import POLICY_LOSSES, Level, LossType, PolicySettings
from actors.algorithms.reward import MARGIN, RewardLoss, RewardSettings
from actors.algorithms.reward_shaping import (
    combine,
    reward_metrics,
    soft_overlong_punishment,
    without_eos_penalty,
    without_spread,
)
from actors.algorithms.sft import SftLoss
from actors.algorithms.value import ValueLoss, ValueSettings, explained_variance

__all__ = [
    "CORRECTION",
    "LABEL",
    "MARGIN",
    "POLICY_LOSSES",
    "TOP_IDS",
    "TOP_LOGPS",
    "AdvantageSpec",
    "CorrectionSettings",
    "DiscountSettings",
    "DistillLoss",
    "DpoLoss",
    "DpoSettings",
    "GaeSettings",
    "GroupSettings",
    "GroupSize",
    "KlController",
    "KlEstimator",
    "KtoLoss",
    "KtoSettings",
    "Level",
    "Loss",
    "LossType",
    "OnlineDpoLoss",
    "PolicyLoss",
    "PolicySettings",
    "ReinforceSettings",
    "RewardLoss",
    "RewardSettings",
    "SamplingTemperature",
    "Scored",
    "SftLoss",
    "ValueLoss",
    "ValueSettings",
    "WhitenSettings",
    "Whitening",
    "advantages_of",
    "check_finite",
    "combine",
    "explained_variance",
    "importance_ratios",
    "kl_values",
    "ld_weights",
    "reward_metrics",
    "soft_overlong_punishment",
    "without_eos_penalty",
    "without_spread",
]
