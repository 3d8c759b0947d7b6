"""Which metrics share a chart, under which title, and which charts come first. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.report.view import Series

Unit = Literal["number", "percent", "scientific", "count"]


@dataclass(frozen=True)
class Panel:
    """One chart: metrics that share an axis. A metric's `eval_` twin joins it."""

    title: str
    keys: tuple[str, ...]
    unit: Unit = "number"
    names: tuple[str, ...] = ()
    """What each key is called in the chart; without names, the part after its slash."""
    first: bool = False
    """Among the charts that answer "did it learn?"; the others are mechanics."""


PANELS = (
    Panel("Loss", ("loss",), first=True),
    Panel("Reward", ("reward",), first=True),
    Panel("Reward accuracy", ("rewards/accuracies",), "percent", first=True),
    Panel("Reward margin", ("rewards/margins",), first=True),
    Panel("Implicit rewards", ("rewards/chosen", "rewards/rejected"), first=True),
    Panel("Token accuracy", ("mean_token_accuracy",), "percent", first=True),
    Panel("KL to the reference", ("kl",), first=True),
    Panel("Entropy of the policy", ("entropy",)),
    Panel("Log-probability of answers", ("logps/chosen", "logps/rejected")),
    Panel("Mean logits", ("logits/chosen", "logits/rejected")),
    Panel("Learning rate", ("learning_rate",), "scientific"),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Tokens per second", ("tokens_per_second",), "count"),
    Panel("Expert imbalance (MaxVio)", ("moe/maxvio", "moe/maxvio_worst"), names=("mean", "worst layer")),
    Panel("Dead experts", ("moe/dead_experts",), "count"),
    Panel("Routing entropy", ("moe/entropy",)),
    Panel("Auxiliary loss", ("aux_loss",)),
)

CLOCKS = frozenset({"epoch", "num_tokens", "seconds", "time", "wall_time", "timestamp"})
"""Counters that only ever go up: an axis, not a finding."""


@dataclass
class Chart:
    """A panel with the curves that a stage has for it: label -> series, in drawing order."""

    panel: Panel
    curves: dict[str, Series] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """File name part made of the title."""
        kept = "".join(letter if letter.isalnum() else " " for letter in self.panel.title.lower())
        return "-".join(kept.split())


def charts(series: dict[str, Series]) -> tuple[list[Chart], dict[str, float]]:
    """Group a stage's metrics into charts; metrics that never changed are returned as single values.

    Metrics that no panel knows (those of a later kind of stage) get a chart each, named after their key.
    """
    left = {key: curve for key, curve in series.items() if key not in CLOCKS}
    constants = {
        key: curve.values[0] for key, curve in left.items() if curve.constant and len(curve.values) > 1
    }
    for key in constants:
        del left[key]
    found = []
    for panel in PANELS:
        curves = {
            _label(key, panel): left.pop(key)
            for name in panel.keys
            for key in (name, f"eval_{name}")
            if key in left
        }
        if curves:
            found.append(Chart(panel, curves))
    for key in sorted(left, key=lambda key: key.removeprefix("eval_")):
        if key.startswith("eval_") and key.removeprefix("eval_") in left:
            continue
        panel = Panel(key, (key.removeprefix("eval_"),))
        names = dict.fromkeys((key, f"eval_{key}"))
        found.append(Chart(panel, {_label(name, panel): left[name] for name in names if name in left}))
    return sorted(found, key=lambda chart: not chart.panel.first), constants


def _label(key: str, panel: Panel) -> str:
    held_out = key.startswith("eval_")
    name = key.removeprefix("eval_")
    if panel.names:
        own = panel.names[panel.keys.index(name)]
    else:
        own = name.rsplit("/", 1)[-1] if len(panel.keys) > 1 else ""
    return " ".join(part for part in (own, "held out" if held_out else "") if part) or "training"


def format_value(value: float, unit: Unit = "number") -> str:
    """A figure short enough for a label: 0.412, 1,234, 2.0e-04, 83.1 %."""
    if unit == "percent":
        return f"{value:.1%}".replace("%", " %")
    if value == 0:
        return "0"
    if unit == "scientific" or abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.1e}"
    if unit == "count" or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
