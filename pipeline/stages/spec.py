"""What a stage can be told: data, length, optimizer, loss. Field names of TRL where it has one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from actors.optim_spec import OptimSpec
from actors.rewards import RewardSpec
from actors.sampling import SamplingSpec
from actors.sync.spec import SyncSpec
from pipeline.data.spec import DataSources, as_sources

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
Rewards = Annotated[
    list[RewardSpec],
    Field(min_length=1),
    BeforeValidator(as_sources, json_schema_input_type=str | RewardSpec | list[str | RewardSpec]),
]
"""Type of a stage's `rewards:`: a source, one `RewardSpec`, or a list of them."""
Whitening = Literal["none", "shift_and_scale", "scale"]
KlEstimator = Literal["k1", "k2", "k3"]
RatioLevel = Literal["token", "sequence", "trajectory"]
PolicyNorm = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


class StageSpec(OptimSpec):
    """What every training stage has in common."""

    hands_on_policy: ClassVar[bool] = True
    """Whether later stages start from its result by default. A reward model is no policy."""

    init: str | None = None
    """Where the weights start: `base` or the name of an earlier stage. Null: the last policy, or base."""
    data: DataSources
    """Training data: one source or a mixture."""
    eval_data: DataSources | None = None
    """Held-out data for the stage's own loss; null: none."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on `eval_data` every so many steps; null: at the end only."""
    batch_size: int = Field(default=32, ge=1)
    """Rows, pairs or samples per optimizer step, over all ranks."""
    num_train_epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Passes over the data; `max_steps` overrides it."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps (online: rounds of sampling and updates); -1: as many as `num_train_epochs` gives."""
    shuffle: bool = True
    """Draw rows in an order made from the seed; false: in the order of the data."""
    max_length: int | None = Field(default=1024, ge=2)
    """Longest sequence in tokens, prompt and answer together; null: the model's own limit."""
    truncation_mode: Literal["keep_start", "keep_end", "error"] = "keep_start"
    """What happens to longer rows: cut at the end, cut at the start, or refused."""
    packing: Literal["auto"] | bool = "auto"
    """Several sequences in one bin; auto: where the architecture keeps packed sequences apart."""
    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Tokens of one forward and backward pass per rank; bounds memory, doesn't change the result."""
    save_steps: int = Field(default=50, ge=1)
    """A checkpoint every so many steps; a killed run goes on from the last one."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept; an older one is removed after its successor is complete on disk."""
    keep_warm: bool = True
    """Keep the policy's actors for the next stage that can use them."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of order, initialisation and dropout; null: the run's."""

    def optim_spec(self) -> OptimSpec:
        """The optimizer's share of this stage."""
        return OptimSpec(**{name: getattr(self, name) for name in OptimSpec.model_fields})


class SftStage(StageSpec):
    """Supervised fine-tuning: token-mean negative log-likelihood."""

    type: Literal["sft"] = "sft"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""
    train_on: Literal["answer", "all"] = "answer"
    """Tokens that count in the loss: the assistant's (end-of-turn token included), or all."""


class DpoStage(StageSpec):
    """Direct preference optimization and its relatives, on pairs of answers."""

    type: Literal["dpo"] = "dpo"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Peak learning rate; LoRA usually wants about ten times the default."""
    reference: str | None = None
    """Reference policy: `base` or an earlier stage. Null: the weights that this stage starts from."""
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


class RewardStage(StageSpec):
    """A reward model: a scalar head on an adapter of its own, from pairs of answers (Bradley-Terry)."""

    hands_on_policy: ClassVar[bool] = False

    type: Literal["reward"] = "reward"
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    center_rewards_coefficient: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Weight of (reward of chosen + reward of rejected)^2, which keeps rewards around 0; null: none."""


class RlStage(StageSpec):
    """What the online stages have in common: sample, reward, update, sync, again.

    One step (of `max_steps`, `save_steps`, `logging_steps`) is one round of this. It draws
    `batch_size * steps_per_generation` samples, `num_generations` of each prompt, and takes
    `steps_per_generation * num_iterations` optimizer steps with them.
    """

    advantage: ClassVar[Literal["gae", "group", "rloo"]]
    """Name in `actors.algorithms.advantages.ADVANTAGES`."""

    type: str
    """Kind of stage; may be left out where the stage's name says it."""
    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    rewards: Rewards
    """What is wanted: `exact_match`, `module:function`, a reward stage's name or a reward model's directory.
    One or several, added up by their weights."""
    num_generations: int = Field(default=8, ge=1)
    """Samples per prompt."""
    max_completion_length: int = Field(default=256, ge=1)
    """New tokens per sample, at most; `max_length` less this is what a prompt may take."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the logits while sampling, and in the trainer's log-probabilities."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a sample, beside the model's own end-of-turn token."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Batches of `batch_size` samples that one generation is cut into, an optimizer step each."""
    num_iterations: int = Field(default=1, ge=1)
    """Times that the samples of one generation are gone through."""
    reference: str | None = None
    """Reference policy: `base` or an earlier stage. Null: the weights that this stage starts from."""
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the divergence goes: subtracted from the reward, or added to the loss."""
    kl_estimator: KlEstimator = "k3"
    """How it is estimated from the sampled tokens."""
    use_bias_correction_kl: bool = True
    """In a loss: multiply the estimate by the ratio, so that its gradient is the divergence's own. Without
    it k1 has a gradient of mean zero there and is refused."""
    kl_target: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Divergence per sample, in nats, that `beta` is steered to; null: `beta` stays."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Samples over which `beta` follows `kl_target`; smaller is faster."""
    epsilon: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    """The ratio to the sampling policy is clipped at 1 - epsilon ..."""
    epsilon_high: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """... and at 1 + epsilon_high; null: `epsilon`."""
    delta: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """Bound of the ratio where the advantage is negative (dual clip); null: none."""
    importance_sampling_level: RatioLevel = "token"
    """What a ratio to the sampling policy is taken over: each `token`, the `sequence` (the mean of its
    log-ratios: GSPO), or the `trajectory` (their sum)."""
    loss_type: PolicyNorm = "dapo"
    """How token losses are averaged, by TRL's names: `grpo` over each sample and then over samples, `bnpo`
    over the tokens of an optimizer step, `dapo` the same by the generation's mean count, `dr_grpo` by
    samples x max_completion_length."""
    entropy_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the entropy bonus."""
    whiten_advantages: Whitening = "none"
    """Normalise advantages over the samples of a generation: `shift_and_scale` to mean 0 and standard
    deviation 1 (unbiased), `scale` keeps the mean."""
    mask_truncated_completions: bool = False
    """Leave samples that hit `max_completion_length` out of the loss."""
    missing_eos_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Taken off the reward of a sample that did not end by itself."""
    mismatch_tolerance: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest k3 divergence per token between engine and trainer before the run stops; null: by dtype."""
    sync: SyncSpec = Field(default_factory=SyncSpec)
    """How new weights reach the rollout engines, and how that is proved."""

    @property
    def samples_per_step(self) -> int:
        """Samples of one generation."""
        return self.batch_size * self.steps_per_generation

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one generation."""
        return self.samples_per_step // self.num_generations

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps between two syncs."""
        return self.steps_per_generation * self.num_iterations

    def sampling(self) -> SamplingSpec:
        """What the engines are asked for: no filter that the trainer's log-probabilities don't know of."""
        return SamplingSpec(
            temperature=self.temperature,
            max_tokens=self.max_completion_length,
            stop=self.stop,
            n=self.num_generations,
        )


class PpoStage(RlStage):
    """Proximal policy optimization with a critic and generalized advantage estimation."""

    advantage: ClassVar[Literal["gae"]] = "gae"

    type: Literal["ppo"] = "ppo"
    """Kind of stage; may be left out where the stage's name says it."""
    num_generations: int = Field(default=1, ge=1)
    """Samples per prompt."""
    num_iterations: int = Field(default=4, ge=1)
    """Times that the samples of one generation are gone through (PPO's epochs)."""
    beta: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the divergence goes: subtracted from the reward, token by token, or added to the loss."""
    kl_estimator: KlEstimator = "k1"
    """How it is estimated from the sampled tokens."""
    whiten_advantages: Whitening = "shift_and_scale"
    """Normalise advantages over the tokens of a generation: `shift_and_scale` to mean 0 and standard
    deviation 1 (unbiased), `scale` keeps the mean."""
    whiten_rewards: Whitening = "none"
    """Normalise the rewards per token, divergence included, before advantages are taken."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    vf_coef: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Weight of the value loss."""
    cliprange_value: float | None = Field(default=0.2, gt=0, allow_inf_nan=False)
    """New values are clipped to this distance from the old ones; null: not clipped."""
    critic_init: str | None = None
    """Where the critic starts: null: the weights that the policy starts from, with a head of zeros; or a
    reward stage, with its head."""
    critic_learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Peak learning rate of the critic; null: the policy's."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start in which only the critic learns."""

    def critic_optim_spec(self) -> OptimSpec:
        """The critic's optimizer: the policy's settings with its own learning rate."""
        rate = self.critic_learning_rate or self.learning_rate
        return self.optim_spec().model_copy(update={"learning_rate": rate})


class GrpoStage(RlStage):
    """Group relative policy optimization: a sample's advantage is its distance from its prompt's mean."""

    advantage: ClassVar[Literal["group"]] = "group"

    type: Literal["grpo"] = "grpo"
    """Kind of stage; may be left out where the stage's name says it."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the prompt's samples, of the whole generation, or by nothing."""


class RlooStage(RlStage):
    """REINFORCE, with the mean of a prompt's other samples as baseline."""

    advantage: ClassVar[Literal["rloo"]] = "rloo"

    type: Literal["rloo"] = "rloo"
    """Kind of stage; may be left out where the stage's name says it."""
    importance_sampling_level: RatioLevel = "trajectory"
    """What a ratio to the sampling policy is taken over: each `token`, the `sequence` (the mean of its
    log-ratios), or the `trajectory` (their sum), as in TRL's trainer."""
    loss_type: PolicyNorm = "grpo"
    """How token losses are averaged, by TRL's names; `grpo`: over each sample and then over samples."""
    num_generations: int = Field(default=2, ge=1)
    """Samples per prompt."""
    beta: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the divergence goes: subtracted from the reward, or added to the loss."""
    kl_estimator: KlEstimator = "k1"
    """How it is estimated from the sampled tokens."""


Stage = Annotated[
    SftStage | DpoStage | RewardStage | PpoStage | GrpoStage | RlooStage, Field(discriminator="type")
]
STAGE_TYPES: dict[str, type[StageSpec]] = {
    "sft": SftStage,
    "reward": RewardStage,
    "dpo": DpoStage,
    "ppo": PpoStage,
    "grpo": GrpoStage,
    "rloo": RlooStage,
}
