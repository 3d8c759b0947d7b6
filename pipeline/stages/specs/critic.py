"""Settings of the critic that PPO trains beside the policy."""

from __future__ import annotations

from pydantic import Field

from actors.algorithms import ValueLoss, ValueSettings
from actors.trainer.spec import OptimSpec


class CriticSettings(ValueSettings):
    """The critic's own settings: its loss, where it starts, how fast it learns."""

    critic_init: str | None = None
    """Start of the critic: null: the weights that the policy starts from, with a head of zeros; or a
    reward stage, with its head."""
    critic_learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Peak learning rate of the critic; null: the policy's."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start in which only the critic learns."""

    def value_loss(self) -> ValueLoss:
        """The loss of the critic's values."""
        return ValueLoss.from_settings(self)

    def critic_optim_spec(self, policy: OptimSpec) -> OptimSpec:
        """The critic's optimizer: the policy's settings with its own learning rate."""
        return policy.model_copy(update={"learning_rate": self.critic_learning_rate or policy.learning_rate})
