"""Experts into the layout of vLLM's CPU kernel, after a reload that left them in the checkpoint's.

vLLM (seen in 0.32) packs the experts of a layer only when it builds the layer's kernel, which a reload
does not do again: the packed kernel then computes with plain weights, off by .07 to 1.7 in log-probability
and without a word. Packing a packed layer again ruins it too, so exactly the reloaded ones are packed.
A test in `tests/actors/sync/test_vllm_updates.py` fails once vLLM does this itself: drop this file then.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def repack_experts(modules: Iterable[nn.Module]) -> int:
    """Pack those of the reloaded modules that are experts on the CPU; returns how many."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return 0
    # Subclasses exist (GptOssRoutedExperts and others): the type's name would miss them.
    experts = [module for module in modules if isinstance(module, RoutedExperts)]
    for module in experts:
        module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)
    return len(experts)
