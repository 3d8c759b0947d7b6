"""Changes that the workarounds make in vLLM; imported only in an engine's process. Causes: `registry`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from actors.rollout.vllm.workarounds.patches import Patches


def rotary_queries_by_head(patches: Patches) -> None:
    """Three-dimensional queries are rotated by vLLM's own PyTorch code."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    kernel = RotaryEmbedding.forward_cpu

    def forward_cpu(self: Any, positions: torch.Tensor, query: torch.Tensor, key: Any = None) -> Any:
        chosen = self.forward_native if query.dim() == 3 else kernel.__get__(self)
        return chosen(positions, query, key)

    patches.set(RotaryEmbedding, "forward_cpu", forward_cpu)


def router_bias(patches: Patches) -> None:
    """Scores with a correction bias, or sigmoid scores, go through the grouped routing, with one group."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    plain = cpu_router.CPURouter._compute_routing

    def compute_routing(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        biased = self.e_score_correction_bias is not None and self.scoring_func == "softmax"
        other = self.use_grouped_topk or self.custom_routing_function is not None
        if other or not (biased or self.scoring_func == "sigmoid"):
            return plain(self, hidden_states, router_logits, *args, **kwargs)
        return cpu_router._grouped_topk(
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )

    patches.set(cpu_router.CPURouter, "_compute_routing", compute_routing)


def experts_without_slots(patches: Patches) -> None:
    """Experts get the kernel that they would have without LoRA; they are given none of it."""
    from vllm.model_executor.layers.fused_moe import layer

    config = layer.FusedMoEConfig

    def without_lora(**settings: Any) -> Any:
        return config(**{**settings, "is_lora_enabled": False})

    patches.set(layer, "FusedMoEConfig", without_lora)


_STACKED = re.compile(r"\.mlp\.experts\.(w13_weight|w2_weight|w13_bias|w2_bias)$")


def gpt_oss_loaders(patches: Patches) -> None:
    """Experts go through vLLM's loader for single experts and sinks through their own: a reload sees both."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.models import gpt_oss

    load = gpt_oss.GptOssModel._load_weights_other

    def one_by_one(
        model: Any, weights: Iterable[tuple[str, torch.Tensor]], loaded: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = dict(model.named_parameters())
        for name, weight in weights:
            stacked = _STACKED.search(name)
            if stacked:
                prefix = name[: stacked.start()]
                yield from (
                    (f"{prefix}.mlp.experts.{i}.{stacked[1]}", expert) for i, expert in enumerate(weight)
                )
            elif name.endswith(".sinks"):
                heads = model.config.num_attention_heads // get_tensor_model_parallel_world_size()
                own = weight.narrow(0, get_tensor_model_parallel_rank() * heads, heads)
                gpt_oss._get_weight_loader(parameters[name])(parameters[name], own)
                loaded.add(name)
            else:
                yield name, weight

    def load_weights_other(self: Any, *args: Any) -> set[str]:
        *places, weights, mapping = args
        sinks: set[str] = set()
        return load(self, *places, one_by_one(self, weights, sinks), mapping) | sinks

    def load_unquantized_expert(
        self: Any, expert_data: torch.Tensor, loaded_weight: torch.Tensor, shard_id: str
    ) -> None:
        # As vLLM's own, without its copy into another order of memory: bindings are learnt from what is
        # copied out of a checkpoint tensor straight into a parameter.
        dim, size = (1, expert_data.shape[0]) if shard_id == "gpt_oss_w13" else (0, expert_data.shape[1])
        rank = self.moe_config.moe_parallel_config.tp_rank
        own = self._narrow_for_rank(loaded_weight, dim, rank, size)
        self._copy_to_expert(expert_data, own.t())

    patches.set(gpt_oss.GptOssModel, "_load_weights_other", load_weights_other)
    patches.set(gpt_oss.GptOssRoutedExperts, "_load_unquantized_expert", load_unquantized_expert)


def named_loaders(patches: Patches) -> None:
    """The norm's loader, a partial, gets the name that a reload asks for."""
    from vllm.model_executor.layers.minimax_rms_norm.rms_norm_tp import MiniMaxText01RMSNormTP

    make = MiniMaxText01RMSNormTP.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.weight.weight_loader.__name__ = "weight_loader"

    patches.set(MiniMaxText01RMSNormTP, "__init__", init)


def phimoe_head_bias(patches: Patches) -> None:
    """Logits with the head's bias, where the checkpoint has one."""
    from vllm.model_executor.models.phimoe import PhiMoEForCausalLM

    def compute_logits(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        # vLLM builds a bias in any case; without lm_head_bias nothing is loaded into it.
        bias = self.lm_head.bias if self.config.lm_head_bias else None
        return self.logits_processor(self.lm_head, hidden_states, bias)

    patches.set(PhiMoEForCausalLM, "compute_logits", compute_logits)


def dbrx_expert_names(patches: Patches) -> None:
    """Experts under the name of the module that holds them now."""
    from vllm.model_executor.models.dbrx import DbrxModel

    load = DbrxModel.load_weights

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        there = ".experts.mlp.", ".experts.routed_experts.mlp."
        return load(self, ((name.replace(*there), weight) for name, weight in weights))

    patches.set(DbrxModel, "load_weights", load_weights)
