"""A second device that any machine has: tensors that say they are elsewhere, obey torch's rule that operands
are on one device, and hold real values, so that results can be compared bit by bit.

It stands for CUDA in tests of code that meets tensors of a GPU and of the CPU. torch asks for a driver as
soon as one says `cuda`, so they say `xla`, whose backend nobody initialises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xla:0")
_MOVES = ("copy_", "to", "cpu")
_READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
_to_host: list[list[int]] = []
"""Of each `second_device` that is open."""


class There(torch.Tensor):
    """A tensor on `DEVICE`; its values are in `here`."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made: There = torch.Tensor._make_subclass(cls, here)  # type: ignore[attr-defined]
        made.here = here
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE
        if name == "numpy":
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; use Tensor.cpu()")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name not in _MOVES and any(not isinstance(one, There) and one.ndim for one in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE}, cpu")
        stays = name not in ("cpu", *_READS)
        if name == "to" and (asked := [a for a in (*args, *kwargs.values()) if _is_device(a)]):
            stays = torch.device(asked[0]).type == DEVICE.type
            args = tuple(torch.device("cpu") if _is_device(a) else a for a in args)
            kwargs = {k: torch.device("cpu") if _is_device(v) else v for k, v in kwargs.items()}
        if not stays or (name == "copy_" and not isinstance(args[0], There)):
            copied = args[1] if name == "copy_" else args[0]
            for sizes in _to_host:
                sizes.append(copied.here.nbytes)
        found = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if found is None or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
            # In place, for a tensor of either device.
            return kwargs.get("out", args[0] if args else None) if found is not None else None
        return tree_map(lambda one: There(one) if stays and isinstance(one, torch.Tensor) else one, found)


class _Making(TorchFunctionMode):
    """What is made on `DEVICE`, or moved there, is made here and says so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
        asked = [a for a in (*args, *kwargs.values()) if _is_device(a) and str(a).startswith(DEVICE.type)]
        if own or not asked:
            return func(*args, **kwargs)
        args = tuple(torch.device("cpu") if _is_device(a) else a for a in args)
        kwargs = {k: torch.device("cpu") if _is_device(v) else v for k, v in kwargs.items()}
        return tree_map(
            lambda one: There(one) if isinstance(one, torch.Tensor) else one, func(*args, **kwargs)
        )


@contextmanager
def second_device() -> Iterator[list[int]]:
    """Tensors may be made on `DEVICE` and moved there meanwhile. Noted is what is copied from there to the
    CPU, or read as a number: bytes of each tensor."""
    sizes: list[int] = []
    _to_host.append(sizes)
    try:
        with _Making():
            yield sizes
    finally:
        _to_host.remove(sizes)


def _is_device(one: Any) -> bool:
    return isinstance(one, torch.device) or (isinstance(one, str) and one.partition(":")[0] in ("cpu", "xla"))


def _values(one: Any) -> Any:
    return one.here if isinstance(one, There) else one
