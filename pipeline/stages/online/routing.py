"""Routing of one online step, in the engines and in the trainer: metrics, and rows for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.algorithms import checks as rl_checks


@dataclass(frozen=True)
class Routing:
    """Of one step; each None where it is not known."""

    trainer: np.ndarray | None = None
    """int64 (layers, experts): tokens per expert in the policy's last optimizer step."""
    engines: np.ndarray | None = None
    """int64 (layers, experts): tokens per expert in the engines while they sampled."""
    agreement: np.ndarray | None = None
    """float64 (layers,): share of the engines' choices that the trainer's routers would have made too."""

    def metrics(self) -> dict[str, float]:
        """`moe/engine_load_distance`; of router replay `moe/route_agreement` (mean over layers) and
        `moe/route_agreement_worst` (the layer with the least).

        The distance is not 0 when all is well: the trainer counts its last optimizer step, and a prompt with
        each of its samples; engines count each prompt once, and all that they score and generate between two
        calls.
        """
        found = {}
        if self.trainer is not None and self.engines is not None:
            found["moe/engine_load_distance"] = rl_checks.load_distance(self.trainer, self.engines)
        if self.agreement is not None:
            found["moe/route_agreement"] = float(self.agreement.mean())
            found["moe/route_agreement_worst"] = float(self.agreement.min())
        return found

    def row(self, step: int) -> dict[str, Any] | None:
        """A line of routing.jsonl: by layer, the busiest expert's load in fair shares (`trainer`, `engines`),
        and `agreement`; None: nothing is known."""
        busiest = {"trainer": _busiest(self.trainer), "engines": _busiest(self.engines)}
        known: dict[str, Any] = {name: values for name, values in busiest.items() if values is not None}
        if self.agreement is not None:
            known["agreement"] = [round(float(x), 5) for x in self.agreement]
        return {"step": step, **known} if known else None


def _busiest(load: np.ndarray | None) -> list[float] | None:
    if load is None or not load.size:
        return None
    values: list[float] = np.round(load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9), 3).tolist()
    return values
