"""Experts into the layout of vLLM's CPU kernel, in a reload that leaves them in the checkpoint's.

vLLM (seen in 0.32) packs the experts of a layer only when it builds the layer's kernel, which a reload
does not do again: the packed kernel then computes with plain weights, off by .07 to 1.7 in log-probability
and without a word. Packing a packed layer again ruins it too, so exactly the reloaded ones are packed.
A test in `tests/actors/rollout/vllm/test_vllm_updates.py` fails once vLLM does this itself: drop this file
then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from actors.errors import UserError
from actors.models.threads import each


def refuse_padded_experts(model: nn.Module) -> None:
    """Experts that the kernel keeps in another size than the checkpoint's can't be reloaded.

    vLLM's CPU kernel pads their inner size to a multiple of 32 when it is first built; a reload then copies
    unpadded weights into padded ones and fails half way.

    Raises:
        UserError: this model has such experts.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for path, module in model.named_modules():
        if not isinstance(module, RoutedExperts):
            continue
        made, _ = get_layerwise_info(module).restore_metadata
        for name, parameter in module.named_parameters(recurse=False):
            if name in made and made[name].shape != parameter.shape:
                raise UserError(
                    f"model.base: vLLM's CPU kernel pads experts of this size ({path}.{name} from "
                    f"{tuple(made[name].shape)} to {tuple(parameter.shape)}), and padded experts can't take "
                    "new weights: online stages on the CPU need an expert size that is a multiple of 32"
                )


def repack_experts(modules: Iterable[nn.Module], threads: int = 1) -> int:
    """Pack those of these modules that are experts on the CPU, `threads` experts at a time; returns how many
    modules. Each was just loaded, and is still in the checkpoint's layout."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return 0
    # Subclasses exist (GptOssRoutedExperts and others): the type's name would miss them.
    experts = [module for module in modules if isinstance(module, RoutedExperts)]
    for module in experts:
        kernel = module.quant_method.moe_kernel.fused_experts
        if not _packed_into_the_kernels_memory(module, kernel, threads):
            kernel.process_weights_after_loading(module)
    return len(experts)


def _packed_into_the_kernels_memory(module: nn.Module, kernel: Any, threads: int) -> bool:
    """Pack as vLLM does, but to where a reload would then copy it; False where another way is vLLM's.

    vLLM's own takes new memory. Experts are most of a mixture: that copy was a tenth of a commit.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    own = CPUUnquantizedExperts.process_weights_after_loading
    held = get_layerwise_info(module).kernel_tensors
    if held is None or type(kernel).process_weights_after_loading is not own or kernel._use_zentorch:
        return False
    for name in ("w13_weight", "w2_weight"):
        loaded, packed = getattr(module, name), held[0][name]
        _pack(loaded.data, packed.data, kernel.isa, threads)
        delattr(module, name)
        module.register_parameter(name, packed)
    return True


def _pack(loaded: torch.Tensor, packed: torch.Tensor, isa: str, threads: int) -> None:
    """Each expert by itself, as the kernel does it."""

    def pack(i: int) -> None:
        torch.ops._C.prepack_moe_weight(loaded[i : i + 1], packed[i : i + 1], isa)

    each(range(len(loaded)), pack, threads)
