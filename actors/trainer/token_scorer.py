"""Log-probabilities from a causal language model, with logits at counted positions only; heads' outputs.

The model's own forward runs to its end: its output head is handed only the hidden states of
predicting positions, so whatever an architecture does to its logits (Granite's scaling, Gemma's
soft cap) is done here too. A scalar head reads the trunk's hidden states, and no logits are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.algorithms.chunked_logprob import (
    block_elements,
    has_float32_products,
    head_further_logps,
    head_logps,
    head_statistics,
    head_top_logps,
)
from actors.algorithms.logprob import (
    LabelStatistics,
    further_logps,
    label_logps,
    label_statistics,
    top_logps,
)
from actors.batches.packing import MicroBatch
from actors.batches.position_shares import PositionShare
from actors.models.attention.by_sequence import arguments, use_by_sequence
from actors.models.moe.experts_forward import last_experts, only, use_fused
from actors.models.moe.router_replay import RouteReplay
from actors.models.parallel.fsdp import is_managed
from actors.models.parallel.sequence_parallel import of_all_ranks

BLOCKS_MADE_AGAIN = 8
"""Logits of more blocks than this are made again in the backward pass, where they are needed there. Against
keeping them that took a quarter to a half longer on a CPU, and a quarter of the memory."""


class TokenScorer:
    """Scores the counted labels of micro-batches under one model.

    Of a micro-batch whose positions ranks share out each computes its own, and hands out what all have found.
    """

    def __init__(self, model: PreTrainedModel, row_group: dist.ProcessGroup | None = None) -> None:
        """`row_group`: the ranks that share out positions."""
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise TypeError(f"{type(model).__name__} has no output head to take logits from")
        self.model, self._row_group = model, row_group
        self.sequences = use_by_sequence(model)
        """Form in which its attention takes the sequences of a padding-free row; None: it takes none."""
        self.in_one_row = "flash" in str(model.config._attn_implementation)
        """Of several rows transformers' flash attention reads no position ids that restart: sequences of a
        bin would see each other."""
        self.head = head
        self.logit_scale = _logit_scale(model, head)
        """Number by which the model multiplies its head's outputs, which then need not be made whole; None
        where it does something else to them."""
        use_fused(model)
        self.last_experts = last_experts(model)
        self.replay: RouteReplay | None = None
        """Forces the experts of micro-batches that come with some; None: there are none that do."""
        self._predictors: Tensor | None = None
        self._states: Tensor | None = None
        head.register_forward_pre_hook(self._keep_predictors)

    @property
    def by_sequence(self) -> bool:
        """Micro-batches may be laid flat."""
        return self.sequences is not None

    def statistics(
        self, micro: MicroBatch, temperature: float = 1.0, entropy_gradient: bool = False
    ) -> LabelStatistics:
        """Log-probabilities (with gradient where enabled) and statistics of T counted labels."""
        return self.with_further(micro, temperature, entropy_gradient, None)[0]

    def with_further(
        self, micro: MicroBatch, temperature: float, entropy_gradient: bool, further: Tensor | None
    ) -> tuple[LabelStatistics, Tensor | None]:
        """As `statistics`; and log-probabilities of further tokens in place of each label, float32 (T, k),
        with gradient; `further`: their ids, int64 (T, k)."""
        if not isinstance(micro, PositionShare):
            return self._own_statistics(micro, temperature, entropy_gradient, further)
        own_further = None if further is None else further[torch.from_numpy(micro.counted).to(further.device)]
        found, others = self._own_statistics(micro, temperature, entropy_gradient, own_further)
        columns = torch.stack([x.float() for x in found], dim=1)
        whole = self._of_all(columns, micro.counted, len(micro.sequence)).unbind(1)
        read = [x if own.requires_grad else x.detach() for x, own in zip(whole, found, strict=True)]
        others = None if others is None else self._of_labels(others, micro)
        return LabelStatistics(*read)._replace(correct=read[2] > 0.5), others

    def _own_statistics(
        self, micro: MicroBatch, temperature: float, entropy_gradient: bool, further: Tensor | None
    ) -> tuple[LabelStatistics, Tensor | None]:
        labels = torch.from_numpy(micro.labels).to(self.model.device)
        again = torch.is_grad_enabled() and (entropy_gradient or self.head.weight.requires_grad)
        scale = self._scale_by_blocks(micro, BLOCKS_MADE_AGAIN if again else 1)
        if scale is not None:
            hidden, weight, scaled = self._hidden(micro), self.head.weight, temperature / scale
            found = head_statistics(hidden, weight, labels, scaled, entropy_gradient)
            if further is None:
                return found, None
            return found, head_further_logps(hidden, weight, labels, found.logps, further, scaled)
        logits = self._logits(micro)
        found = label_statistics(logits, labels, temperature, entropy_gradient)
        if further is None:
            return found, None
        return found, further_logps(logits, labels, found.logps, further, temperature)

    def top(self, micro: MicroBatch, k: int, temperature: float) -> Tensor:
        """float64 (T, 2 k): as `top_logps`, of what is predicted in place of each counted label."""
        with torch.no_grad():
            scale = self._scale_by_blocks(micro)
            if scale is None:
                return self._of_labels(top_logps(self._logits(micro), k, temperature), micro)
            labels = torch.from_numpy(micro.labels).to(self.model.device)
            found = head_top_logps(self._hidden(micro), self.head.weight, labels, k, temperature / scale)
            return self._of_labels(found, micro)

    def logps(self, micro: MicroBatch, temperature: float = 1.0) -> Tensor:
        """float32 (T,) log-probabilities, without gradient."""
        with torch.no_grad():
            return self._of_labels(self._own_logps(micro, temperature), micro)

    def _own_logps(self, micro: MicroBatch, temperature: float) -> Tensor:
        labels = torch.from_numpy(micro.labels).to(self.model.device)
        scale = self._scale_by_blocks(micro)
        if scale is not None:
            return head_logps(self._hidden(micro), self.head.weight, labels, temperature / scale)
        return label_logps(self._logits(micro), labels, temperature)

    def _scale_by_blocks(self, micro: MicroBatch, whole_up_to: int = 1) -> float | None:
        """The scale of logits that are made by blocks; None where the model makes them whole.

        By blocks where whole logits exceed `whole_up_to` blocks (below, they save no memory and take a little
        longer), and where products in float32 are to be had, which the model's own head doesn't give. Not for
        a head that trains under FSDP, which gathers gradients in its own pass.
        """
        weight = self.head.weight
        if self.logit_scale is None or (weight.requires_grad and is_managed(self.model)):
            return None
        large = len(micro.labels) * len(weight) > whole_up_to * block_elements(weight.device)
        return self.logit_scale if large or has_float32_products(weight) else None

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """(T, H): what the head reads at predicting positions; it is itself handed no rows."""
        self._states = torch.empty(0)
        try:
            self._logits(micro)
            return self._states
        finally:
            self._states = None

    def values(self, micro: MicroBatch, head: nn.Linear) -> Tensor:
        """float32 (T,): the head at the state before each counted token."""
        return self._of_labels(self._head_at(micro, micro.predictors, head), micro)

    def scores(self, micro: MicroBatch, head: nn.Linear) -> Tensor:
        """float32 (S,): the head at each sequence's last token."""
        found = self._head_at(micro, micro.last, head)
        if not isinstance(micro, PositionShare):
            return found
        return self._of_all(found, micro.ends, micro.n_sequences)

    def of_all_positions(self, per_layer: list[Tensor], micro: PositionShare) -> list[Tensor]:
        """Rows (real positions, n) of each layer, of this rank's positions -> of all of the row."""
        found = torch.cat(per_layer, dim=1)
        whole = self._of_all(found, micro.positions, micro.n_tokens)
        return list(whole.split([x.shape[1] for x in per_layer], dim=1))

    def _of_labels(self, own: Tensor, micro: MicroBatch) -> Tensor:
        if not isinstance(micro, PositionShare):
            return own
        return self._of_all(own, micro.counted, len(micro.sequence))

    def _of_all(self, own: Tensor, places: np.ndarray, size: int) -> Tensor:
        """Rows of this rank, at their places among all of a micro-batch, with those of the other ranks."""
        assert self._row_group is not None
        return of_all_ranks(own, torch.from_numpy(places).to(own.device), size, self._row_group)

    def _head_at(self, micro: MicroBatch, places: np.ndarray, head: nn.Linear) -> Tensor:
        if is_managed(self.model):
            # A sharded model is entered by its root alone: FSDP knows no pass that begins further down.
            return head(self._hidden(replace(micro, predictors=places)).float()).squeeze(-1)
        with self._reading_only(places):
            output = self.model.base_model(**self._inputs(micro))
        index = torch.from_numpy(places).to(self.model.device)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, index)
        return head(hidden.float()).squeeze(-1)

    def _logits(self, micro: MicroBatch) -> Tensor:
        """(T, V)."""
        self._predictors = torch.from_numpy(micro.predictors).to(self.model.device)
        try:
            with self._reading_only(micro.predictors):
                output = self.model(**self._inputs(micro))
        finally:
            self._predictors = None
        # squeeze, not [0]: the backward pass of an index fills a second tensor of this size with zeros.
        return output.logits.squeeze(0)

    def _reading_only(self, places: np.ndarray) -> AbstractContextManager[None]:
        """The last layer's experts see three quarters of the tokens, prompts, for nothing: leave those out.

        With gradient checkpointing a layer runs again in the backward pass, outside of this.
        """
        if self.last_experts is None or self.model.is_gradient_checkpointing:
            return nullcontext()
        # The last token of a prompt that sequences share predicts a token of each.
        return only(self.last_experts, torch.from_numpy(np.unique(places)).to(self.model.device))

    def _inputs(self, micro: MicroBatch) -> dict[str, object]:
        device = self.model.device
        if self.replay is not None:
            self.replay.force(micro.experts)
        elif micro.experts is not None:
            raise ValueError("this model was not told to replay experts: model.moe.router_replay")
        shape = (1, -1) if self.in_one_row else micro.input_ids.shape
        return {
            "input_ids": torch.from_numpy(micro.input_ids.reshape(shape)).to(device),
            "position_ids": torch.from_numpy(micro.position_ids.reshape(shape)).to(device),
            "use_cache": False,
            **self._attention(micro, device),
        }

    def _attention(self, micro: MicroBatch, device: torch.device) -> dict[str, object]:
        """Arguments about attention, where it does not follow from the position ids."""
        if micro.attention is None:
            return {}
        assert self.sequences is not None, "this model's attention is not told where sequences begin"
        return arguments(self.sequences, micro.attention, device, self._row_group)

    def _keep_predictors(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """(B, L, H) -> (1, T, H), while a micro-batch is being scored."""
        if self._predictors is None:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, self._predictors)
        if self._states is not None:
            self._states, hidden = hidden, hidden[:0]
        return (hidden[None], *args[1:])


def _logit_scale(model: PreTrainedModel, head: nn.Module) -> float | None:
    """The scale between a head's outputs and the model's logits, tried on one token; None: there is none."""
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: made.append(output))
    try:
        with torch.no_grad():
            token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
            logits = model(input_ids=token, use_cache=False).logits
    finally:
        hook.remove()
    if len(made) != 1:
        return None
    if logits is made[0]:
        return 1.0
    for scale in _scales(model):
        # One rounding of the model's own.
        if torch.allclose(logits, made[0] * scale, rtol=2 * torch.finfo(logits.dtype).eps, atol=0.0):
            return scale
    return None


def _scales(model: PreTrainedModel) -> Iterator[float]:
    """Scales of logits that configs name: Granite divides by the first, Cohere multiplies by the second."""
    config = model.config.get_text_config()
    if getattr(config, "logits_scaling", None):
        yield 1 / config.logits_scaling
    if getattr(config, "logit_scale", None):
        yield config.logit_scale
