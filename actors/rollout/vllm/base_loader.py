"""The base in vLLM as the trainer has it: a loader that hands vLLM dequantised weights.

For bases that the trainer holds in 4 or 8 bits (`model.quantization`), and for checkpoints with experts in
MXFP4, which vLLM would compute with in its own way. Importing this module registers the loaders; vLLM imports
it in every worker with `worker_extension`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.base.mxfp4 import is_mxfp4
from actors.models.quantization.layout import Rounding
from actors.models.spec import Quantization


def base_weights(
    directory: str, config: Any, kind: Quantization | None, dtype: torch.dtype
) -> BaseCheckpoint:
    """The base's tensors as the trainer computes with them. `config`: transformers', of the checkpoint."""
    return BaseCheckpoint(directory, None if kind is None else Rounding(kind, config, dtype))


def loader_settings(config: Any, kind: Quantization | None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for a base with this config, quantised by `kind`."""
    if is_mxfp4(config):
        return {"load_format": _NAMES[kind], "hf_overrides": _not_quantized}
    return {} if kind is None else {"load_format": _NAMES[kind]}


def _not_quantized(config: Any) -> Any:
    """The config of a checkpoint that vLLM gets dequantised. Of gpt_oss, whose row has no overrides."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


class _Dequantised(DefaultModelLoader):
    kind: Quantization | None = None

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Names in the checkpoint and weights, one at a time, dequantised where the model is."""
        config = AutoConfig.from_pretrained(
            model_config.model, trust_remote_code=model_config.trust_remote_code
        )
        base = base_weights(model_config.model, config, self.kind, model_config.dtype)
        device = next(model.parameters()).device
        self.counter_before_loading_weights = time.perf_counter()
        for name in base.shapes:
            yield name, base.tensor(name, device)
            base.release()


class _Nf4(_Dequantised):
    kind = "nf4"


class _Int8(_Dequantised):
    kind = "int8"


_LOADERS: dict[Quantization | None, type[_Dequantised]] = {None: _Dequantised, "nf4": _Nf4, "int8": _Int8}
_NAMES = {kind: f"raylign_{kind or 'dequantised'}" for kind in _LOADERS}
for _kind, _loader in _LOADERS.items():
    register_model_loader(_NAMES[_kind])(_loader)
