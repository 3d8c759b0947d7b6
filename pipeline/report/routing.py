"""Router statistics that an online stage wrote, as tables for the report's heatmaps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.report.series import fair_share
from pipeline.report.tolerant_reading import as_number


@dataclass
class RoutingView:
    """Router statistics of one stage; empty where it wrote none."""

    engine_load: list[list[float]] = field(default_factory=list)
    """[layer][expert] in fair shares: the engines' last samples."""
    steps: list[int] = field(default_factory=list)
    """Ascending, of `busiest`."""
    busiest: list[list[float]] = field(default_factory=list)
    """[layer][step]: load of the trainer's busiest expert, in fair shares."""
    agreement_steps: list[int] = field(default_factory=list)
    agreement: list[list[float]] = field(default_factory=list)
    """[layer][step]: share of the engines' choices that the trainer's routers would have made too."""

    def __bool__(self) -> bool:
        return bool(self.engine_load or self.busiest or self.agreement)


def to_routing(rows: Sequence[dict[str, Any]], engine_load: Any) -> RoutingView:
    """Tables from the lines of routing.jsonl and the loads of engine_load.json."""
    steps, busiest = _by_layer(rows, "trainer")
    agreement_steps, agreement = _by_layer(rows, "agreement")
    return RoutingView(fair_share(engine_load), steps, busiest, agreement_steps, agreement)


def _by_layer(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[list[float]]]:
    """(steps, [layer][step]); a step logged again after a resume counts once, as last seen."""
    found: dict[int, list[float]] = {}
    for row in rows:
        step, values = as_number(row.get("step")), row.get(key)
        if step is not None and isinstance(values, list) and values:
            found[int(step)] = [as_number(value) or 0.0 for value in values]
    steps = sorted(found)
    # Lines of another model's run in the same directory would have other layers.
    layers = len(found[steps[-1]]) if steps else 0
    steps = [step for step in steps if len(found[step]) == layers]
    return steps, [[found[step][layer] for step in steps] for layer in range(layers)]
