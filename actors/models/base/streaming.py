"""A base of which one decoder layer is in memory at a time; the others are on disk until they run.

For a few passes over a few tokens, where all weights at once are more than is wanted: every pass reads each
layer anew. What it computes is, to the bit, what the base computes that is loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actors.models.architectures.meta_model import meta_model
from actors.models.base.loading import finished, load_base, loading_arguments, no_progress_bars
from actors.models.base.mxfp4 import is_mxfp4
from actors.models.base.resolving import resolve_base
from actors.models.parallel.by_layer import LayersLater, Load
from actors.models.parallel.partial_loading import load_divided

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from actors.models.spec import ModelSpec

Change = Callable[[Tensor], Tensor]


def stream_base(spec: ModelSpec, change: Change = lambda tensor: tensor) -> PreTrainedModel:
    """The base as `load_base` gives it on the CPU, with layers that have no storage but while they run.

    Adapters can be attached. `change`: of every weight when it is read. A base in MXFP4 is dequantised as a
    whole, and so is whole in memory.

    Raises:
        UserError: the base can't be found, is no causal LM, or is an architecture without a row.
    """
    resolved = resolve_base(spec).checked()
    assert resolved.config is not None
    if is_mxfp4(resolved.config):
        whole = load_base(spec)
        _change_all(whole, change)
        return whole
    how = loading_arguments(spec, resolved.config)
    # transformers puts weights in by name, and PEFT gives those of the model itself others.
    source = meta_model(resolved.config, **how)
    later: list[LayersLater] = []

    def loading(load_all: Load) -> Load:
        later.append(LayersLater(load_all))
        return later[0]

    with no_progress_bars():
        model = load_divided(type(source), resolved.base_path, lambda model: None, "cpu", how, loading)
    _change_all(model, change)
    for number, (layer, of_source) in enumerate(zip(_layers_of(model), _layers_of(source), strict=True)):
        streamed = _StreamedLayer(number, source, of_source, later[0], change)
        layer.register_forward_pre_hook(streamed.read)
        layer.register_forward_hook(streamed.drop)
    return finished(model)


def _change_all(model: PreTrainedModel, change: Change) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = change(tensor.data)


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    number = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)


class _StreamedLayer:
    """Gives a layer its weights before it runs, and takes them afterwards."""

    def __init__(
        self, number: int, source: PreTrainedModel, layer: nn.Module, files: LayersLater, change: Change
    ) -> None:
        """`layer`: the one of this number in `source`, a model without storage."""
        self._number, self._source, self._layer, self._files = number, source, layer, files
        self._change = change

    def read(self, target: nn.Module, _: Any) -> None:
        with no_progress_bars():
            self._files.load(self._source, self._number)
        for tensor in self._layer.state_dict(keep_vars=True).values():
            tensor.data = self._change(tensor.data)
        self._hand_over(target)

    def drop(self, target: nn.Module, *_: Any) -> None:
        self._layer.to("meta")
        self._hand_over(target)

    def _hand_over(self, target: nn.Module) -> None:
        # Of PEFT's wrappers and what they wrap, which have one name here, the last has the weight.
        places = {name.replace(".base_layer", ""): module for name, module in target.named_modules()}
        for name, tensor in self._layer.state_dict(keep_vars=True).items():
            path, _, leaf = name.rpartition(".")
            setattr(places[path], leaf, tensor)
