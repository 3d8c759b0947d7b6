"""Stages that train on their own samples: what all of them share, and each algorithm's own keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from actors.algorithms import (
    CorrectionSettings,
    DiscountSettings,
    DpoSettings,
    GaeSettings,
    GroupSettings,
    GroupSize,
    KlController,
    KlEstimator,
    Level,
    LossType,
    PolicySettings,
    ReinforceSettings,
    SamplingTemperature,
    Whitening,
    WhitenSettings,
)
from actors.batches import SamplingSpec
from actors.sync.spec import SyncSpec
from pipeline.data.reading.layouts import Kind
from pipeline.data.spec import as_sources
from pipeline.environments.spec import TurnSettings
from pipeline.rewards.spec import AnyReward
from pipeline.stages.specs.base import ReferenceSettings, StageSpec
from pipeline.stages.specs.critic import CriticSettings

RewardList = Annotated[
    list[AnyReward],
    BeforeValidator(as_sources, json_schema_input_type=str | AnyReward | list[str | AnyReward]),
]
"""Type of a stage's `rewards:`: a source, one entry, or a list of them."""


class RlStage(TurnSettings, ReferenceSettings, GroupSize, SamplingTemperature, StageSpec):
    """Settings and facts of online stages: sample, reward, update, sync, again.

    One step (of `max_steps`, `save_steps`, `logging_steps`) is one round of this. It generates
    `batch_size * steps_per_generation` samples, `num_generations` of each prompt, and takes
    `steps_per_generation * num_iterations` optimizer steps with them.
    """

    online: ClassVar[Literal[True]] = True
    records: ClassVar[Kind] = "prompt"
    has_reference: ClassVar[Literal[True]] = True
    needs_rewards: ClassVar[bool] = True
    """A sample without a reward teaches nothing."""
    learns_from: ClassVar[Literal["advantages", "pairs"]]
    """Its loss reads an advantage of every token, or compares the samples of a prompt as pairs."""

    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    rewards: RewardList = Field(default_factory=list)
    """Sources of reward: `exact_match`, `module:function`, a reward stage's name, a reward model's directory,
    or by `kind` a service or a check: http, judge, math, code. One or several, added up by their weights;
    none where an environment rewards its own conversations."""
    max_completion_length: int = Field(default=256, ge=1)
    """New tokens per sample, at most, what an environment says included; `max_length` less this is what a
    prompt may take."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Strings that end a sample, beside the end-of-turn token of the template and the base's EOS. A special
    token may be among them."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Token ids that end a sample, beside those."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Batches of `batch_size` samples that one generation is cut into, an optimizer step each."""
    num_iterations: int = Field(default=1, ge=1)
    """Times that the samples of one generation are gone through."""
    missing_eos_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Taken off the reward of a sample that did not end by itself."""
    soft_punish_cache: int | None = Field(default=None, ge=1)
    """DAPO's overlong penalty: within so many tokens below `max_completion_length` the reward falls linearly,
    by up to `soft_punish_weight`; null: none."""
    soft_punish_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Penalty of a sample as long as `max_completion_length`, with `soft_punish_cache`."""
    max_resampling_rounds: int = Field(default=0, ge=0)
    """DAPO's dynamic sampling: prompts whose samples all have the same reward make room for others, which are
    sampled in up to so many further rounds; 0: samples stay as they are."""
    mismatch_tolerance: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest k3 divergence per token between engine and trainer before the run stops; null: by dtype."""
    staleness: int = Field(default=0, ge=0)
    """Versions that the policy may be ahead of the weights that its samples come from: so many steps are
    sampled while earlier ones train. 0: nothing overlaps, and every sample is of the present policy."""
    sync: SyncSpec = Field(default_factory=SyncSpec)
    """Sync of new weights to the rollout engines, and the proof of it."""

    @property
    def compares_samples(self) -> bool:
        """A prompt's samples are compared with each other, so that there must be two or more."""
        return True

    @property
    def room(self) -> int | None:
        return None if self.max_length is None else self.max_length - self.max_completion_length

    @property
    def reward_models(self) -> list[str]:
        return [reward.reward_model for reward in self.rewards if reward.reward_model is not None]

    @property
    def judge_models(self) -> list[str]:
        return list(dict.fromkeys(one.judge_model for one in self.rewards if one.judge_model is not None))

    @property
    def samples_per_step(self) -> int:
        """Samples of one generation."""
        return self.batch_size * self.steps_per_generation

    @property
    def rows_per_step(self) -> int:
        return self.samples_per_step

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one generation."""
        return self.samples_per_step // self.num_generations

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps between two syncs."""
        return self.steps_per_generation * self.num_iterations

    def sampling(self) -> SamplingSpec:
        """Sampling settings for the engines: no filter that the trainer's log-probabilities don't know of."""
        return SamplingSpec(
            temperature=self.temperature,
            max_tokens=self.max_completion_length,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            n=self.num_generations,
        )


class PolicyGradientStage(WhitenSettings, CorrectionSettings, PolicySettings, RlStage):
    """Settings of stages with a policy gradient: ratio, clipping, divergence, averaging."""

    learns_from: ClassVar[Literal["advantages"]] = "advantages"
    advantage: ClassVar[str]
    """Key of `actors.algorithms.advantages.ADVANTAGES`."""

    kl_in: Literal["reward", "loss"] = "loss"
    """Place of the divergence: subtracted from the reward, or added to the loss."""
    kl_target: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Divergence per sample, in nats, that `beta` is steered to; null: `beta` stays."""
    kl_horizon: int = Field(default=KlController.horizon, ge=1)
    """Samples over which `beta` follows `kl_target`; smaller is faster."""
    vllm_importance_sampling_correction: bool | None = None
    """Multiply each token's surrogate by the bounded ratio of the policy to the weights and the engine that
    sampled it; null: where `staleness` is above 0. False there takes the clipped ratio to the engine's own
    log-probabilities instead."""
    mask_truncated_completions: bool = False
    """Leave samples that hit `max_completion_length` out of the loss."""

    @property
    def corrected(self) -> bool:
        """Surrogates are multiplied by importance ratios to the engine."""
        wanted = self.vllm_importance_sampling_correction
        return self.staleness > 0 if wanted is None else wanted

    @property
    def top_k_asked(self) -> int | None:
        """Most probable tokens of a teacher that its loss reads; None: it reads none."""
        return None

    @property
    def clips_to_engine(self) -> bool:
        """The clipped ratio is to the engines' own log-probabilities, and not to the step's first policy."""
        return self.staleness > 0 and not self.corrected


class PpoStage(CriticSettings, GaeSettings, PolicyGradientStage):
    """Proximal policy optimization with a critic and generalized advantage estimation."""

    advantage: ClassVar[str] = "gae"

    type: Literal["ppo"] = "ppo"
    """Kind of stage; may be left out where the stage's name says it."""
    num_generations: int = Field(default=1, ge=1)
    """Samples per prompt."""
    num_iterations: int = Field(default=4, ge=1)
    """Times that the samples of one generation are gone through (PPO's epochs)."""
    beta: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the divergence: subtracted from the reward, token by token, or added to the loss."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of the divergence from the sampled tokens."""
    whiten_advantages: Whitening = "shift_and_scale"
    """Normalise advantages over the tokens of a generation: `shift_and_scale` to mean 0 and standard
    deviation 1 (unbiased), `scale` keeps the mean."""

    @property
    def critic(self) -> CriticSettings:
        return self

    @property
    def compares_samples(self) -> bool:
        return False


class GrpoStage(GroupSettings, PolicyGradientStage):
    """Group relative policy optimization: a sample's advantage is its distance from its prompt's mean."""

    advantage: ClassVar[str] = "group"

    type: Literal["grpo"] = "grpo"
    """Kind of stage; may be left out where the stage's name says it."""


class RlooStage(PolicyGradientStage):
    """REINFORCE, with the mean of a prompt's other samples as baseline."""

    advantage: ClassVar[str] = "rloo"

    type: Literal["rloo"] = "rloo"
    """Kind of stage; may be left out where the stage's name says it."""
    importance_sampling_level: Level = "trajectory"
    """Level of the ratio to the sampling policy: each `token`, the `sequence` (the mean of its
    log-ratios), or the `trajectory` (their sum), as in TRL's trainer."""
    loss_type: LossType = "grpo"
    """Average of token losses, by TRL's names; `grpo`: over each sample and then over samples."""
    num_generations: int = Field(default=2, ge=1)
    """Samples per prompt."""
    beta: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the divergence: subtracted from the reward, or added to the loss."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of the divergence from the sampled tokens."""


class ReinforcePpStage(ReinforceSettings, PolicyGradientStage):
    """REINFORCE++: a token's advantage is its return, normalised over all tokens of the generation."""

    advantage: ClassVar[str] = "reinforce"

    type: Literal["reinforce_pp"] = "reinforce_pp"
    """Kind of stage; may be left out where the stage's name says it."""
    num_generations: int = Field(default=1, ge=1)
    """Samples per prompt."""
    beta: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the divergence: subtracted from the reward, token by token, or added to the loss."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of the divergence from samples; with `baseline: group` the paper has k2 in the loss."""
    whiten_advantages: Whitening = "shift_and_scale"
    """Normalise advantages over the tokens of a generation: `shift_and_scale` to mean 0 and standard
    deviation 1 (unbiased), `scale` keeps the mean."""

    @property
    def compares_samples(self) -> bool:
        return self.baseline == "group"


class DistillStage(DiscountSettings, PolicyGradientStage):
    """On-policy distillation: a token's advantage is what a teacher thinks more of it than the policy."""

    advantage: ClassVar[str] = "reinforce"
    needs_rewards: ClassVar[bool] = False

    type: Literal["distill"] = "distill"
    """Kind of stage; may be left out where the stage's name says it."""
    teacher: str = Field(min_length=1)
    """Policy to become like: `base` or an earlier stage. It scores the samples in the reference's place."""
    reference: None = None
    """None beside the teacher."""
    rewards: RewardList = Field(default_factory=list)
    """Sources of reward beside the teacher; by default none. With `gamma` 1 they count at every token of a
    sample, with 0 at its last."""
    num_generations: int = Field(default=1, ge=1)
    """Samples per prompt."""
    gamma: float = Field(default=0.0, ge=0, le=1)
    """Discount per token: with 0 each token answers for its own divergence alone, with 1 also for that of all
    later ones, which is the gradient of the whole sample's."""
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the divergence from the teacher; above 0. With `teacher_top_k` as in TRL's GKDConfig: 1 for
    the reverse divergence, 0 for the forward one, between them Jensen-Shannon's."""
    teacher_top_k: int | None = Field(default=None, ge=1, le=256)
    """The divergence of each next token is over so many of the teacher's most probable ones, and all others
    as one; null: estimated from the sampled token."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the divergence: always the reward of each token."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of the divergence: always k1, whose policy gradient is that of the divergence."""

    @property
    def compared_with(self) -> str | None:
        return self.teacher

    def loss_problems(self) -> Iterator[tuple[str, str]]:
        yield from super().loss_problems()
        if self.teacher_top_k is not None:
            yield from self._top_k_problems()
        elif self.beta == 0:
            yield "beta", "0 leaves nothing of the teacher; write 1, or more beside other rewards"
        if self.kl_in != "reward":
            yield "kl_in", "distill has the divergence in the reward of each token; leave it out"
        if self.kl_estimator != "k1":
            why = "as rewards of tokens the others have the gradient of something else; leave it out"
            yield "kl_estimator", f"{self.kl_estimator}: {why}"

    def _top_k_problems(self) -> Iterator[tuple[str, str]]:
        """Settings of a policy gradient, which there is none of."""
        if self.beta > 1:
            yield "beta", f"{self.beta:g}: with teacher_top_k it is 0 (forward) to 1 (reverse)"
        kinds = (PolicySettings, CorrectionSettings, DiscountSettings, WhitenSettings)
        names = [name for kind in kinds for name in kind.model_fields if name not in ("beta", "kl_estimator")]
        names += ["rewards", "kl_target", "vllm_importance_sampling_correction"]
        why = "with teacher_top_k the loss is the divergence itself, without advantages; leave it out"
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                yield name, why

    @property
    def top_k_asked(self) -> int | None:
        return self.teacher_top_k

    @property
    def compares_samples(self) -> bool:
        return False


class OnlineDpoStage(DpoSettings, RlStage):
    """Direct preference optimization on the policy's own samples: the best of a prompt against its worst.

    A prompt whose samples all have the same reward gives no pair.
    """

    learns_from: ClassVar[Literal["pairs"]] = "pairs"

    type: Literal["online_dpo"] = "online_dpo"
    """Kind of stage; may be left out where the stage's name says it."""
    num_generations: int = Field(default=4, ge=1)
    """Samples per prompt; of these the best and the worst are a pair."""
