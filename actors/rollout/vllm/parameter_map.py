"""Map from checkpoint tensors to the parts of engine parameters that hold them, learnt from vLLM's loaders.

vLLM's loaders rename, cut and fuse. Their rules are not written down here a second time: every loader is
run once on tensors without storage, and the copies that it makes are noted. From these follow what has to
be loaded together, what binds to nothing, and how to cut a fused parameter back into checkpoint tensors.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from actors.errors import UserError
from actors.rollout.vllm.workarounds.registry import LEANT_ON


@dataclass(frozen=True)
class Region:
    """A part of a tensor, as `torch.as_strided` takes it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(view: torch.Tensor) -> Region:
        """Place of a view in its storage."""
        return Region(tuple(view.shape), view.stride(), int(view.storage_offset()))

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a contiguous tensor."""
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.offset)


@dataclass(frozen=True)
class Piece:
    """One copy that a loader makes."""

    parameter: str
    source: Region
    """In the checkpoint tensor."""
    target: Region
    """In the parameter."""


Bindings = dict[str, dict[str, list[Piece]]]
"""Module -> checkpoint tensors that it is made of -> their copies. A module is what vLLM reloads as a whole:
all of its tensors have to be loaded together."""


def record_bindings(
    model: nn.Module, model_config: Any, tensors: Mapping[str, torch.Tensor]
) -> tuple[Bindings, dict[str, int]]:
    """Bindings of checkpoint tensors (without storage, by name) in a vLLM model, which is left as it was.

    Returns:
        The bindings, and for each checkpoint tensor how many of its elements find a place in this process
        (fewer than it has under tensor parallelism).

    Raises:
        UserError: a loader computes with a tensor before it copies it, so that it can't be read back.
        RunFailure: the installed vLLM is another one than this was written for.
    """
    LEANT_ON["recorded_loads"].check()
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    recorder = _Recorder({t.untyped_storage()._cdata: name for name, t in tensors.items()})
    with without_reload_warnings():
        initialize_layerwise_reload(model)
        try:
            with contextlib.ExitStack() as recording:
                for path, module in model.named_modules():
                    _record_loads(path, module, recorder, recording)
                model.load_weights((n, t) for n, t in tensors.items() if _is_reloaded(n))
        finally:
            finalize_layerwise_reload(model, model_config)
    elements: dict[str, int] = dict.fromkeys(tensors, 0)
    for pieces in recorder.bindings.values():
        for name, copies in pieces.items():
            elements[name] += sum(math.prod(copy.source.shape) for copy in copies)
    return recorder.bindings, elements


@contextlib.contextmanager
def without_reload_warnings() -> Iterator[None]:
    """vLLM warns of every layer that a partial reload leaves alone; what was bound is counted instead."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    # A change of level would clear the caches of every logger: 1.2 ms.
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


class _Recorder(TorchDispatchMode):
    """Notes copies out of known tensors while a loader runs."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.bindings: Bindings = {}
        self._names = names
        self._place = ("", "")

    def at(self, module: str, parameter: str) -> _Recorder:
        """For the loader that runs next."""
        self._place = (module, parameter)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, target: torch.Tensor, source: torch.Tensor) -> None:
        module, parameter = self._place
        name = self._names.get(source.untyped_storage()._cdata)
        if name is None:
            raise UserError(
                f"model.base: vLLM computes with a tensor of {module}.{parameter} while loading it, so a "
                "weight sync can't be proved for this architecture"
            )
        piece = Piece(parameter, Region.of(source), Region.of(target))
        self.bindings.setdefault(module, {}).setdefault(name, []).append(piece)


def _record_loads(path: str, module: nn.Module, recorder: _Recorder, until: contextlib.ExitStack) -> None:
    """Let a module's loaders be noted until the stack is left: vLLM keeps these tensors for its reloads."""
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

    for name, tensor in get_layer_tensors(module).items():
        if name not in SKIP_LOAD_TENSORS:
            until.callback(setattr, tensor, "weight_loader", tensor.weight_loader)
            tensor.weight_loader = _recording(tensor, _get_original_loader(tensor), recorder, path, name)


def _is_reloaded(name: str) -> bool:
    """vLLM's reload leaves a few tensors (biases of routers) as they are."""
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS

    return name.rpartition(".")[2] not in SKIP_LOAD_TENSORS


def _recording(
    tensor: torch.Tensor, loader: Callable[..., Any], recorder: _Recorder, path: str, name: str
) -> Callable[..., Any]:
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    # vLLM leaves biases where they are; nothing must be copied into those.
    bare = tensor if tensor.is_meta else to_meta_tensor(tensor)

    @wraps(loader, assigned=("__doc__", "__annotations__"))
    def recording(*args: Any, **kwargs: Any) -> Any:
        args = tuple(bare if value is tensor else value for value in args)
        kwargs = {key: bare if value is tensor else value for key, value in kwargs.items()}
        with recorder.at(path, name):
            return loader(*args, **kwargs)

    return recording
