"""Readback: the values of an engine's parameters, cut back into checkpoint tensors.

A parameter is read when vLLM hands it to its kernels: on the CPU linear layers and experts keep only a
packed copy after that. Its digest is compared with that of what was handed to the loaders, and goes to the
trainer's side, where it is compared with that of another merge. Values stay on their device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from actors.rollout.vllm.parameter_map import Bindings, Piece, Region
from actors.sync.digests import Algorithm, Digests


class Reader:
    """Reads back the modules that one update reloads."""

    def __init__(self, bindings: Bindings, algorithm: Algorithm = "xxh3") -> None:
        self._bindings = bindings
        self._bound, self._loaded = Digests(algorithm), Digests(algorithm)
        self._handed: dict[str, torch.Tensor] = {}
        self._hooked: list[tuple[nn.Module, str]] = []
        self._then: Callable[[nn.Module], object] = lambda module: None
        self.digests: dict[str, str] = {}
        """Of what was read, by checkpoint name."""
        self.differing: list[str] = []
        """Names whose bound values are not those that were handed over."""

    def watch(self, modules: Mapping[str, nn.Module], then: Callable[[nn.Module], object]) -> None:
        """Read each module when its kernel takes its weights; `then` is called when it has taken them."""
        self._then = then
        for path, module in modules.items():
            if _method(module) is not None:
                read = partial(self._read, path, module)
                _hook(module, read, partial(then, module))
                self._hooked.append((module, path))

    def hand(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Say what is about to be loaded."""
        self._handed.update(tensors)
        # Now, while they are in the cache.
        for name, tensor in tensors.items():
            self._loaded.take(name, tensor)

    def finish(self, modules: Mapping[str, nn.Module]) -> None:
        """Stop watching, read the modules that have no kernel, and see what is there."""
        hooked = {path for _, path in self._hooked}
        self.release()
        for path, module in modules.items():
            if path not in hooked:
                self._read(path, module)
                self._then(module)
        self.digests, loaded = self._bound.read(), self._loaded.read()
        self.differing = [name for name, digest in self.digests.items() if digest != loaded[name]]

    def release(self) -> None:
        """Stop watching."""
        while self._hooked:
            module, _ = self._hooked.pop()
            _unhook(module)

    @property
    def unbound(self) -> Iterable[str]:
        """Names that were handed over and not read."""
        return self._handed.keys()

    def _read(self, path: str, module: nn.Module) -> None:
        for name, pieces in self._bindings[path].items():
            handed = self._handed.pop(name, None)
            if handed is None:
                continue
            self._bound.take(name, _found(module, pieces, handed))


def _found(module: nn.Module, pieces: Sequence[Piece], handed: torch.Tensor) -> torch.Tensor:
    """Values that a module holds of a checkpoint tensor."""
    views = [piece.target.view(getattr(module, piece.parameter).data) for piece in pieces]
    whole = Region(tuple(handed.shape), handed.contiguous().stride(), 0)
    same = [(view.shape, view.dtype) for view in views] == [(handed.shape, handed.dtype)]
    if same and pieces[0].source == whole:
        return views[0]
    # Under tensor parallelism this process holds a part; the rest counts as it was handed over.
    found = torch.empty(handed.shape, dtype=handed.dtype, device=views[0].device).copy_(handed)
    for piece, view in zip(pieces, views):
        piece.source.view(found).copy_(view)
    return found


def _method(module: nn.Module) -> Any:
    """vLLM's object that hands a layer's weights to a kernel, or None."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    method = getattr(module, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def _hook(module: nn.Module, read: Callable[[], None], then: Callable[[], object]) -> None:
    method = _method(module)
    process = method.process_weights_after_loading

    def read_then_process(layer: nn.Module) -> None:
        if layer is module:
            read()
        process(layer)
        if layer is module:
            then()

    method.__dict__["process_weights_after_loading"] = read_then_process


def _unhook(module: nn.Module) -> None:
    _method(module).__dict__.pop("process_weights_after_loading", None)
