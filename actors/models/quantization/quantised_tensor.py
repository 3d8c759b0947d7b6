"""A frozen weight that is held in 4 or 8 bits, and is an ordinary tensor for whoever computes with it.

Every operation gets the dequantised weight, made for it and dropped after it: products forward and, as
autograd keeps the quantised tensor, backward again. Of a stack of experts one expert is dequantised where one
is asked for (`stack[e]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from actors.errors import InvariantViolation
from actors.models.quantization.codec import Codec, dequantise
from actors.models.spec import Quantization

aten = torch.ops.aten


class QuantisedTensor(Tensor):
    """A matrix (out, in) or a stack of matrices (experts, out, in). Made by `quantised`; never changed."""

    codec: Codec
    parts: tuple[Tensor, ...]
    """The codec's; each begins with the number of pieces."""
    piece: tuple[int, int]
    """Rows and columns of what was quantised as one: a matrix as a checkpoint holds it. The pieces of a
    weight are its rows in order."""
    turned: bool
    """It stands for the pieces with the last two dimensions swapped."""

    @staticmethod
    def __new__(
        cls: type[QuantisedTensor],
        codec: Codec,
        parts: Sequence[Tensor],
        piece: tuple[int, int],
        shape: Sequence[int],
        dtype: torch.dtype,
        turned: bool = False,
    ) -> QuantisedTensor:
        """`shape`, `dtype`: of the dequantised weight, before it is turned."""
        like = torch.empty(tuple(shape), dtype=dtype, device="meta")
        like = like.transpose(-2, -1) if turned else like
        made: QuantisedTensor = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=parts[0].device
        )
        made.codec, made.parts, made.piece, made.turned = codec, tuple(parts), piece, turned
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantisedTensor({self.codec.kind}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OWN.get(func)
        if own is not None and isinstance(args[0], QuantisedTensor):
            found = own(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        if func._schema.is_mutable and isinstance(args[0], QuantisedTensor):
            raise InvariantViolation(
                "quantised base", "update", f"{func} would change a weight that is frozen"
            )
        args, kwargs = tree_map_only(QuantisedTensor, plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantised(parts: Sequence[Tensor], codec: Codec, piece: tuple[int, int], like: Tensor) -> nn.Parameter:
    """A frozen weight of the shape and dtype of `like`, from the parts of its pieces."""
    tensor = QuantisedTensor(codec, parts, piece, like.shape, like.dtype)
    return nn.Parameter(tensor, requires_grad=False)


def plain(tensor: Tensor) -> Tensor:
    """The dequantised weight; a tensor that is not quantised is itself."""
    if not isinstance(tensor, QuantisedTensor):
        return tensor
    shape = _unturned_shape(tensor)
    made = dequantise(tensor.codec, tensor.parts, tensor.piece, tensor.dtype).view(shape)
    return made.transpose(-2, -1) if tensor.turned else made


def dequantise_all(model: nn.Module) -> None:
    """Put dequantised weights in place of all quantised ones of a model."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, QuantisedTensor):
                setattr(module, name, nn.Parameter(plain(parameter), requires_grad=False))


def held(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a weight's memory: the parts of one that is quantised, or itself."""
    return tensor.parts if isinstance(tensor, QuantisedTensor) else (tensor,)


def quantization_of(model: nn.Module) -> Quantization | None:
    """The codec of a model's base; None: it is not quantised."""
    found = (p.codec.kind for p in model.parameters() if isinstance(p, QuantisedTensor))
    return next(found, None)


def quantised_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes and weights of a model that are quantised, and bytes of all others."""
    parameters = list(model.parameters())
    small: Iterator[Tensor] = (p for p in parameters if isinstance(p, QuantisedTensor))
    sizes = [(sum(part.nbytes for part in held(p)), p.numel()) for p in small]
    others = sum(p.nbytes for p in parameters if not isinstance(p, QuantisedTensor))
    return sum(size for size, _ in sizes), sum(n for _, n in sizes), others


def _unturned_shape(tensor: QuantisedTensor) -> tuple[int, ...]:
    *experts, a, b = tensor.shape
    return (*experts, b, a) if tensor.turned else (*experts, a, b)


def _same(
    tensor: QuantisedTensor, parts: Sequence[Tensor] | None = None, turn: bool = False
) -> QuantisedTensor:
    shape, turned = _unturned_shape(tensor), tensor.turned != turn
    parts = tensor.parts if parts is None else parts
    return QuantisedTensor(tensor.codec, parts, tensor.piece, shape, tensor.dtype, turned)


def _copied(tensor: QuantisedTensor, dtype: Any = None, device: Any = None, **how: Any) -> Any:
    """`tensor.to(device)`; into another dtype it is dequantised."""
    if dtype not in (None, tensor.dtype):
        return NotImplemented
    return _same(tensor, [part.to(device, copy=True) for part in tensor.parts])


def _cloned(tensor: QuantisedTensor, **how: Any) -> QuantisedTensor:
    return _same(tensor, [part.clone() for part in tensor.parts])


def _transposed(tensor: QuantisedTensor, one: int, other: int) -> Any:
    last = {tensor.ndim - 1, tensor.ndim - 2}
    return _same(tensor, turn=True) if {one % tensor.ndim, other % tensor.ndim} == last else NotImplemented


def _selected(tensor: QuantisedTensor, dim: int, index: int) -> Any:
    """One expert of a stack, dequantised."""
    if tensor.ndim != 3 or dim != 0:
        return NotImplemented
    each = len(tensor.parts[0]) // len(tensor)
    first = index % len(tensor) * each
    parts = [part[first : first + each] for part in tensor.parts]
    made = dequantise(tensor.codec, parts, tensor.piece, tensor.dtype).view(_unturned_shape(tensor)[1:])
    return made.t() if tensor.turned else made


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _copied,
    aten.clone.default: _cloned,
    aten.t.default: lambda tensor: _same(tensor, turn=True),
    aten.transpose.int: _transposed,
    aten.select.int: _selected,
}
"""Operations that don't need the whole weight dequantised."""


def pieces_of(tensor: Tensor, rows: int) -> Tensor:
    """(pieces, rows, columns): a matrix or a stack, cut into pieces of so many rows."""
    return tensor.reshape(math.prod(tensor.shape[:-1]) // rows, rows, tensor.shape[-1])
