"""W0 + s B A from a base's files into new ones, a tensor at a time: no model is ever whole in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actors.errors import UserError
from actors.models.architectures.conversion import conversion_model
from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.lora.low_rank import Factors
from actors.models.lora.pieces import Pieces, checkpoint_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from actors.models.quantization.layout import Rounding


@dataclass
class Unchanged:
    """Adapted weights whose value is the base's own after rounding, by dtype."""

    dtypes: Collection[torch.dtype]
    """Each once."""
    adapted: int = 0
    same: dict[torch.dtype, int] = field(default_factory=dict)

    def count(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add one tensor's, both in float32."""
        self.adapted += before.numel()
        for dtype in self.dtypes:
            same = int((after.to(dtype) == before.to(dtype)).sum())
            self.same[dtype] = self.same.get(dtype, 0) + same

    def share(self, dtype: torch.dtype) -> float:
        return self.same.get(dtype, 0) / max(self.adapted, 1)


class FileMerge:
    """The merged tensors of a base's files and an adapter's factors."""

    def __init__(
        self,
        base: BaseCheckpoint,
        config: PretrainedConfig,
        factors: Mapping[str, Factors],
        dtype: torch.dtype,
    ) -> None:
        """`factors`: by name in the bare base in memory; `dtype`: of floating-point tensors that are made."""
        self._base, self._factors, self._dtype = base, factors, dtype
        self._model = conversion_model(config)

    @staticmethod
    def of(
        directory: Path,
        config: PretrainedConfig,
        factors: Mapping[str, Factors],
        dtype: torch.dtype,
        rounding: Rounding | None = None,
    ) -> FileMerge | None:
        """None where the files hold the adapted weights in another form than transformers writes: quantised,
        or under names of an older version. Only a loaded model knows then what they are.

        `rounding`: of an adapter that was trained on a quantised base.
        """
        try:
            merge = FileMerge(BaseCheckpoint(directory, rounding), config, factors, dtype)
        except UserError:
            return None
        shapes = merge._base.shapes
        targets = [checkpoint_shapes(merge._model, name, f) for name, f in factors.items()]
        fits = all(n in shapes and shapes[n].shape == shape for of in targets for n, shape in of.items())
        return merge if fits else None

    def outline(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> a tensor without storage, of the shape and dtype that it will have."""
        return {name: tensor.to(self._dtype_of(tensor)) for name, tensor in self._base.shapes.items()}

    def tensors(self, unchanged: Unchanged) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, under its checkpoint name: those of each adapted weight, then the rest.

        Sums are in float32 and rounded once.
        """
        left = set(self._base.shapes)
        pieces = Pieces(self._model)
        for name, factors in self._factors.items():
            for target, add in sorted(pieces.adding({name: factors}).items()):
                left.remove(target)
                before = self._base.tensor(target).float()
                after = add(before)
                unchanged.count(before, after)
                yield target, after.to(self._dtype)
            self._base.release()
        for name in sorted(left):
            tensor = self._base.tensor(name)
            yield name, tensor.to(self._dtype_of(tensor))
            self._base.release()

    def _dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        return self._dtype if tensor.is_floating_point() else tensor.dtype
