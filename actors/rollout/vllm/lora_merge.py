"""New weights in the engine's process: W0 + s B A, from the base's files, under checkpoint names.

W0 is read anew from disk for every version, never taken from the engine: what is served then depends on
the base and the last payload alone, and no rounding adds up over versions. Of a quantised base it is
quantised and dequantised anew, by the trainer's codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from actors.models.architectures.conversion import conversion_model
from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.lora.pieces import Pieces, checkpoint_shapes
from actors.models.threads import each
from actors.sync.payload import Payload, PayloadEntry

Targets = dict[str, dict[str, tuple[int, ...]]]
"""Name in a payload -> checkpoint tensors that it changes, with their shapes."""


class Merger:
    """Turns payloads into tensors with checkpoint names."""

    def __init__(self, base: BaseCheckpoint, config: Any, dtype: torch.dtype) -> None:
        """`config`: the base's transformers config; `dtype`: of the results."""
        self._base = base
        self._dtype = dtype
        self._model = conversion_model(config)
        self._last: tuple[tuple[PayloadEntry, ...], Targets] = ((), {})
        self._pieces = Pieces(self._model)

    def targets(self, payload: Payload) -> Targets:
        """Checkpoint tensors that a payload changes, and the shape that it gives them."""
        entries = payload.manifest.entries
        if payload.manifest.payload == "merged":
            return {entry.name: {entry.name: entry.shape} for entry in entries}
        if entries == self._last[0]:
            return self._last[1]
        found = {name: checkpoint_shapes(self._model, name, f) for name, f in payload.factors().items()}
        self._last = entries, found
        return found

    def merged(
        self, payload: Payload, names: Sequence[str], targets: Targets, threads: int = 1
    ) -> dict[str, torch.Tensor]:
        """These checkpoint tensors in the version that the payload brings, in the engine's dtype.

        Names that the payload doesn't change come from the base. The sum is in float32, rounded once, and
        taken where the payload is: on a GPU if it came over NCCL; on a CPU `threads` tensors at a time.
        """
        if payload.manifest.payload == "merged":
            sent = payload.tensors()
            return {n: sent[n, "W"] if (n, "W") in sent else self._unchanged(payload, n) for n in names}
        wanted = set(names)
        factors = payload.factors()
        touched = {name: factors[name] for name, of in targets.items() if wanted.intersection(of)}
        adding = self._pieces.adding(touched)
        made: dict[str, torch.Tensor] = {}

        def merge(i: int) -> None:
            name, base = names[i], self._rounded(payload, names[i])
            made[name] = (adding[name](base) if name in adding else base).to(self._dtype)

        each(range(len(names)), merge, threads if payload.buffer.device.type == "cpu" else 1)
        return {name: made[name] for name in names}

    def _unchanged(self, payload: Payload, name: str) -> torch.Tensor:
        return self._rounded(payload, name).to(self._dtype)

    def _rounded(self, payload: Payload, name: str) -> torch.Tensor:
        """W0 as the trainer has it, where the payload is."""
        dtype: torch.dtype = getattr(torch, payload.manifest.base_dtype)
        return self._base.tensor(name, payload.buffer.device).to(dtype)
