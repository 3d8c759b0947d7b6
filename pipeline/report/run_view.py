"""Data of a run for the report, as plain values; `pipeline.report.read_run` fills them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report.routing import RoutingView
from pipeline.report.series import Series
from pipeline.report.timeline import Call

BASE = "base"
"""Name of the model that every first stage starts from, in `eval` and in the stage graph."""

REWARD = "reward"
"""Type of the stages that hand on a reward model: no policy starts from one unless it says so."""

PAIR_ACCURACY = "pair_accuracy"
"""Metric of reward models: the share of held-out pairs of which the chosen answer scores higher."""


@dataclass
class StageView:
    """One stage: its settings, state, metrics and files."""

    name: str
    type: str
    state: str
    """done, skipped, running, failed, stopped, or pending (in the config, not reached)."""
    init: str = BASE
    reads: dict[str, str] = field(default_factory=dict)
    """Other stages that it reads -> what it uses each as: reference, reward model."""
    seconds: float | None = None
    """Of training, over all sessions."""
    wait: float | None = None
    """Seconds before its first steps, for processes and weights."""
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    router_load: list[list[float]] = field(default_factory=list)
    """[layer][expert]: tokens as a multiple of an expert's fair share, so 1 is balanced."""
    routing: RoutingView = field(default_factory=RoutingView)
    samples: list[dict[str, Any]] = field(default_factory=list)
    artifact: str = ""
    """Kind of artifact passed on (adapter, model ...), empty when there is none yet."""
    artifact_bytes: int = 0
    total_steps: int | None = None
    """Steps that it has, finished or not; None: unknown."""

    @property
    def steps_done(self) -> int:
        """Last step of which metrics were logged."""
        return max((series.steps[-1] for series in self.series.values()), default=0)


@dataclass
class EvalRow:
    """One evaluated model: `value` is the mean of `metric` over `n` prompts (pairs, for a reward model),
    `ci95` its interval."""

    model: str
    metric: str
    value: float
    n: int | None = None
    ci95: tuple[float, float] | None = None
    seconds: float | None = None

    @property
    def of_pairs(self) -> bool:
        """True for a reward model, scored on pairs, instead of a policy on prompts."""
        return self.metric == PAIR_ACCURACY


@dataclass
class RunView:
    """Everything that the report shows."""

    name: str
    directory: Path
    state: str
    stages: list[StageView]
    evals: list[EvalRow]
    completions: dict[str, list[dict[str, Any]]]
    """Per evaluated model, the rows {prompt, completion, answer, score} of eval/MODEL.jsonl."""
    calls: list[Call]
    """Calls of the actors in the last execution, from logs/trace."""
    base: str
    config_text: str
    config: dict[str, Any]
    """The same, read; empty where there is none or it can't be read."""
    versions: dict[str, str]
    startup: dict[str, float]
    """Seconds by cause; causes may overlap."""
    first_step: float | None
    """Seconds from the run's start to its first training step."""
    seconds: float | None
    error: str
    began: str
    """Local date and time, empty when unknown."""
    notes: list[str]
    replacements: list[dict[str, Any]]
    """Processes that were replaced, as in replacements.jsonl, in all sessions."""
    as_of: float
    """Seconds since the epoch at which the figures were the latest that there were."""
