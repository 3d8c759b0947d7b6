"""Settings of a model worker. Free of torch, so that plans and configurations can use them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from actors.cluster.spec import Sharding
from actors.models.spec import ModelSpec
from actors.spec import Spec


class HostSpec(Spec):
    """A model and how one group of ranks runs it."""

    model: ModelSpec
    """The base, its LoRA and its mixture-of-experts settings."""
    packing: Literal["auto"] | bool = "auto"
    """Several sequences in one bin; auto: where the architecture keeps packed sequences apart."""
    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Positions, padding included, of one forward and backward pass per rank."""
    sharding: Sharding = "none"
    """Weights that the ranks of a group split among them (`RoleSpec.sharding`)."""
    expert_parallel_size: int | None = Field(default=None, ge=2)
    """Ranks that split weights among them (`RoleSpec.expert_parallel_size`)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that hold one model together (`RoleSpec.tensor_parallel_size`)."""
    sequence_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share out the positions of the same rows (`RoleSpec.sequence_parallel_size`)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of fresh weights and adapters, and of dropout."""
    device: str = "cpu"
    """torch device of this rank."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of one rank; null: as torch finds them (OMP_NUM_THREADS)."""


SchedulerType = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
"""transformers' schedules, without the two that need an evaluation metric (reduce_lr_on_plateau, greedy)."""


class OptimSpec(Spec):
    """Optimizer, schedule and clipping."""

    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    lr_scheduler_type: SchedulerType = "linear"
    """transformers' schedule, by name."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the schedule, e.g. `{min_lr_rate: 0.1}` for cosine_with_min_lr."""
    warmup_steps: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Steps of linear warm-up; a number below 1 is a share of all steps."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd"] = "adamw_torch_fused"
    """Optimizer, by transformers' name and with its default; fused steps in a third of the time."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay, on all trainable parameters but biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Adam's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Gradients are scaled down to this global norm; 0 switches clipping off."""

    @property
    def needs_length(self) -> str:
        """The setting by which a step's learning rate depends on the number of all steps; empty: none."""
        if self.lr_scheduler_type not in ("constant", "constant_with_warmup", "inverse_sqrt"):
            return f"lr_scheduler_type: {self.lr_scheduler_type}"
        if self.lr_scheduler_type != "constant" and 0 < self.warmup_steps < 1:
            return f"warmup_steps: {self.warmup_steps:g}, a share of all steps"
        return ""
