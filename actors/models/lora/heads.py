"""Scalar heads of roles: a reward model's score, a critic's value.

A head is a row of weights (hidden -> 1, no bias, float32) that belongs to an adapter. It reads the trunk's
last hidden states, so forward passes of such a role compute no logits. Heads are kept outside of the model:
saving or switching one role's adapter can't touch another role's head.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from actors.errors import UserError
from actors.models.base.loading import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

HeadInit = Literal["zero", "normal"]

SCORE_KEY = "base_model.model.score.weight"
"""The head's tensor (1, hidden) in PEFT's files, as transformers' sequence classifiers name it."""
HEAD_NAME = "score.weight"
"""The head's parameter among those that train with it, in checkpoints and messages."""
HEAD_FILE = "score_head.safetensors"
"""Holds the head as `score.weight` where transformers has no sequence classifier of the architecture."""


def make_head(config: PretrainedConfig, init: HeadInit, seed: int, device: str | torch.device) -> nn.Linear:
    """A fresh head.

    Args:
        init: `zero` scores everything 0 at the start; `normal` samples N(0, initializer_range), as
            transformers initialises the head of a sequence classifier.
    """
    import torch
    from torch import nn

    text = config.get_text_config()
    head = nn.Linear(text.hidden_size, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        if init == "zero":
            head.weight.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            head.weight.normal_(0.0, getattr(text, "initializer_range", 0.02), generator=generator)
    return head.to(device).requires_grad_(False)


def has_sequence_classifier(model_type: str) -> bool:
    """True where plain transformers can load a saved head: it has a sequence classifier of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def saved_head(directory: str | Path) -> tuple[Path, str] | None:
    """The file that has the scalar head (1, hidden) saved with an adapter, and the tensor's name there; None
    for an adapter without one. Reads names and shapes alone.

    Raises:
        UserError: a file can't be read, or the head is of another shape than one score.
    """
    from safetensors import SafetensorError, safe_open

    file, name = Path(directory) / HEAD_FILE, HEAD_NAME
    if not file.is_file():
        file, name = Path(directory) / ADAPTER_WEIGHTS, SCORE_KEY
    if not file.is_file():
        raise UserError(f"adapter '{directory}' has no {ADAPTER_WEIGHTS}")
    try:
        with safe_open(file, "numpy") as opened:
            names = opened.keys()
            shape = tuple(opened.get_slice(name).get_shape()) if name in names else None
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter '{file}' is damaged: {error}") from error
    if shape is not None and (len(shape) != 2 or shape[0] != 1):
        raise UserError(f"adapter '{directory}' has a head of shape {shape}; one score is (1, hidden)")
    return None if shape is None else (file, name)


def head_parameters(head: nn.Linear | None) -> dict[str, nn.Parameter]:
    """A head's parameter under the name that checkpoints and checks give it; empty without a head."""
    return {} if head is None else {HEAD_NAME: head.weight}
