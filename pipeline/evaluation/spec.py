"""Settings of an evaluation on held-out rows."""

from __future__ import annotations

from pydantic import Field

from actors.batches import SamplingSpec
from actors.spec import Spec
from pipeline.data.spec import DataSources

REWARD = "reward"
"""Metric: the sum of what an environment gave a conversation."""
AUTO = "auto"


class EvalSamplingSpec(SamplingSpec):
    """Sampling for evaluation: greedy unless told otherwise."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 is greedy."""


class EvalSpec(Spec):
    """Generation on held-out prompts after the stages, scored, with 95 % intervals."""

    data: DataSources
    """Held-out prompts with their answers."""
    models: list[str] | None = Field(default=None, min_length=1)
    """`base` and names of stages; null: base and every stage but reward models."""
    max_rows: int = Field(default=500, ge=1)
    """Prompts per model."""
    sampling: EvalSamplingSpec = Field(default_factory=EvalSamplingSpec)
    """Settings of sampling; by default greedy."""
    metric: str = "exact_match"
    """`exact_match`, or `module:function`, called as a reward function is: a score, or None, for each
    completion. Of conversations also `reward`: what their environment gave."""
    env_of: str | None = AUTO
    """Stage whose environment or tools all models converse with; `auto`: the last one that has some; null: an
    answer is one turn."""
    timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds that the metric may take for one call with all completions of a model."""
