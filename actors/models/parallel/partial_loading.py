"""A model loaded in parts that are not FSDP's: transformers reads of each weight what this rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_divided(
    model_class: type[PreTrainedModel],
    base_path: str,
    divide: Callable[[Any], None],
    device: str | torch.device,
    how: dict[str, Any],
) -> PreTrainedModel:
    """`from_pretrained` on the meta device; `divide` puts DTensors in place of weights there; then each rank
    reads its parts.

    Args:
        model_class: of the model itself; automatic ones can't be told how to divide.
        device: of this rank.
        how: further arguments of `from_pretrained`.

    transformers (5.19) reads slices for whatever is a DTensor when it has made the model; which that is, its
    `maybe_distribute_model` decides, on meshes of all processes there are. Here a class beneath the model's
    own decides it, for as long as it loads.
    """
    from transformers.distributed import DistributedConfig

    def prepare(cls: Any, config: Any, device_map: Any = None) -> tuple[Any, Any, None]:
        import torch

        return config, torch.device(device), None

    def distribute(cls: Any, model: PreTrainedModel, config: Any, mesh: None) -> PreTrainedModel:
        divide(model)
        return model

    overrides = {
        "__module__": model_class.__module__,
        "prepare_distribute_model": classmethod(prepare),
        "maybe_distribute_model": classmethod(distribute),
    }
    # Conversions of checkpoints go by the class's name.
    loader: Any = type(model_class.__name__, (model_class,), overrides)
    model = loader.from_pretrained(
        base_path, use_safetensors=True, distributed_config=DistributedConfig(), **how
    )
    model.__class__ = model_class
    model.config.distributed_config = None
    return model
