"""Sizes of a base, weight by weight, from its config.json alone: plain data from which plans count bytes and
operations. What a base's tensors are called and shaped, its own code says (`meta_model`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from actors.models.architectures.lookup import ARCHITECTURES

if TYPE_CHECKING:
    from actors.models.architectures.row import Architecture
    from actors.models.spec import LoraSpec, Quantization

Part = Literal[
    "attention", "mlp", "experts", "shared_experts", "router", "norm", "embedding", "head", "other"
]
_LAYER = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class Weight:
    """One parameter of a base."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """Number of its decoder layer; None: in none."""
    part: Part
    adaptable: bool
    """The table names it among its part's LoRA targets."""
    quantised_bytes: int | None = None
    """Of it in 4 or 8 bits, with its scales; None: it stays as it is."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def adapter_elements(self, lora: LoraSpec | None, top_k: int) -> int:
        """Elements of A and B, of all experts of a stack: r (in + out) each."""
        if lora is None or not self.adaptable or self.part not in lora.targets:
            return 0
        by_choice = self.part == "experts" and lora.expert_rank == "r/top_k"
        rank = lora.r // top_k if by_choice else lora.r
        stacked = self.shape[0] if len(self.shape) == 3 else 1
        return stacked * rank * (self.shape[-1] + self.shape[-2])


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer."""

    weights: tuple[Weight, ...]
    hidden: int

    @property
    def elements(self) -> int:
        return sum(w.elements for w in self.weights)

    def width(self, part: Part) -> int:
        """Columns between the two products of an MLP; of each expert for stacked ones; 0: it has none."""
        own = [w for w in self.weights if w.part == part and len(w.shape) > 1 and "bias" not in w.name]
        down = [w for w in own if "down" in w.name or ".w2" in w.name]
        if not down:
            return 0
        stacked = down[0].shape[0] if len(down[0].shape) == 3 else 1
        return sum(w.elements for w in down) // (stacked * self.hidden)

    @property
    def norms(self) -> int:
        """Norms of the residual stream or of what is added to it."""
        return sum(w.part == "norm" and w.shape == (self.hidden,) and not _of_heads(w) for w in self.weights)

    @property
    def head_norms(self) -> bool:
        """Queries and keys are normalised."""
        return any(_of_heads(w) for w in self.weights)


def _of_heads(weight: Weight) -> bool:
    return ".q_norm." in weight.name or ".q_layernorm." in weight.name


@dataclass(frozen=True)
class BaseSizes:
    """Weights of a base and the numbers of its config that memory and time depend on."""

    model_type: str
    weights: tuple[Weight, ...]
    hidden: int
    heads: int
    query_width: int
    """Elements of a token's queries over all heads; its keys, repeated for every head, have as many."""
    value_width: int
    """Elements of its values, repeated likewise."""
    cached_width: int
    """Elements of a token's keys (and, the same, its values) in an engine's cache, for each layer."""
    experts: int
    """Of each layer; 0: dense."""
    top_k: int
    vocabulary: int
    positions: int | None
    """Longest sequence that it was made for."""
    tied: bool
    """The output head is the embedding."""

    @property
    def elements(self) -> int:
        return sum(w.elements for w in self.weights)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        by_number: dict[int, list[Weight]] = {}
        for weight in self.weights:
            if weight.layer is not None:
                by_number.setdefault(weight.layer, []).append(weight)
        return tuple(Layer(tuple(by_number[i]), self.hidden) for i in sorted(by_number))

    @property
    def head_elements(self) -> int:
        return self.vocabulary * self.hidden

    def active_elements(self, weights: Iterable[Weight] | None = None) -> float:
        """Elements of layers that act on one token: of stacked experts the chosen share."""
        found = [w for layer in self.layers for w in layer.weights] if weights is None else weights
        share = self.top_k / self.experts if self.experts else 1.0
        return sum(w.elements * (share if w.part == "experts" else 1.0) for w in found)

    def adapter_elements(self, lora: LoraSpec | None) -> int:
        """Elements of one adapter."""
        return sum(w.adapter_elements(lora, self.top_k) for w in self.weights)


def base_sizes(config: Any, net: Any = None, quantization: Quantization | None = None) -> BaseSizes:
    """Sizes of the base with this config. `net`: its model on the meta device, where it is at hand;
    `quantization`: `model.quantization`.

    Raises:
        UserError: transformers makes no model of the config, or it can't be quantised.
    """
    from actors.models.architectures.lookup import architecture_of
    from actors.models.architectures.meta_model import meta_model

    net = meta_model(config) if net is None else net
    row = ARCHITECTURES.get(config.model_type) or architecture_of(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    cached_heads, cached_size = heads_in_cache(text)
    latent = getattr(text, "kv_lora_rank", None) is not None
    size = text.qk_nope_head_dim + text.qk_rope_head_dim if latent else cached_size
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    of_head, of_embedding = id(getattr(head, "weight", None)), id(embedding.weight)
    weights = [
        _weight(row, name, tuple(p.shape), {of_embedding: "embedding", of_head: "head"}.get(id(p)))
        for name, p in net.named_parameters()
    ]
    if quantization is not None:
        small = _quantised_bytes(config, quantization)
        weights = [replace(w, quantised_bytes=small(w)) for w in weights]
    return BaseSizes(
        model_type=config.model_type,
        weights=tuple(weights),
        hidden=text.hidden_size,
        heads=heads,
        query_width=heads * size,
        value_width=heads * (text.v_head_dim if latent else size),
        cached_width=cached_heads * cached_size,
        experts=row.n_experts(config),
        top_k=row.top_k(config),
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
        tied=of_head == of_embedding,
    )


def _quantised_bytes(config: Any, quantization: Quantization) -> Callable[[Weight], int | None]:
    """Of a weight as `actors.models.quantization` holds it: matrices that are quantised each by itself."""
    from actors.models.quantization.codec import codec_of
    from actors.models.quantization.layout import quantised_places

    codec, places = codec_of(quantization), quantised_places(config, quantization)

    def of(weight: Weight) -> int | None:
        place = places.get(weight.name)
        return (
            None if place is None else weight.elements // math.prod(place.shape) * codec.nbytes(place.shape)
        )

    return of


def _weight(row: Architecture, name: str, shape: tuple[int, ...], place: Any) -> Weight:
    found = _LAYER.search(f".{name}")
    layer = int(found[1]) if found else None
    if place is not None:
        return Weight(name, shape, layer, place, adaptable=False)
    owner = name.rpartition(".")[0]
    for group in row.groups:
        modules, parameters = row.modules.get(group, ()), row.parameters.get(group, ())
        if any(owner.endswith(f".{suffix}") for suffix in modules):
            return Weight(name, shape, layer, group, adaptable=len(shape) > 1)
        if any(name.endswith(f".{suffix}") for suffix in parameters):
            return Weight(name, shape, layer, group, adaptable=True)
    if len(shape) == 3 or ".experts." in name:
        return Weight(name, shape, layer, "experts", adaptable=False)
    part: Part = "norm" if "norm" in name else "other"
    return Weight(name, shape, layer, part, adaptable=False)


def heads_in_cache(text_config: Any) -> tuple[int, int]:
    """Heads and their size, of each layer, as keys and as values in an engine's cache."""
    if getattr(text_config, "kv_lora_rank", None) is not None:
        # Latent attention that runs as plain attention: values are padded to the size of keys.
        return text_config.num_attention_heads, text_config.qk_nope_head_dim + text_config.qk_rope_head_dim
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    own = getattr(text_config, "head_dim", None)
    return heads, own or text_config.hidden_size // text_config.num_attention_heads
