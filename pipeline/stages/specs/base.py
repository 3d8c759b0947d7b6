"""What every training stage can be told: data, length, optimizer. Field names of TRL where it has one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from actors.trainer.spec import OptimSpec
from pipeline.data.spec import DataSources


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
