"""Names in memory and names in a checkpoint: transformers renames, cuts and joins weights as it loads and
saves. Its rules are not written down here a second time: tensors are sent through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.models.architectures.meta_model import meta_model

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def conversion_model(config: PretrainedConfig) -> PreTrainedModel:
    """A base's model for `checkpoint_tensors`: names and shapes alone. transformers need not look its
    conversions up anew whenever it converts: 4 ms each time."""
    from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping

    model = meta_model(config)
    found = get_model_conversion_mapping(model, add_legacy=False)
    # As transformers leaves them out for a model that it did not load.
    model._weight_conversions = [one for one in found if not isinstance(one, PrefixChange)] or None
    return model


def checkpoint_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names in memory -> names in a checkpoint. transformers renames, cuts and joins."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors) if tensors else {}
    return found


def row_numbers(experts: list[int], rows: int) -> torch.Tensor:
    """int64 ([experts,] rows, 2): the number of each row, in place of a weight that is to be sent through
    `checkpoint_tensors`. Two columns: transformers drops a dimension of one."""
    import torch

    count = rows * (experts[0] if experts else 1)
    return torch.arange(count, device="cpu").view(*experts, rows, 1).expand(*experts, rows, 2)
