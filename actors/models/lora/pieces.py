"""Places of checkpoint tensors in a model's weights, where they are rows of these: then a merge can be taken
tensor by tensor, and nothing has to be cut and copied afterwards.

transformers keeps the experts of a layer in one tensor, and cuts it up for a checkpoint. Its rules are not
written down here a second time: numbers of rows are sent through them (`architectures.conversion`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from actors.models.architectures.conversion import checkpoint_tensors, row_numbers
from actors.models.lora.low_rank import ExactProduct, Factors, low_rank_delta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WeightRows:
    """Rows of an adapted weight that are one tensor in a checkpoint."""

    expert: int | None
    """None: the weight is no stack of experts."""
    rows: slice
    """Of B, and of the weight or the expert."""

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """These rows."""
        return (weight if self.expert is None else weight[self.expert])[self.rows]


class Pieces:
    """Pieces of a model's weights; each weight is looked at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: dict[str, dict[str, WeightRows]] = {}

    def of(self, name: str, factors: Factors) -> dict[str, WeightRows]:
        """Checkpoint name -> its rows of the adapted weight `name` in memory. Empty: it is not cut into rows
        of single experts, but kept whole, turned round or put together anew."""
        if name not in self._known:
            self._known[name] = {} if factors.transposed else self._find(name, factors)
        return self._known[name]

    def adding(self, factors: Mapping[str, Factors]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Checkpoint name -> what makes W0 + s B A of W0, in float32 and once; of all that these adapted
        weights are in a checkpoint."""
        found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        whole: dict[str, torch.Tensor] = {}
        for name, one in factors.items():
            pieces = self.of(name, one)
            if not pieces:
                whole[name] = low_rank_delta(one)
                continue
            product = ExactProduct(one)
            for there, piece in pieces.items():
                found[there] = partial(product.added_to, expert=piece.expert, rows=piece.rows)
        return found | {there: delta.add_ for there, delta in checkpoint_tensors(self._model, whole).items()}

    def _find(self, name: str, factors: Factors) -> dict[str, WeightRows]:
        *experts, out, _ = factors.b.shape
        count = out * (experts[0] if experts else 1)
        cut = checkpoint_tensors(self._model, {name: row_numbers(experts, out)})
        pieces = {there: _piece(rows, out, bool(experts)) for there, rows in cut.items()}
        found = {there: piece for there, piece in pieces.items() if piece is not None}
        whole = sum(piece.rows.stop - piece.rows.start for piece in found.values()) == count
        return found if whole and len(found) == len(pieces) else {}


def checkpoint_shapes(model: PreTrainedModel, name: str, factors: Factors) -> dict[str, tuple[int, ...]]:
    """Shapes of what the adapted weight `name` is in a checkpoint, by their names there."""
    weight = torch.empty(factors.shape, device="meta")
    return {there: tuple(one.shape) for there, one in checkpoint_tensors(model, {name: weight}).items()}


def _piece(numbers: torch.Tensor, out: int, stacked: bool) -> WeightRows | None:
    """`numbers`: of the rows that a checkpoint tensor has, (rows, 2) where it can be a piece."""
    if numbers.ndim != 2 or numbers.shape[1] != 2:
        return None
    in_order = numbers[0, 0] + torch.arange(len(numbers))[:, None].expand(-1, 2)
    if not torch.equal(numbers, in_order):
        return None
    expert, first = divmod(int(numbers[0, 0]), out)
    rows = slice(first, first + len(numbers))
    return WeightRows(expert if stacked else None, rows) if rows.stop <= out else None
