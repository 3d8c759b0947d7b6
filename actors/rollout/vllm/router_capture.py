"""Capture of the experts that the routers of a vLLM engine choose; imported in vLLM's processes.

Experts are kept where vLLM keeps keys and values: by cache slot. A prompt that is served from the prefix
cache was routed when its keys were computed, and its slots still hold what was chosen then; a slot that is
given to another sample is written anew with its keys. So prefix caching, prompts in chunks, samples that are
pushed out and computed again, and weights that change between two steps need no code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from actors.batches.routed_experts import RoutedExperts, expert_dtype
from actors.errors import RunFailure
from actors.rollout.vllm.workarounds.registry import LEANT_ON
from actors.rollout.vllm.worker_calls import ask, unpacked

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


class RouteCounter:
    """Counts the choices of every router of a model, layer by layer."""

    def __init__(self, model: nn.Module) -> None:
        """Listen to the routers of `model` that can be listened to, from now on."""
        self._counts: list[torch.Tensor] = []
        self.keeper: RouteKeeper | None = None
        self._routers = _routers(model)
        for layer, router in enumerate(self._routers):
            self._counts.append(torch.zeros(router.global_num_experts, dtype=torch.int64))
            router.set_capture_fn(self._listener(layer))

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

    def keep(self, runner: Any) -> None:
        """From now on keep the experts of every token of vLLM's model runner, see `RouteKeeper`.

        Raises:
            RunFailure: this engine has no routers that can be listened to, or its vLLM is another one than
                this was written for.
        """
        if not self._routers:
            raise RunFailure("rollout", "load", "no router of this engine can be listened to")
        LEANT_ON["router_capture"].check()
        router = self._routers[0]
        self.keeper = RouteKeeper(runner, len(self._routers), router.top_k, router.global_num_experts)

    def _listener(self, layer: int) -> Callable[[torch.Tensor], None]:
        counts = self._counts[layer]

        def listen(ids: torch.Tensor) -> None:
            counts.add_(torch.bincount(ids.reshape(-1), minlength=len(counts)))
            if self.keeper is not None:
                self.keeper.chosen(layer, ids)

        return listen


class RouteKeeper:
    """The experts of every token whose keys are in the cache, and of samples that have ended since."""

    def __init__(self, runner: Any, n_layers: int, top_k: int, n_experts: int) -> None:
        """`runner`: vLLM's (V1) model runner on a CPU, its cache allocated.

        Raises:
            RunFailure: no layer keeps the keys of all positions.
        """
        self._runner = runner
        config = runner.kv_cache_config
        self._group = _full_attention_group(config)
        self._block = config.kv_cache_groups[self._group].kv_cache_spec.block_size
        dtype = expert_dtype(n_experts)
        self._slots = np.zeros((config.num_blocks * self._block, n_layers, top_k), dtype)
        self._step: list[torch.Tensor] = []
        self._live: dict[str, tuple[Any, int]] = {}
        """Request -> its state in the runner, and the positions that are computed of it."""
        self._ended: dict[str, np.ndarray] = {}

    def chosen(self, layer: int, ids: torch.Tensor) -> None:
        """One layer's choice in the running step, (tokens, top_k); the last layer's ends the step.

        Raises:
            RunFailure: routers did not decide one after the other, each once.
        """
        if layer != len(self._step):
            raise RunFailure("rollout", "generate", f"router {layer} decides as number {len(self._step)}")
        self._step.append(ids)
        if len(self._step) == self._slots.shape[1]:
            step, self._step = self._step, []
            self._keep(torch.stack(step, dim=1).numpy())

    def take(self, requests: Sequence[str]) -> list[np.ndarray]:
        """(positions, layers, top_k) of each ended request, by the number that its caller gave it.

        Raises:
            RunFailure: nothing was kept of one.
        """
        wanted = set(requests)
        self._collect({key for key in self._live if _outer(key) in wanted})
        by_number = {_outer(key): key for key in self._ended}
        if missing := [number for number in requests if number not in by_number]:
            raise RunFailure("rollout", "generate", f"no experts were kept of requests {missing[:3]}")
        return [self._ended.pop(by_number[number]) for number in requests]

    def forget(self, requests: Sequence[str]) -> None:
        """Nobody will take what was kept of these."""
        gone = set(requests)
        for kept in (self._live, self._ended):
            for key in [key for key in kept if _outer(key) in gone]:
                del kept[key]

    def _keep(self, experts: np.ndarray) -> None:
        """Write a step's choices, after collecting what ended before it: its slots may be new owners'."""
        runner = self._runner
        batch = runner.input_batch
        self._collect(self._live.keys() - runner.requests.keys())
        starts = runner.query_start_loc.np[: len(batch.req_ids) + 1]
        for row, request in enumerate(batch.req_ids):
            state = runner.requests[request]
            # Log-probabilities of a given text are no sample; nobody asks for their experts.
            if state.sampling_params is not None and state.sampling_params.prompt_logprobs is None:
                computed = int(batch.num_computed_tokens_cpu[row]) + int(starts[row + 1] - starts[row])
                self._live[request] = (state, computed)
        n = int(starts[-1])
        # vLLM computes into `gpu`, on a CPU too; with several groups of layers `np` is another array.
        slots = batch.block_table[self._group].slot_mapping.gpu[:n].numpy()
        self._slots[slots] = experts[:n]

    def _collect(self, requests: set[str]) -> None:
        for request in requests:
            state, computed = self._live.pop(request)
            blocks = np.asarray(state.block_ids[self._group], dtype=np.int64)
            slots = (blocks[:, None] * self._block + np.arange(self._block)).reshape(-1)
            self._ended[request] = self._slots[slots[:computed]]


def capture_settings() -> dict[str, Any]:
    """Arguments of vLLM's `LLM` with which it returns experts itself: on GPUs, by its second model runner."""
    from vllm.platforms import current_platform

    return {} if current_platform.is_cpu() else {"enable_return_routed_experts": True}


def keep_experts(llm: LLM) -> None:
    """Let an engine on a CPU keep what `routed_experts` reads, from its first sample on.

    Raises:
        RunFailure: its routers can't be listened to.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        ask(llm, "keep_routes")


def forget_experts(llm: LLM, requests: Sequence[str]) -> None:
    """The experts of samples that end before their time are not asked for."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        ask(llm, "forget_routes", list(requests))


def routed_experts(llm: LLM, outputs: Sequence[RequestOutput]) -> RoutedExperts:
    """Experts of ended samples, one for each of vLLM's outputs.

    On a GPU vLLM returns them itself (`enable_return_routed_experts`), dense layers included; not run here.

    Raises:
        RunFailure: a sample has fewer positions than it must have.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        taken = ask(llm, "take_routes", [output.request_id for output in outputs])[0]
        kept = [unpacked(one) for one in taken]
    else:
        layers = ask(llm, "moe_layers")[0]
        dtype = expert_dtype(llm.llm_engine.model_config.get_num_experts())
        kept = [np.asarray(output.outputs[0].routed_experts)[:, layers].astype(dtype) for output in outputs]
    computed = [len(o.prompt_token_ids or ()) + len(o.outputs[0].token_ids) - 1 for o in outputs]
    for output, experts, wanted in zip(outputs, kept, computed, strict=True):
        # A step that was under way when a sample ended may have computed more of it.
        if len(experts) < wanted:
            raise RunFailure(
                "rollout",
                "generate",
                f"request {output.request_id} has experts for {len(experts)} of {wanted} positions",
            )
    return RoutedExperts.of([experts[:wanted] for experts, wanted in zip(kept, computed, strict=True)])


def moe_layers(model: nn.Module) -> list[int]:
    """Numbers of the layers with experts, among all layers of a vLLM model."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    return [module.layer_id for module in model.modules() if isinstance(module, MoERunner)]


def _outer(request: str) -> str:
    """vLLM appends eight random characters to the number that a caller gives a request."""
    return request.rpartition("-")[0] or request


def _full_attention_group(config: Any) -> int:
    """Sliding windows give their blocks back before a sample ends."""
    from vllm.v1.kv_cache_interface import is_full_attention_spec

    for index, group in enumerate(config.kv_cache_groups):
        if is_full_attention_spec(group.kv_cache_spec):
            return index
    raise RunFailure("rollout", "load", "no layer of this model keeps the keys of all positions")


def _routers(model: nn.Module) -> list:
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.platforms import current_platform

    # On a GPU a count per layer and step would wait for the device each time.
    if not current_platform.is_cpu():
        return []
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    return [runner.router for runner in runners if isinstance(runner.router, BaseRouter)]
