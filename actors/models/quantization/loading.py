"""Loads a base in 4 or 8 bits: transformers reads and joins one weight at a time, and it is quantised before
the next is read, so that the base in 16 or 32 bits is never whole in memory.

transformers' interface for this is a quantizer (5.19, `quantizers/base.py`); its own for bitsandbytes
replaces linear layers and leaves stacks of experts, most of a mixture's weights, in 16 bits without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from actors.models.freed_memory import give_back
from actors.models.quantization.codec import codec_of, quantise
from actors.models.quantization.layout import QuantisedMatrices, quantised_places
from actors.models.quantization.quantised_tensor import pieces_of, quantised
from actors.models.spec import Quantization

METHOD = "raylign"


@register_quantization_config(METHOD)
class FrozenBaseConfig(QuantizationConfigMixin):
    """Argument of `from_pretrained`."""

    def __init__(self, kind: Quantization, device: str | torch.device = "cpu", mxfp4: bool = False) -> None:
        """`device`: where weights are quantised and stay; `mxfp4`: the files hold experts in MXFP4."""
        self.quant_method: Any = METHOD
        self.kind, self.device, self.mxfp4 = kind, str(device), mxfp4


@register_quantizer(METHOD)
class FrozenBaseQuantizer(HfQuantizer):
    """Answers what transformers asks while it loads."""

    quantization_config: Any

    def preprocess_model(self, model: Any, dtype: Any = None, **how: Any) -> None:
        """Before loading, the model is on the meta device."""
        config = self.quantization_config
        self.places = quantised_places(model.config, config.kind)
        self.dtype = dtype
        for name in self.places:
            owner, _, leaf = name.rpartition(".")
            # Tensors come in the dtype of these: none is rounded before it is quantised.
            empty = torch.empty_like(model.get_parameter(name), dtype=torch.float32, device="meta")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=False))

    def postprocess_model(self, model: Any, **how: Any) -> None:
        """After loading it is a model as any other, whose weights happen to be small."""
        del model.hf_quantizer
        del model.config.quantization_config

    def param_needs_quantization(self, model: Any, param_name: str, **how: Any) -> bool:
        """Asked for each weight."""
        return param_name in self.places

    def get_quantize_ops(self) -> ConversionOps:
        """Applied to each weight that needs it."""
        return _Quantise(self.places, self.quantization_config, self.dtype)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Besides the architecture's own."""
        if not self.quantization_config.mxfp4:
            return []
        from transformers.integrations.mxfp4 import Mxfp4Dequantize

        return [
            WeightConverter(
                source_patterns=[f"{name}_blocks", f"{name}_scales"],
                target_patterns=f"{name}$",
                operations=[Mxfp4Dequantize(self)],
            )
            for name in ("gate_up_proj", "down_proj")
        ]

    def is_serializable(self) -> bool:
        """A frozen base is not saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


class _Quantise(ConversionOps):
    def __init__(
        self, places: dict[str, QuantisedMatrices], config: FrozenBaseConfig, dtype: torch.dtype
    ) -> None:
        self._places, self._config, self._dtype = places, config, dtype

    def convert(self, input_dict: dict[str, Any], **how: Any) -> dict[str, Any]:
        """Weights by their names in memory, each alone or in a list."""
        return {name: self._quantised(name, value) for name, value in input_dict.items()}

    def _quantised(self, name: str, value: Any) -> Any:
        weight = value[0] if isinstance(value, list) else value
        place = self._places.get(name)
        if place is None:
            return weight
        codec = codec_of(self._config.kind)
        pieces = pieces_of(weight.detach().to(self._config.device), place.shape[0])
        shape = torch.empty(weight.shape, dtype=self._dtype, device="meta")
        made = quantised(quantise(codec, pieces), codec, place.shape, shape)
        del weight, value, pieces
        give_back()
        return made
