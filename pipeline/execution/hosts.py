"""Model workers of a run: which base and which artifacts' adapters each group of ranks holds by now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.cluster import GroupFuture
from actors.trainer.remote import ModelWorkers
from actors.trainer.spec import HostSpec
from pipeline.artifacts.weights import Weights
from pipeline.stages.views import View

if TYPE_CHECKING:
    from actors.cluster import RoleSpec
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.nodes import Node


def adapter_name(model: str) -> str:
    """Name of a stage's adapter inside the model workers, or of the one that `model.base` itself names.

    torch's module names have no dots.
    """
    return "initial_adapter" if model == "base" else model.replace(".", "_")


def critic_name(stage: str) -> str:
    """Name of a PPO stage's critic inside the model workers; no stage can be named like it."""
    return f"{adapter_name(stage)}:critic"


class Host:
    """A group of ranks with one base, and which artifacts' adapters it holds by now."""

    def __init__(
        self, workers: ModelWorkers, spec: HostSpec, weights: Weights, building: GroupFuture[float]
    ) -> None:
        self.workers, self.spec, self.base = workers, spec, weights.base
        self._building: GroupFuture[float] | None = building
        self.holds = weights.fingerprint
        """Fingerprint of the weights that the base's own parameters are (full fine-tuning moves them)."""
        self.adapters: dict[str, str] = {}

    def ready(self) -> float:
        """Wait until the base is loaded; returns the slowest rank's seconds, 0 if it was there already."""
        building, self._building = self._building, None
        return max(building.result()) if building else 0.0

    def view(self, weights: Weights, name: str) -> View:
        """The given weights as adapter `name` of these ranks; loads it if needed."""
        if weights.adapter is None:
            return View(self.workers, None)
        if self.adapters.get(name) != weights.fingerprint:
            self.workers.add_adapter(name, weights.adapter, trainable=False)
            self.adapters[name] = weights.fingerprint
        return View(self.workers, name)


def fits(host: Host, spec: HostSpec, weights: Weights) -> bool:
    """The same base and settings; or, without adapters, a base that was just trained to these weights."""
    trained_to_it = weights.adapter is None and host.holds == weights.fingerprint
    model = host.spec.model.model_copy(
        update={"base": spec.model.base, "random_init": spec.model.random_init}
    )
    same_settings = spec == host.spec.model_copy(update={"model": model})
    return same_settings and (trained_to_it or host.spec.model == spec.model)


def host_spec(config: RunConfig, node: Node, weights: Weights, role: RoleSpec) -> HostSpec:
    """Settings of the model workers that run `weights` for a stage on the ranks of `role`."""
    fresh = config.model.random_init and node.init == "base"
    model = config.model.model_copy(update={"base": weights.base, "random_init": fresh})
    return HostSpec(
        model=model,
        seed=config.seed,
        sharding=role.sharding,
        expert_parallel_size=role.expert_parallel_size,
        tensor_parallel_size=role.tensor_parallel_size,
        sequence_parallel_size=role.sequence_parallel_size,
    )
