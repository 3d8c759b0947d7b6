"""What a stage can be told: data, length, optimizer, loss. Field names of TRL where it has one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from actors.optim_spec import OptimSpec
from pipeline.data.spec import DataSources

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


class StageSpec(OptimSpec):
    """What every training stage has in common."""

    init: str | None = None
    """Where the weights start: `base` or the name of an earlier stage. Null: the stage before, or base."""
    data: DataSources
    """Training data: one source or a mixture."""
    eval_data: DataSources | None = None
    """Held-out data for the stage's own loss; null: none."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on `eval_data` every so many steps; null: at the end only."""
    batch_size: int = Field(default=32, ge=1)
    """Rows (or pairs) per optimizer step, over all ranks."""
    num_train_epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Passes over the data; `max_steps` overrides it."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps; -1: as many as `num_train_epochs` gives."""
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


Stage = Annotated[SftStage | DpoStage, Field(discriminator="type")]
STAGE_TYPES: dict[str, type[StageSpec]] = {"sft": SftStage, "dpo": DpoStage}
