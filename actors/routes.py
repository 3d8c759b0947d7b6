"""Tokens per expert in a vLLM engine, counted where its routers decide; imported in vLLM's process."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class RouteCounter:
    """Counts the choices of every router of a model, layer by layer."""

    def __init__(self, model: nn.Module) -> None:
        """Listen to the routers of `model` that can be listened to, from now on."""
        self._counts: list[torch.Tensor] = []
        for router in _routers(model):
            counts = torch.zeros(router.global_num_experts, dtype=torch.int64)
            self._counts.append(counts)
            router.set_capture_fn(lambda ids, counts=counts: _count(ids, counts))

    def take(self) -> np.ndarray | None:
        """int64 (layers, experts): tokens that each expert got since the last call; None without routers.

        Prompts count as often as they were computed: once where samples share one in the prefix cache.
        """
        if not self._counts:
            return None
        taken = torch.stack(self._counts).numpy()
        for counts in self._counts:
            counts.zero_()
        return taken


def _routers(model: nn.Module) -> list:
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.platforms import current_platform

    # On a GPU a count per layer and step would wait for the device each time.
    if not current_platform.is_cpu():
        return []
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    return [runner.router for runner in runners if isinstance(runner.router, BaseRouter)]


def _count(ids: torch.Tensor, counts: torch.Tensor) -> None:
    counts += torch.bincount(ids.reshape(-1), minlength=len(counts))
