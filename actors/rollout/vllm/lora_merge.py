"""New weights in the engine's process: W0 + s B A, from the base's files, under checkpoint names.

W0 is read anew from disk for every version, never taken from the engine: what is served then depends on
the base and the last payload alone, and no rounding adds up over versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.lora.low_rank import ExactProduct, low_rank_delta
from actors.models.lora.pieces import Pieces, WeightRows, checkpoint_tensors
from actors.sync.payload import Payload, PayloadEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Targets = dict[str, dict[str, tuple[int, ...]]]
"""Name in a payload -> checkpoint tensors that it changes, with their shapes."""


class Merger:
    """Turns payloads into tensors with checkpoint names."""

    def __init__(self, base: BaseCheckpoint, config: Any, dtype: torch.dtype) -> None:
        """`config`: the base's transformers config; `dtype`: of the results."""
        from actors.models.architectures.meta_model import meta_model

        self._base = base
        self._dtype = dtype
        # Names and shapes alone: transformers' conversions need the model, not its weights.
        self._model = _with_conversions(meta_model(config))
        self._last: tuple[tuple[PayloadEntry, ...], Targets] = ((), {})
        self._pieces = Pieces(self._model)

    def targets(self, payload: Payload) -> Targets:
        """Checkpoint tensors that a payload changes, and the shape that it gives them."""
        entries = payload.manifest.entries
        if payload.manifest.payload == "merged":
            return {entry.name: {entry.name: entry.shape} for entry in entries}
        if entries == self._last[0]:
            return self._last[1]
        found: Targets = {}
        for name, f in payload.factors().items():
            delta = torch.empty(_delta_shape(f.a.shape, f.b.shape, f.transposed), device="meta")
            split = checkpoint_tensors(self._model, {name: delta})
            found[name] = {n: tuple(t.shape) for n, t in split.items()}
        self._last = entries, found
        return found

    def merged(self, payload: Payload, names: Sequence[str], targets: Targets) -> dict[str, torch.Tensor]:
        """These checkpoint tensors in the version that the payload brings, in the engine's dtype.

        Names that the payload doesn't change come from the base. The sum is in float32, rounded once, and
        taken where the payload is: on a GPU if it came over NCCL.
        """
        if payload.manifest.payload == "merged":
            sent = payload.tensors()
            return {n: sent[n, "W"] if (n, "W") in sent else self._unchanged(payload, n) for n in names}
        wanted = set(names)
        factors = payload.factors()
        touched = [name for name, of in targets.items() if wanted.intersection(of)]
        pieces: dict[str, tuple[ExactProduct, WeightRows]] = {}
        others: dict[str, torch.Tensor] = {}
        for name in touched:
            if found := self._pieces.of(name, factors[name]):
                product = ExactProduct(factors[name])
                pieces |= {there: (product, piece) for there, piece in found.items()}
            else:
                others[name] = low_rank_delta(factors[name])
        deltas = checkpoint_tensors(self._model, others)
        made = {}
        for n in names:
            base = self._rounded(payload, n)
            if n in pieces:
                product, piece = pieces[n]
                base = product.added_to(base, piece.expert, piece.rows)
            elif n in deltas:
                base = deltas[n].add_(base)
            made[n] = base.to(self._dtype)
        return made

    def _unchanged(self, payload: Payload, name: str) -> torch.Tensor:
        return self._rounded(payload, name).to(self._dtype)

    def _rounded(self, payload: Payload, name: str) -> torch.Tensor:
        """W0 as the trainer has it, where the payload is."""
        dtype: torch.dtype = getattr(torch, payload.manifest.base_dtype)
        return self._base.tensor(name).to(payload.buffer.device).to(dtype)


def _with_conversions(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose conversions transformers need not look up anew whenever it converts: 4 ms each time."""
    from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping

    found = get_model_conversion_mapping(model, add_legacy=False)
    # As transformers leaves them out for a model that it did not load.
    model._weight_conversions = [one for one in found if not isinstance(one, PrefixChange)] or None
    return model


def _delta_shape(a: torch.Size, b: torch.Size, transposed: bool) -> tuple[int, ...]:
    """Shape of B A for A ([experts,] r, in) and B ([experts,] out, r), as the weight is stored."""
    shape = (*b[:-1], a[-1])
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
