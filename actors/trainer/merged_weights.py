"""Merged weights of a model worker, a few groups at a time, and their digests, which an engine has to match.

Invariants: the model is never touched (merging is out of place); no more than what is asked for at once is
held; digests are taken of the merged tensors themselves, before anything packs them, so that a payload
that was packed wrongly can't agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import groupby

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.models.architectures.conversion import checkpoint_tensors
from actors.models.lora.low_rank import ExactProduct, Factors, low_rank_delta
from actors.models.lora.merge import base_tensors
from actors.models.lora.pieces import Pieces, WeightRows
from actors.models.parallel.fsdp import whole
from actors.models.quantization.quantised_tensor import plain
from actors.models.threads import each, one_thread
from actors.sync.digests import Algorithm, Digests
from actors.sync.payload import fused_groups_of, group_of
from actors.sync.protocol import Expected

COMPARED_AT_ONCE = 2**17
"""Elements: half a MiB in float32, which a core's cache holds."""


class Tally:
    """Digests and counts of a version, taken while it is merged, by any number of threads. A device is asked
    for them at the end."""

    def __init__(self, algorithm: Algorithm = "xxh3") -> None:
        self._digests = Digests(algorithm)
        self._compared: list[tuple[int, int | torch.Tensor]] = []
        """Of each adapted tensor: the number of its weights, and of those that rounding to bfloat16 makes
        others than the base's."""

    def take(self, name: str, merged: torch.Tensor) -> None:
        """Digest a tensor under its checkpoint name."""
        self._digests.take(name, merged)

    def compare(self, merged: torch.Tensor, base: torch.Tensor) -> None:
        """Count what rounding to bfloat16 leaves of an update."""
        if base.device.type == "cpu":
            self._compared.append((base.numel(), _differing_bfloat16(merged, base)))
            return
        changed = merged.bfloat16().view(torch.int16) != base.bfloat16().view(torch.int16)
        self._compared.append((base.numel(), changed.count_nonzero()))

    def expected(self) -> Expected:
        """Once all groups were merged."""
        adapted = sum(count for count, _ in self._compared)
        changed = int(sum(count for _, count in self._compared))
        share = (adapted - changed) / adapted if adapted else None
        return Expected(self._digests.read(), share, self._digests.algorithm)


class HostMerge:
    """W0 + s B A of every tensor of every group that an adapter touches; without adapter, all weights.

    With sharded weights `merged` is collective: every rank has to ask for the same names in the same order.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        factors: Mapping[str, Factors],
        dtype: str,
        leads: bool = True,
        pieces: Pieces | None = None,
    ) -> None:
        """`base`: the bare model; `dtype`: of the result; ranks that do not lead get nothing; `pieces`: of
        the model, where it is known from an earlier merge."""
        self._model, self._factors, self._leads = base, factors, leads
        self._pieces = pieces or Pieces(base)
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
        made: dict[str, torch.Tensor] = {}
        self._merge(names, tally, made)
        return made

    def outline(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Names, shapes and dtypes of what `merged` would give, on the meta device."""
        return checkpoint_tensors(
            self._model,
            {n: torch.empty(self._base[n].shape, dtype=self._dtype_of(n), device="meta") for n in names},
        )

    def tally(self, algorithm: Algorithm = "xxh3") -> Tally:
        """Of the whole version, merged for nothing else: a group at a time."""
        tally = Tally(algorithm)
        for names in self._groups():
            self._merge(names, tally, None)
        return tally

    def _groups(self) -> Iterator[list[str]]:
        for _, names in groupby(sorted(self.names, key=group_of), key=group_of):
            yield sorted(names)

    @torch.no_grad()
    def _merge(
        self, names: Sequence[str], tally: Tally | None, made: MutableMapping[str, torch.Tensor] | None
    ) -> None:
        """Put weights into `made` by checkpoint name; the tally takes each one while it is in the cache."""
        state = {}
        with one_thread() as threads:
            for name in names:
                tensor, factors = whole(self._base[name]), self._factors.get(name)
                if not self._leads:
                    continue
                if factors is None:
                    state[name] = plain(tensor).to(self._dtype_of(name))
                elif pieces := self._pieces.of(name, factors):
                    # Of a quantised stack each piece dequantises its expert.
                    tensor = tensor if tensor.ndim == 3 else plain(tensor)
                    self._merge_pieces(tensor, factors, pieces, tally, made, threads)
                else:
                    tensor = plain(tensor)
                    exact = low_rank_delta(factors).add_(tensor)
                    state[name] = self._rounded(exact, tensor, tally)
            for there, merged in checkpoint_tensors(self._model, state).items():
                if tally is not None:
                    tally.take(there, merged)
                if made is not None:
                    made[there] = merged

    def _merge_pieces(
        self,
        tensor: torch.Tensor,
        factors: Factors,
        pieces: Mapping[str, WeightRows],
        tally: Tally | None,
        made: MutableMapping[str, torch.Tensor] | None,
        threads: int,
    ) -> None:
        """The pieces of one weight: on a CPU several at a time, each on one thread."""
        product, names = ExactProduct(factors), list(pieces)
        found: list[torch.Tensor | None] = [None] * len(names)

        def merge(i: int) -> None:
            piece = pieces[names[i]]
            rows = piece.of(tensor)
            merged = self._rounded(product.added_to(rows, piece.expert, piece.rows), rows, tally)
            if tally is not None:
                tally.take(names[i], merged)
            if made is not None:
                found[i] = merged

        each(range(len(names)), merge, threads if tensor.device.type == "cpu" else 1)
        if made is not None:
            made.update((name, merged) for name, merged in zip(names, found) if merged is not None)

    def _rounded(self, exact: torch.Tensor, tensor: torch.Tensor, tally: Tally | None) -> torch.Tensor:
        merged = exact.to(self._dtype)
        if tally is not None:
            tally.compare(merged if merged.dtype == torch.bfloat16 else exact, tensor)
        return merged

    def _dtype_of(self, name: str) -> torch.dtype:
        tensor = self._base[name]
        return self._dtype if tensor.is_floating_point() else tensor.dtype


def _differing_bfloat16(one: torch.Tensor, other: torch.Tensor) -> int:
    """Elements that differ once they are rounded to bfloat16; both on the CPU.

    numpy compares bits and counts six times as fast as torch, which took a third of a merge.
    """
    count = 0
    for a, b in zip(one.reshape(-1).split(COMPARED_AT_ONCE), other.reshape(-1).split(COMPARED_AT_ONCE)):
        bits = (part.bfloat16().view(torch.int16).numpy() for part in (a, b))
        count += int(np.count_nonzero(np.not_equal(*bits)))
    return count
