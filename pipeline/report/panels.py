"""Groups metrics into charts: which share one, under which title, in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from pipeline.report.series import Series

Unit = Literal["number", "percent", "scientific", "count"]


@dataclass(frozen=True)
class Panel:
    """One chart: metrics that share an axis. A metric's held-out counterpart (`eval_...`) joins it."""

    title: str
    keys: tuple[str, ...]
    """Names of metrics; `*` stands for any name (of a reward function)."""
    unit: Unit = "number"
    names: tuple[str, ...] = ()
    """Label of each key in the chart; without names, the part of the key that differs."""
    first: bool | Literal["online", "offline"] = False
    """Among the charts that answer "did it learn?", perhaps only in stages that generate, or only in the
    others; the rest are mechanics."""
    total: str = ""
    """Draws the keys as parts stacked on each other, under a line of this metric: their sum and more."""


HELD_OUT = "held out"
"""End of the label of a curve of held-out rows."""

PANELS = (
    Panel("Reward", ("reward",), first=True),
    Panel("Rewards by source", ("rewards/*/mean",), first=True),
    Panel("Loss", ("loss",), first="offline"),
    Panel("Pair accuracy", ("accuracy",), "percent", first=True),
    Panel("Margin of a pair", ("margin",), first=True),
    Panel(
        "Rewards",
        ("mean_reward", "min_reward", "max_reward"),
        names=("mean", "lowest", "highest"),
        first=True,
    ),
    Panel("Reward accuracy", ("rewards/accuracies",), "percent", first=True),
    Panel("Reward margin", ("rewards/margins",), first=True),
    Panel("Implicit rewards", ("rewards/chosen", "rewards/rejected"), first=True),
    Panel("Token accuracy", ("mean_token_accuracy",), "percent", first=True),
    Panel("KL to the reference", ("kl",), first=True),
    Panel(
        "Response length",
        ("completions/mean_length", "completions/min_length", "completions/max_length"),
        names=("mean", "shortest", "longest"),
        first=True,
    ),
    Panel("Entropy of the policy", ("entropy",), first="online"),
    Panel(
        "Clipped tokens",
        ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"),
        "percent",
        names=("all", "low", "high", "weights of cispo"),
        first=True,
    ),
    Panel(
        "Engine against trainer",
        ("mismatch/k1", "mismatch/k3", "mismatch_unreplayed/k3"),
        "scientific",
        names=("k1", "k3", "k3 without replay"),
        first=True,
    ),
    Panel(
        "Engines' choices shared by the trainer",
        ("moe/route_agreement", "moe/route_agreement_worst"),
        "percent",
        names=("mean", "worst layer"),
        first=True,
    ),
    Panel(
        "Steps that tokens are old", ("staleness/mean", "staleness/max"), names=("mean", "oldest"), first=True
    ),
    Panel(
        "Importance ratio, trainer to engine",
        tuple(f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "min", "max")),
        names=("mean", "smallest", "largest"),
        first=True,
    ),
    Panel("Tokens that the correction masks", ("sampling/masked",), "percent", first=True),
    Panel(
        "Trainer's and sampler's log-probabilities",
        ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
        names=("mean difference", "largest"),
    ),
    Panel(
        "Seconds of a step",
        tuple(
            f"time/{part}"
            for part in ("generate", "rewards", "logprobs", "values", "update", "wait", "turn", "sync")
        ),
        total="time/step",
        first=True,
    ),
    Panel(
        "Seconds of a sync",
        ("sync/gather", "sync/pack", "sync/wire", "sync/load", "sync/verify"),
        total="sync/seconds",
        first=True,
    ),
    Panel(
        "Largest mismatch of a token",
        ("mismatch/max", "mismatch_unreplayed/max"),
        names=("", "without replay"),
    ),
    Panel(
        "Tokens off by more than 2x",
        ("mismatch/beyond_2x", "mismatch_unreplayed/beyond_2x"),
        "percent",
        names=("", "without replay"),
    ),
    Panel("Engine against trainer without replay, k1", ("mismatch_unreplayed/k1",), "scientific"),
    Panel("Spread of rewards", ("reward_std", "rewards/*/std"), names=("reward", "")),
    Panel(
        "Groups of equal rewards",
        ("frac_reward_zero_std", "dynamic_sampling/frac_zero_std_left"),
        "percent",
        names=("sampled", "left after sampling other prompts"),
    ),
    Panel("Prompts that gave a pair", ("frac_pairs",), "percent"),
    Panel("Cut-off responses", ("completions/clipped_ratio",), "percent"),
    Panel("Value loss", ("value_loss",)),
    Panel("Returns and values", ("critic/returns/mean", "critic/values/mean"), names=("returns", "values")),
    Panel("Clipped values", ("value_clip_ratio",), "percent"),
    Panel("Loss of the critic", ("critic/loss",)),
    Panel("Variance explained by the critic", ("explained_variance",)),
    Panel("Log-probability of answers", ("logps/chosen", "logps/rejected")),
    Panel("Mean logits", ("logits/chosen", "logits/rejected")),
    Panel("KL of a response", ("objective/kl",)),
    Panel("KL coefficient", ("beta",)),
    Panel("KL of the updates", ("approx_kl",)),
    Panel("Ratio of new to old policy", ("ratio/mean",)),
    Panel("Largest deviation of a ratio", ("ratio/max_deviation",)),
    Panel("Spread of advantages", ("advantages/std",)),
    Panel(
        "Learning rate", ("learning_rate", "critic/learning_rate"), "scientific", names=("policy", "critic")
    ),
    Panel("Gradient norm", ("grad_norm", "critic/grad_norm"), names=("policy", "critic")),
    Panel(
        "Tokens per second",
        ("tokens_per_second", "critic/tokens_per_second"),
        "count",
        names=("policy", "critic"),
    ),
    Panel(
        "Probes of a sync",
        ("sync/probe_p90", "sync/probe_max"),
        "scientific",
        names=("90 % of tokens", "largest"),
    ),
    Panel("Weights unchanged in bfloat16", ("sync/unchanged_bf16",), "percent"),
    Panel("Bytes of a sync", ("sync/bytes",), "count"),
    Panel(
        "Expert imbalance (MaxVio)",
        ("moe/maxvio", "moe/maxvio_worst", "moe/engine_maxvio", "moe/engine_maxvio_worst"),
        names=("mean", "worst layer", "engine", "engine's worst"),
    ),
    Panel(
        "Expert imbalance of the critic",
        ("critic/moe/maxvio", "critic/moe/maxvio_worst"),
        names=("mean", "worst layer"),
    ),
    Panel(
        "Dead experts",
        ("moe/dead_experts", "moe/engine_dead_experts", "critic/moe/dead_experts"),
        "count",
        names=("trainer", "engine", "critic"),
    ),
    Panel("Expert load, engine against trainer", ("moe/engine_load_distance",)),
    Panel(
        "Routing entropy",
        ("moe/entropy", "moe/engine_entropy", "critic/moe/entropy"),
        names=("trainer", "engine", "critic"),
    ),
    Panel("Auxiliary loss", ("aux_loss",)),
)

CLOCKS = frozenset({"epoch", "num_tokens", "sync/version", "seconds", "time", "wall_time", "timestamp"})
"""Counters that only ever go up: an axis, not a finding."""


@dataclass
class Chart:
    """A panel with the curves that a stage has for it: label -> series, in drawing order."""

    panel: Panel
    curves: dict[str, Series] = field(default_factory=dict)
    first: bool = False
    total: Series | None = None
    """Of a stacked chart, the line over its parts."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Label of each curve -> name of its metric."""
    colours_of: Sequence[str] = ()
    """Labels in the order in which they get colours, where that is not the order of the curves."""

    @property
    def slug(self) -> str:
        """File name part made of the title."""
        kept = "".join(letter if letter.isalnum() else " " for letter in self.panel.title.lower())
        return "-".join(kept.split())

    @property
    def stacked(self) -> bool:
        return bool(self.panel.total)


def charts(series: dict[str, Series]) -> tuple[list[Chart], dict[str, float]]:
    """Group a stage's metrics into charts; metrics that never changed are returned as single values.

    Metrics that no panel knows (those of a later kind of stage) get a chart each, named after their key.
    """
    left = {key: curve for key, curve in series.items() if key not in CLOCKS}
    several = max((len(curve.values) for curve in left.values()), default=0) > 1
    constants = {
        key: curve.values[0]
        for key, curve in left.items()
        if several and curve.constant and not _is_mark(key, left)
    }
    for key in constants:
        del left[key]
    _drop_twin_of_reward(left)
    online = "reward" in series
    found = [chart for panel in PANELS if (chart := _take(panel, left, online))]
    for key in sorted(left, key=lambda key: key.removeprefix("eval_")):
        if key in left and (chart := _take(Panel(key, (key.removeprefix("eval_"),)), left, online)):
            found.append(chart)
    return sorted(found, key=lambda chart: not chart.first), constants


def _take(panel: Panel, left: dict[str, Series], online: bool) -> Chart | None:
    """The chart of a panel, whose metrics leave `left`; None where the stage has none of them."""
    metrics = {
        _label(key, pattern, panel): key
        for pattern in panel.keys
        for name in _matches(pattern, left)
        for key in (name, f"eval_{name}")
        if key in left
    }
    if not metrics:
        return None
    curves = {label: left.pop(key) for label, key in metrics.items()}
    first = panel.first if isinstance(panel.first, bool) else (panel.first == "online") == online
    return Chart(panel, curves, first, left.pop(panel.total, None), metrics)


def _is_mark(key: str, left: dict[str, Series]) -> bool:
    """True for a single figure of held-out rows: a point next to the curve of its training counterpart."""
    twin = left.get(key.removeprefix("eval_"))
    return key.startswith("eval_") and len(left[key].values) == 1 and twin is not None and not twin.constant


def _matches(pattern: str, left: dict[str, Series]) -> list[str]:
    """Names of metrics, without `eval_`, that a panel's key stands for."""
    names = dict.fromkeys(key.removeprefix("eval_") for key in left)
    return [name for name in names if fnmatchcase(name, pattern)] if "*" in pattern else [pattern]


def _drop_twin_of_reward(left: dict[str, Series]) -> None:
    """Drop mean and spread of the only reward function of weight 1: they are those of the reward."""
    for total, pattern in (("reward", "rewards/*/mean"), ("reward_std", "rewards/*/std")):
        parts = _matches(pattern, left)
        if len(parts) == 1 and total in left and left.get(parts[0]) == left[total]:
            del left[parts[0]]


def _label(key: str, pattern: str, panel: Panel) -> str:
    held_out = key.startswith("eval_")
    name = key.removeprefix("eval_")
    own = panel.names[panel.keys.index(pattern)] if panel.names else ""
    if not own and "*" in pattern:
        before, after = pattern.split("*")
        own = name.removeprefix(before).removesuffix(after)
    elif not own:
        own = name.rsplit("/", 1)[-1] if len(panel.keys) > 1 else ""
    return " ".join(part for part in (own, HELD_OUT if held_out else "") if part) or "training"


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
