"""Checkpoints with experts in MXFP4, as gpt-oss is published: 4-bit numbers in blocks of 32 with a power of
two.

They are dequantised while they are read, into bfloat16, which holds each value exactly; nothing here computes
in MXFP4.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def is_mxfp4(config: PretrainedConfig) -> bool:
    """True where the checkpoint of this config holds its experts in MXFP4."""
    return quant_method(config) == "mxfp4"


def quant_method(config: PretrainedConfig) -> str | None:
    """Method by which a checkpoint is quantised; None: it is not."""
    found: Any = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def dequantized_mxfp4(base_path: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which transformers dequantises such a checkpoint; said in the log."""
    from transformers import Mxfp4Config

    logging.getLogger(__name__).warning(
        "%s: its experts in MXFP4 are dequantised into 16 bits while they are read, four times their size",
        base_path,
    )
    return {"quantization_config": Mxfp4Config(dequantize=True)}


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that says nothing of how its checkpoint is quantised."""
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain
