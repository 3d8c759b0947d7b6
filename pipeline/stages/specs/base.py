"""Settings of every training stage: data, length, optimizer. Field names of TRL where it has one.

What the rest of the pipeline has to know of a kind of stage, its spec says: properties and class variables
here, overridden by the kinds that differ. Nobody asks for the class of a spec.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from actors.spec import Spec
from actors.trainer.spec import OptimSpec
from pipeline.data.reading.layouts import Kind
from pipeline.data.spec import DataSources
from pipeline.stages.specs.critic import CriticSettings


class ReferenceSettings(Spec):
    """The reference policy of stages that have one."""

    reference: str | None = None
    """Reference policy: `base` or an earlier stage. Null: the weights that this stage starts from."""

    @property
    def compared_with(self) -> str | None:
        """`base` or the stage that this one is compared with; None: the weights that it starts from."""
        return self.reference


class StageSpec(OptimSpec):
    """Settings and facts that every training stage has."""

    online: ClassVar[bool]
    """It samples from the engines; else its answers are in the data."""
    records: ClassVar[Kind]
    """Records that its data are read as."""
    has_reference: ClassVar[bool] = False
    """It compares with a reference policy, which its `reference` names."""
    makes: ClassVar[Literal["policy", "reward_model"]] = "policy"
    """Its result: later stages start from a policy, and score with a reward model."""

    type: str
    """Kind of stage; may be left out where the stage's name says it."""
    init: str | None = None
    """Start of the weights: `base` or the name of an earlier stage. Null: the last policy, or base."""
    data: DataSources
    """Training data: one source or a mixture."""
    eval_data: DataSources | None = None
    """Held-out data for the stage's own loss; null: none."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on `eval_data` every so many steps; null: at the end only."""
    batch_size: int = Field(default=32, ge=1)
    """Rows, pairs or samples per optimizer step, over all ranks."""
    num_train_epochs: float = Field(default=3.0, gt=0, le=1e6, allow_inf_nan=False)
    """Passes over the data; `max_steps` overrides it."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps (online: rounds of sampling and updates); -1: as many as `num_train_epochs` gives."""
    shuffle: bool = True
    """Take rows in an order made from the seed; false: in the order of the data."""
    max_length: int | None = Field(default=1024, ge=2)
    """Longest sequence in tokens, prompt and answer together; null: the model's own limit."""
    truncation_mode: Literal["keep_start", "keep_end", "error"] = "keep_start"
    """Treatment of longer rows: cut at the end, cut at the start, or refused."""
    packing: Literal["auto"] | bool = "auto"
    """Several sequences in one bin; auto: where the architecture keeps packed sequences apart."""
    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Tokens of one forward and backward pass per rank; bounds memory, doesn't change the result."""
    save_steps: int = Field(default=50, ge=1)
    """A checkpoint every so many steps; a killed run goes on from the last one."""
    save_minutes: float | None = Field(default=30, gt=0, allow_inf_nan=False)
    """A checkpoint also after the first step that ends so many minutes after the last one. Null: never so."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept; an older one is removed after its successor is complete on disk."""
    keep_warm: bool = True
    """Keep the policy's actors for the next stage that can use them."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of order, initialisation and dropout; null: the run's."""

    @property
    def hands_on_policy(self) -> bool:
        """Later stages start from its result by default. A reward model is no policy."""
        return self.makes == "policy"

    @property
    def tokens_trained(self) -> Literal["answer", "all"]:
        """Tokens of its rows that count in the loss."""
        return "answer"

    @property
    def critic(self) -> CriticSettings | None:
        """Settings of the critic that it trains beside the policy; None: it has none."""
        return None

    @property
    def reward_models(self) -> list[str]:
        """Sources of the reward models that it asks: names of stages, or directories."""
        return []

    @property
    def judge_models(self) -> list[str]:
        """Models that the run's own engines judge its samples with: hub ids or directories."""
        return []

    @property
    def rows_per_step(self) -> int:
        """Rows, pairs or samples of one step."""
        return self.batch_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one step."""
        return 1

    def loss_problems(self) -> Iterable[tuple[str, str]]:
        """Settings of its loss that don't go together: (key, what is wrong with it)."""
        return ()

    def optim_spec(self) -> OptimSpec:
        """The optimizer's share of this stage."""
        return OptimSpec.from_settings(self)
