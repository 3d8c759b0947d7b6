"""A base's files, read by transformers one decoder layer after the other.

transformers (5.19) hands all tensors of a base to its threads at once, and makes weights of them in turn: out
of many experts one stack, for example. The threads run ahead. What they copy, into another dtype or onto
another device, lies beside what is made of it: up to a second base. Of one layer at a time it is a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from actors.models.freed_memory import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ELEMENTS_AT_ONCE = 2**25
"""Of tensors that are read before what that took is given back: 128 MiB in float32. After each layer of 6 M
elements it took a third more CPU time."""
_LAYER = re.compile(r"^(.*?\.\d+)\.")

Value = TypeVar("Value")


def layer_of(name: str) -> str:
    """The decoder layer that a weight is of, by its name in a model or a checkpoint; "": it is in none."""
    found = _LAYER.match(name)
    return found.group(1) if found else ""


def by_layer(values: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Values by name, in groups of one layer each, in their order."""
    layers: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        layers.setdefault(layer_of(name), {})[name] = value
    return layers


Load = Callable[..., tuple[Any, Any]]
"""transformers' `PreTrainedModel._load_pretrained_model`, or what takes its place."""


def loading_by_layer(load_all: Load) -> Load:
    """`load_all`, called with a layer at a time."""

    def load(
        model: PreTrainedModel,
        state_dict: Mapping[str, Any] | None,
        files: Sequence[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> tuple[Any, Any]:
        if state_dict is not None or not files or load_config.hf_quantizer or load_config.disable_mmap:
            return load_all(model, state_dict, files, load_config, expected_keys)
        found, elements = None, 0
        with ExitStack() as opened:
            for layer in by_layer(slices(files, opened)).values():
                # Room on a device is asked for once, by the names that are expected: that of all.
                keys = expected_keys if found is None else []
                one, _ = load_all(model, layer, None, load_config, keys)
                found = one if found is None else _joined(found, one)
                elements += sum(math.prod(tensor.get_shape()) for tensor in layer.values())
                if elements > ELEMENTS_AT_ONCE:
                    give_back()
                    elements = 0
        give_back()
        return found, None

    return load


class LayersLater:
    """`load_all`, called with what lies outside of the layers; these can be loaded later, in any order."""

    def __init__(self, load_all: Load) -> None:
        self._load_all = load_all
        self._files: Sequence[str] = ()
        self._config: Any = None

    def __call__(
        self,
        model: PreTrainedModel,
        state_dict: None,
        files: Sequence[str],
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> tuple[Any, Any]:
        self._files, self._config = files, load_config
        with ExitStack() as opened:
            rest = by_layer(slices(files, opened)).get("", {})
            found, _ = self._load_all(model, rest, None, load_config, expected_keys)
        # Else transformers would make and fill what it takes for missing.
        found.missing_keys = {name for name in found.missing_keys if not layer_of(name)}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if layer_of(name):
                tensor._is_hf_initialized = True
        return found, None

    def load(self, model: PreTrainedModel, number: int) -> None:
        """Give a layer's modules, counted from 0, their weights. Nothing of the files stays open."""
        with ExitStack() as opened:
            layers = by_layer(slices(self._files, opened))
            layer = [tensors for name, tensors in layers.items() if name.endswith(f".{number}")]
            for tensors in layer:
                self._load_all(model, tensors, None, self._config, [])


def slices(files: Sequence[str], opened: ExitStack) -> dict[str, Any]:
    """Name -> what reads a tensor, or a slice of it, when it is asked to."""
    from safetensors import safe_open

    found = {}
    for path in files:
        file = opened.enter_context(safe_open(path, framework="pt"))
        found.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118  it is no dict
    return found


def _joined(one: Any, other: Any) -> Any:
    """transformers' account of two groups of tensors: what neither had is missing."""
    one.missing_keys &= other.missing_keys
    for names in ("unexpected_keys", "mismatched_keys", "skipped_pp_keys"):
        getattr(one, names).update(getattr(other, names))
    one.error_msgs += other.error_msgs
    one.conversion_errors.update(other.conversion_errors)
    return one
