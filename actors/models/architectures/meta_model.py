"""A base's modules on the meta device: names and shapes, no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def meta_model(config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """The model of a config without storage: names and shapes only. `how`: arguments of transformers'
    `from_config`, such as its dtype.

    Raises:
        UserError: transformers makes no model of it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **how)
    except Exception as error:  # Whatever a model's code trips over: a value, a field that is not there, ...
        raise UserError(
            f"model.base: transformers makes no {config.model_type} model of its config.json "
            f"({type(error).__name__}: {error}); compare it with the published one"
        ) from error
