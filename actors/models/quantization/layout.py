"""Weights of a base that are quantised, in memory and in its files.

Linear layers of the decoder's layers and stacks of experts. Not embeddings, the output head, norms, biases
and routers: together a few percent of the weights of a mixture of experts. Known from the config alone, so
that whoever reads the base's files finds the same weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from actors.errors import UserError
from actors.models.architectures.conversion import checkpoint_tensors, conversion_model, row_numbers
from actors.models.architectures.lookup import architecture_of
from actors.models.architectures.meta_model import meta_model
from actors.models.quantization.codec import codec_of, rounded
from actors.models.spec import Quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NUMBER = re.compile(r"\.\d+\.")
"""Of a layer, the first in a name."""
SMALLEST_SIDE = 32
"""Rows and columns of a weight that is worth it: gates of single rows are not."""


@dataclass(frozen=True)
class QuantisedMatrices:
    """A weight that is quantised."""

    names: tuple[str, ...]
    """In a checkpoint: matrices, or one stack of matrices."""
    shape: tuple[int, int]
    """Of each matrix in the checkpoint, which is quantised by itself. The weight in memory is such matrices,
    one below the other."""


def quantised_places(config: PretrainedConfig, kind: Quantization) -> dict[str, QuantisedMatrices]:
    """Name in the bare base in memory -> its place, of every weight that is quantised.

    Raises:
        UserError: the architecture has weights that can't be.
    """
    model = conversion_model(config)
    row = architecture_of(config)
    if row.is_moe and not row.grouped_experts:
        raise UserError(
            f"model.quantization: the experts of a {config.model_type} model are no stacks that transformers "
            "runs by a grouped product, so they would stay as they are; leave it out"
        )
    codec = codec_of(kind)
    places: dict[str, QuantisedMatrices] = {}
    of_layer: dict[tuple[str, torch.Size], tuple[str, QuantisedMatrices]] = {}
    """Places in the first layer that has such a weight; other layers differ in their number."""
    for name, weight in _weights(model):
        alike = NUMBER.sub(".N.", name, count=1), weight.shape
        if alike not in of_layer:
            of_layer[alike] = _number(name), _place(model, name, weight)
        number, place = of_layer[alike]
        names = (there.replace(number, _number(name), 1) for there in place.names)
        places[name] = QuantisedMatrices(tuple(names), place.shape)
    return {name: place for name, place in places.items() if codec.takes(place.shape)}


@dataclass(frozen=True)
class Sizes:
    """Memory of a quantised base, without what training adds."""

    weights: int
    """Weights that are quantised."""
    weights_bytes: int
    others: int
    """Weights that stay in the base's dtype."""
    others_bytes: int

    def __str__(self) -> str:
        each, small, rest = self.weights_bytes / self.weights, self.weights_bytes, self.others_bytes
        return (
            f"{self.weights / 1e9:.3g} B weights in {small / 1e9:.3g} GB ({each:.3f} bytes each), the other "
            f"{self.others / 1e9:.3g} B in {rest / 1e9:.3g} GB"
        )


def quantised_sizes(config: PretrainedConfig, kind: Quantization, dtype: torch.dtype) -> Sizes:
    """Sizes of a base, from its config alone. `dtype`: of what is not quantised.

    Raises:
        UserError: as `quantised_places`.
    """
    model, codec = meta_model(config), codec_of(kind)
    weights = {name: parameter.numel() for name, parameter in model.named_parameters()}
    places = quantised_places(config, kind)
    quantised = sum(weights[name] for name in places)
    small = sum(
        weights[name] // math.prod(place.shape) * codec.nbytes(place.shape) for name, place in places.items()
    )
    others = sum(weights.values()) - quantised
    return Sizes(quantised, small, others, others * dtype.itemsize)


class Rounding:
    """The weights that a base's quantised tensors have after quantising and back, by names in its files."""

    def __init__(self, kind: Quantization, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """`dtype`: in which the base is computed with.

        Raises:
            UserError: as `quantised_places`.
        """
        self.kind, self.dtype = kind, dtype
        self._config, self._codec = config, codec_of(kind)

    @cached_property
    def names(self) -> frozenset[str]:
        """Of quantised tensors in a checkpoint."""
        places = quantised_places(self._config, self.kind)
        return frozenset(name for place in places.values() for name in place.names)

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The weights in `dtype`; a tensor that is not quantised is itself."""
        return rounded(self._codec, tensor).to(self.dtype) if name in self.names else tensor


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    routers = _router_suffixes(model)
    for path, module in model.named_modules():
        stacked = "_is_expert_parallel" in module.__dict__
        if not (stacked or type(module) is nn.Linear) or module is model.get_output_embeddings():
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            fits = weight.ndim == (3 if stacked else 2) and min(weight.shape[-2:]) >= SMALLEST_SIDE
            if fits and not any(f".{name}".endswith(suffix) for suffix in routers):
                yield name, weight


def _number(name: str) -> str:
    found = NUMBER.search(name)
    return found.group() if found else ""


def _router_suffixes(model: PreTrainedModel) -> list[str]:
    row = architecture_of(model.config)
    names = [*row.parameters.get("router", ()), *(f"{n}.weight" for n in row.modules.get("router", ()))]
    names += [] if row.router is None else [f"{row.router.module}.weight"]
    return [f".{name}" for name in names]


def _place(model: PreTrainedModel, name: str, weight: torch.Tensor) -> QuantisedMatrices:
    """Where rows of a weight go in a checkpoint, found by sending their numbers there."""
    *experts, rows, _ = weight.shape
    there = checkpoint_tensors(model, {name: row_numbers(experts, rows)})
    numbers = torch.cat([found.reshape(-1, found.shape[-1]) for found in there.values()])
    each = {found.shape[-2] for found in there.values()}
    matrices = [matrix for found in there.values() for matrix in found.reshape(-1, *found.shape[-2:])]
    whole = numbers.shape[1] == 2 and len(numbers) == rows * (experts[0] if experts else 1)
    if len(each) != 1 or not whole or not all(_in_order(matrix) for matrix in matrices):
        raise UserError(
            f"model.quantization: {name} of a {model.config.model_type} model is stored in another form than "
            "rows of it, so what is quantised could not be found in the base's files; leave it out"
        )
    return QuantisedMatrices(tuple(there), (each.pop(), weight.shape[-1]))


def _in_order(numbers: torch.Tensor) -> bool:
    """True for a checkpoint's matrix that is rows of a weight, cut at a multiple of their count."""
    first = int(numbers[0, 0])
    wanted = first + torch.arange(len(numbers), device="cpu")[:, None].expand(-1, 2)
    return first % len(numbers) == 0 and torch.equal(numbers, wanted)
