"""A model whose ranks hold parts of it, loaded: transformers reads of each weight what this rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from actors.models.parallel.by_layer import Load, loading_by_layer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_divided(
    model_class: type[PreTrainedModel],
    base_path: str,
    divide: Callable[[Any], None],
    device: str | torch.device,
    how: dict[str, Any],
    loading: Callable[[Load], Load] = loading_by_layer,
) -> PreTrainedModel:
    """`from_pretrained` on the meta device; `divide` puts DTensors in place of weights there; then each rank
    reads its parts, straight onto its device, a layer at a time.

    Args:
        model_class: of the model itself; automatic ones can't be told how to divide.
        divide: does nothing for a model that is whole on this rank.
        device: of this rank.
        how: further arguments of `from_pretrained`.
        loading: makes of transformers' function that loads files what takes its place.

    transformers (5.19) reads slices for whatever is a DTensor when it has made the model; which that is, its
    `maybe_distribute_model` decides, on meshes of all processes there are. Here a class beneath the model's
    own decides it, for as long as it loads.
    """
    from transformers.distributed import DistributedConfig

    def prepare(cls: Any, config: Any, device_map: Any = None) -> tuple[Any, Any, None]:
        import torch

        return config, torch.device(device), None

    def distribute(cls: Any, model: PreTrainedModel, config: Any, mesh: None) -> PreTrainedModel:
        # Before: `fully_shard` makes classes of its own beneath.
        model.__class__ = model_class
        divide(model)
        return model

    overrides = {
        "__module__": model_class.__module__,
        "prepare_distribute_model": classmethod(prepare),
        "maybe_distribute_model": classmethod(distribute),
        "_load_pretrained_model": staticmethod(loading(model_class._load_pretrained_model)),
    }
    # Conversions of checkpoints go by the class's name.
    loader: Any = type(model_class.__name__, (model_class,), overrides)
    model = loader.from_pretrained(
        base_path, use_safetensors=True, distributed_config=DistributedConfig(), **how
    )
    model.config.distributed_config = None
    found: PreTrainedModel = model
    return found
