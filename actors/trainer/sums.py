"""Loss and metrics of a pass as sums, and their means over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.algorithms.loss import MetricSums
from actors.models.moe.router_stats import RouterLoad, RouterStats
from actors.trainer.process_groups import Ranks


@dataclass
class Sums:
    """Sums over this rank's tokens and rows; `reduced` makes means over all ranks of them."""

    loss: Tensor
    routers: RouterStats | None = None
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extremes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Largest values so far, times the sign of their weight."""
    router_load: RouterLoad | None = None
    """Of all ranks, once `reduced`."""

    def add(self, loss: Tensor, metrics: MetricSums) -> None:
        """Add a share of the global loss and the metric sums of some rows."""
        self.loss = self.loss + loss.detach()
        for name, pair in metrics.items():
            total, weight = (torch.as_tensor(x, dtype=torch.float64, device=loss.device) for x in pair)
            if torch.isinf(weight):
                # The smallest value is the largest of negated ones.
                total = total * weight.sign()
                old = self.extremes.get(name, (total, weight))
                self.extremes[name] = (torch.maximum(old[0], total), weight)
                continue
            old = self.metrics.get(name, (torch.zeros_like(total), torch.zeros_like(weight)))
            self.metrics[name] = (old[0] + total, old[1] + weight)

    def reduced(self, ranks: Ranks) -> dict[str, float]:
        """Means and extremes over the global batch, after one all-reduce (two with extremes)."""
        names = list(self.metrics)
        numbers = torch.stack([self.loss.double(), *(x for name in names for x in self.metrics[name])])
        routing = numbers[:0]
        if self.routers is not None:
            routing = ranks.sum_positions_(self.routers.totals().to(numbers.device))
        flat = ranks.sum_(torch.cat([numbers, routing]))
        if self.routers is not None:
            self.router_load = self.routers.read(flat[len(numbers) :])
        loss, *values = flat[: len(numbers)].tolist()
        means = {
            name: total / weight if weight else total
            for name, total, weight in zip(names, values[0::2], values[1::2], strict=True)
        }
        return {"loss": loss, **means, **self._reduced_extremes(ranks)}

    def _reduced_extremes(self, ranks: Ranks) -> dict[str, float]:
        if not self.extremes:
            return {}
        largest = ranks.max_(torch.stack([value for value, _ in self.extremes.values()]))
        signs = torch.stack([weight.sign() for _, weight in self.extremes.values()])
        return dict(zip(self.extremes, (largest * signs).tolist(), strict=True))
