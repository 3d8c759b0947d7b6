"""Merged weights of a model worker, a few groups at a time, and their digests, which an engine has to match.

Invariants: the model is never touched (merging is out of place); no more than what is asked for at once is
held; digests are taken of the merged tensors themselves, before anything packs them, so that a payload
that was packed wrongly can't agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedModel

from actors.models.lora.low_rank import Factors, low_rank_delta
from actors.models.lora.merge import base_tensors
from actors.models.parallel.fsdp import whole
from actors.sync.digests import Algorithm, Digests
from actors.sync.payload import fused_groups_of, group_of
from actors.sync.protocol import Expected


class Tally:
    """Digests and counts of a version, taken while it is merged. A device is asked for them at the end."""

    def __init__(self, algorithm: Algorithm = "xxh3") -> None:
        self._digests = Digests(algorithm)
        self._changed: list[torch.Tensor] = []
        """Of each adapted tensor: weights that rounding to bfloat16 does not give the base's own value."""
        self._adapted = 0

    def take(self, name: str, merged: torch.Tensor) -> None:
        """Digest a tensor under its checkpoint name."""
        self._digests.take(name, merged)

    def compare(self, merged: torch.Tensor, base: torch.Tensor) -> None:
        """Count what rounding to bfloat16 leaves of an update."""
        # Comparing bits and counting is three times as fast as comparing numbers and adding up.
        changed = merged.bfloat16().view(torch.int16) != base.bfloat16().view(torch.int16)
        self._changed.append(changed.count_nonzero())
        self._adapted += base.numel()

    def expected(self) -> Expected:
        """Once all groups were merged."""
        changed = int(torch.stack(self._changed).sum()) if self._changed else 0
        share = (self._adapted - changed) / self._adapted if self._adapted else None
        return Expected(self._digests.read(), share, self._digests.algorithm)


class HostMerge:
    """W0 + s B A of every tensor of every group that an adapter touches; without adapter, all weights.

    With sharded weights `merged` is collective: every rank has to ask for the same names in the same order.
    """

    def __init__(
        self, base: PreTrainedModel, factors: Mapping[str, Factors], dtype: str, leads: bool = True
    ) -> None:
        """`base`: the bare model; `dtype`: of the result; ranks that do not lead get nothing."""
        self._model, self._factors, self._leads = base, factors, leads
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._base = base_tensors(base)
        self.names = fused_groups_of(factors or self._base, self._base)
        """In the bare base in memory."""

    def parts(self, limit_bytes: int | None = None) -> list[list[str]]:
        """All names in parts of at most so many bytes, or of one group where that is larger."""
        made: list[list[str]] = [[]]
        size = 0
        for names in self._groups():
            more = sum(self._base[name].numel() * self._dtype_of(name).itemsize for name in names)
            if limit_bytes is not None and made[-1] and size + more > limit_bytes:
                made.append([])
                size = 0
            made[-1] += names
            size += more
        return made

    def merged(self, names: Sequence[str], tally: Tally | None = None) -> dict[str, torch.Tensor]:
        """These weights (whole groups), under their checkpoint names."""
        state = {}
        with torch.no_grad():
            for name in names:
                tensor = whole(self._base[name])
                if self._leads:
                    state[name] = self._merge(name, tensor, tally)
        found = self._reverted(state)
        if tally is not None:
            for name, tensor in found.items():
                tally.take(name, tensor)
        return found

    def outline(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Names, shapes and dtypes of what `merged` would give, on the meta device."""
        return self._reverted(
            {n: torch.empty(self._base[n].shape, dtype=self._dtype_of(n), device="meta") for n in names}
        )

    def tally(self, algorithm: Algorithm = "xxh3") -> Tally:
        """Of the whole version, merged for nothing else: a group at a time."""
        tally = Tally(algorithm)
        for names in self._groups():
            self.merged(names, tally)
        return tally

    def _groups(self) -> Iterator[list[str]]:
        for _, names in groupby(sorted(self.names, key=group_of), key=group_of):
            yield sorted(names)

    def _merge(self, name: str, tensor: torch.Tensor, tally: Tally | None) -> torch.Tensor:
        factors = self._factors.get(name)
        if factors is None:
            return tensor.to(self._dtype_of(name))
        exact = low_rank_delta(factors).add_(tensor)
        merged = exact.to(self._dtype)
        if tally is not None:
            tally.compare(merged if merged.dtype == torch.bfloat16 else exact, tensor)
        return merged

    def _dtype_of(self, name: str) -> torch.dtype:
        tensor = self._base[name]
        return self._dtype if tensor.is_floating_point() else tensor.dtype

    def _reverted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, torch.Tensor] = revert_weight_conversion(self._model, state) if state else {}
        return found
