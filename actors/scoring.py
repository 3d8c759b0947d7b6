"""Log-probabilities from a causal language model, with logits at counted positions only.

The model's own forward runs to its end: its output head is handed only the hidden states of
predicting positions, so whatever an architecture does to its logits (Granite's scaling, Gemma's
soft cap) is done here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.algorithms.logprob import LabelStatistics, label_logps, label_statistics
from actors.models.attention import Sequences, no_mask, use_by_sequence
from actors.packing import MicroBatch


class TokenScorer:
    """Scores the counted labels of micro-batches under one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise TypeError(f"{type(model).__name__} has no output head to take logits from")
        self.model = model
        self.by_sequence = use_by_sequence(model)
        """Micro-batches may be laid flat."""
        self._predictors: Tensor | None = None
        head.register_forward_pre_hook(self._keep_predictors)

    def statistics(self, micro: MicroBatch) -> LabelStatistics:
        """Log-probabilities (with gradient where enabled) and statistics of T counted labels."""
        labels = torch.from_numpy(micro.labels).to(self.model.device)
        return label_statistics(self._logits(micro), labels)

    def logps(self, micro: MicroBatch) -> Tensor:
        """float32 (T,) log-probabilities, without gradient."""
        labels = torch.from_numpy(micro.labels).to(self.model.device)
        with torch.no_grad():
            return label_logps(self._logits(micro), labels)

    def _logits(self, micro: MicroBatch) -> Tensor:
        """(T, V)."""
        device = self.model.device
        self._predictors = torch.from_numpy(micro.predictors).to(device)
        try:
            output = self.model(
                input_ids=torch.from_numpy(micro.input_ids).to(device),
                position_ids=torch.from_numpy(micro.position_ids).to(device),
                use_cache=False,
                **_attention(micro, device),
            )
        finally:
            self._predictors = None
        # squeeze, not [0]: the backward pass of an index fills a second tensor of this size with zeros.
        return output.logits.squeeze(0)

    def _keep_predictors(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """(B, L, H) -> (1, T, H), while a micro-batch is being scored."""
        if self._predictors is None:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, self._predictors)
        return (hidden[None], *args[1:])


def _attention(micro: MicroBatch, device: torch.device) -> dict[str, Any]:
    """What the model's forward is told about attention, where it does not follow from the position ids."""
    plan = micro.attention
    if plan is None:
        return {}
    places, outputs = (
        None if x is None else torch.from_numpy(x).to(device) for x in (plan.places, plan.outputs)
    )
    return {"sequences": Sequences(plan.shapes, places, outputs), "attention_mask": no_mask(device)}
