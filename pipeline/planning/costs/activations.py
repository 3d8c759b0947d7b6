"""Bytes that one forward and backward pass of a micro-batch takes beyond weights.

Counted tensor by tensor, as autograd keeps them in transformers' decoder layers with RMSNorm, rotary
embeddings and gated MLPs (transformers 5, modeling_llama.py, modeling_qwen3_moe.py), with attention, LoRA and
experts as `actors.models` computes them. Other layers are counted as if they were such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.planning.costs.weights import Holding, largest_gradient

if TYPE_CHECKING:
    from actors.models.facts import BaseSizes, Layer, Part

FLOAT, INDEX = 4, 8
HEAD_BLOCK = 1 << 23
"""Logits of one block on a CPU (`actors.algorithms.chunked_logprob.HEAD_BLOCK_ELEMENTS`)."""
DEVICE_SHARE = 128
"""Of a GPU's memory a block takes one part in so many (there)."""
BLOCKS_MADE_AGAIN = 8
"""A head that trains makes logits of more blocks than this again (`actors.trainer.token_scorer`)."""


GAPS, GAPS_WITH_CHECKPOINTING = 3.4, 3.0
"""Of what one layer makes and frees in a pass, so many times stay as gaps in glibc's heap, which is not
trimmed (`actors.trainer.torch_setup`); fewer where a layer is freed before the next one is made. Fitted to
measurements on CPUs (docs/plan.md); on GPUs torch has an allocator of its own."""


@dataclass(frozen=True)
class PassSize:
    """The largest micro-batch of a rank."""

    tokens: int
    """Positions; a prompt that sequences share counts once."""
    attended: int
    """Positions that attention reads, shared ones for each sequence."""
    counted: int
    """Labels whose log-probabilities the loss reads; 0: it reads values or scores."""
    longest: int
    """Of a sequence."""


@dataclass(frozen=True)
class PassBytes:
    """Of one pass, at its largest moment."""

    saved: int
    """By layers, for the backward pass."""
    again: int
    """One layer's, computed anew under gradient checkpointing."""
    backward: int
    """Gradients and products of the layer that is walked back."""
    head: int
    """Logits, or a block of them, and what the head keeps."""
    gaps: int
    """Memory of a CPU's heap that is free and too small for what is asked for next."""


def training_pass(sizes: BaseSizes, holding: Holding, size: PassSize, device_memory: int) -> PassBytes:
    """Of a pass with gradients."""
    layers = [saved_by_layer(sizes, layer, holding, size) for layer in sizes.layers]
    largest = max(range(len(layers)), key=layers.__getitem__)
    backward = walked_back(sizes, sizes.layers[largest], holding, size)
    stream = sizes.hidden * holding.element * size.tokens
    # The last norm reads the stream in float32, and gives the head its counted rows.
    ends = size.tokens * sizes.hidden * FLOAT + size.counted * sizes.hidden * holding.element
    again = holding.model.gradient_checkpointing
    share = 0.0 if holding.on_gpu else GAPS_WITH_CHECKPOINTING if again else GAPS
    gaps = int(share * (layers[largest] + backward))
    backward += largest_gradient(sizes, holding)
    head = head_bytes(sizes, holding, size, device_memory)
    if again:
        return PassBytes(len(layers) * stream + ends, layers[largest], backward, head, gaps)
    return PassBytes(sum(layers) + ends, 0, backward, head, gaps)


def saved_by_layer(sizes: BaseSizes, layer: Layer, holding: Holding, size: PassSize) -> int:
    """Bytes that one layer keeps for its backward pass."""
    per_token = _of_norms(layer, holding) + _of_mlps(sizes, layer, holding)
    return int(per_token * size.tokens + _of_attention(sizes, layer, holding, size))


def _adapted(holding: Holding, part: Part) -> bool:
    """Products of this part keep their inputs: for A and B, or for the weight's own gradient."""
    return holding.lora is None or part in holding.lora.targets


def _input(holding: Holding, width: float, linears: int) -> float:
    """Bytes that linear layers with one input keep of it: itself once, or in 16 bits beside LoRA a float32
    copy for each, as PEFT casts it."""
    if holding.lora is not None and holding.element < FLOAT:
        return linears * width * FLOAT
    return width * holding.element


def _of_norms(layer: Layer, holding: Holding) -> float:
    """Each norm keeps its input in float32, and with a weight that trains the normalised one."""
    own = holding.element if holding.lora is None else 0
    return layer.norms * layer.hidden * (FLOAT + own)


def _of_attention(sizes: BaseSizes, layer: Layer, holding: Holding, size: PassSize) -> float:
    """Input, queries, keys and values as attention reads them (repeated for every head), its output, the log
    of its sums, and that output once more as the last product's input."""
    e, tp = holding.element, holding.tensor_parallel
    query, value = sizes.query_width / tp, sizes.value_width / tp
    read = (2 * query + value) * e + value * e + sizes.heads / tp * FLOAT
    total = read * size.attended
    if layer.head_norms:
        # Before they are normalised, in float32; keys of fewer heads than queries.
        own = e if holding.lora is None else 0
        total += (query + sizes.cached_width / tp) * (FLOAT + own) * size.tokens
    if _adapted(holding, "attention"):
        rank = 0 if holding.lora is None else 4 * holding.lora.r * FLOAT
        total += (_input(holding, sizes.hidden, 3) + _input(holding, value, 1) + rank) * size.tokens
    return total


def _of_mlps(sizes: BaseSizes, layer: Layer, holding: Holding) -> float:
    """Per token: gate, its SiLU, up, and with what trains their product and the input."""
    e, tp, total = holding.element, holding.tensor_parallel, 0.0
    for part in ("mlp", "shared_experts"):
        width = layer.width(part) / tp
        if width:
            total += 3 * width * e
            if _adapted(holding, part):
                rank = 0 if holding.lora is None else 3 * holding.lora.r * FLOAT
                total += _input(holding, layer.hidden, 2) + _input(holding, width, 1) + rank
    width = layer.width("experts") / tp
    return total + (_of_experts(sizes, layer, holding, width) if width else 0.0)


def _of_experts(sizes: BaseSizes, layer: Layer, holding: Holding, width: float) -> float:
    """Per token: of each choice gate and up (fused, on a CPU), or also what transformers' grouped products
    keep: the gathered input, the gate's SiLU, its product with up, and the output before it is weighted."""
    e, k, hidden = holding.element, sizes.top_k, layer.hidden
    routing = 2 * sizes.experts * FLOAT + k * (2 * FLOAT + 4 * INDEX)
    rank = 0
    if holding.lora is not None and "experts" in holding.lora.targets:
        rank = holding.lora.r if holding.lora.expert_rank == "r" else holding.lora.r // k
    if holding.fused_experts:
        return hidden * rows_received(holding, k) * e + k * (2 * width + 2 * rank) * e + routing
    inputs = hidden if _adapted(holding, "experts") else 0
    made = width if _adapted(holding, "experts") else 0
    return k * (inputs + 3 * width + made + hidden + 2 * rank) * e + routing


def rows_received(holding: Holding, top_k: int) -> float:
    """Rows of experts' input that a rank holds, as a multiple of its tokens: a token goes once to every rank
    with an expert of its choice (`actors.models.moe.token_dispatch`), drawn evenly."""
    if holding.sharding != "experts" or holding.ranks == 1:
        return 1.0
    return holding.ranks * (1 - (1 - 1 / holding.ranks) ** top_k)


def walked_back(sizes: BaseSizes, layer: Layer, holding: Holding, size: PassSize) -> int:
    """Bytes of gradients while one layer is walked back: of the stream and of an MLP's parts, or of
    attention's, whichever is more. PEFT computes LoRA in float32: in 16 bits gradients are there in both."""
    tp, hidden = holding.tensor_parallel, layer.hidden
    e = holding.element + (FLOAT if holding.lora is not None and holding.element < FLOAT else 0)
    dense = (layer.width("mlp") + layer.width("shared_experts")) / tp
    experts, k = layer.width("experts") / tp, sizes.top_k
    mlp = 2 * dense + 2 * hidden
    if experts and holding.fused_experts:
        mlp += k * hidden + hidden * rows_received(holding, k)
    elif experts:
        mlp += k * (2 * hidden + 3 * experts)
    attention = 2 * hidden + 2 * (2 * sizes.query_width + sizes.value_width) / tp
    return int(max(mlp * size.tokens, attention * size.attended) * e)


def block_elements(device_memory: int, on_gpu: bool) -> int:
    """Logits of one block, as `actors.algorithms.chunked_logprob.block_elements` has it."""
    if not on_gpu:
        return HEAD_BLOCK
    return max(HEAD_BLOCK, 1 << (device_memory // DEVICE_SHARE // FLOAT).bit_length() - 1)


def head_bytes(sizes: BaseSizes, holding: Holding, size: PassSize, device_memory: int) -> int:
    """Bytes of the output head, while log-probabilities are made or walked back, whichever is more."""
    if not size.counted:
        return 0
    logits, block = size.counted * sizes.vocabulary, block_elements(device_memory, holding.on_gpu)
    states = size.counted * sizes.hidden * holding.element
    trains = holding.lora is None
    by_weight = sizes.head_elements * FLOAT if trains else 0
    exact = holding.element < FLOAT and holding.on_gpu
    if not exact and logits <= block * (BLOCKS_MADE_AGAIN if trains else 1):
        # Logits and their softmax, which becomes the gradient; or that, and those of weight and states.
        return max(2 * logits * FLOAT, logits * FLOAT + by_weight + states)
    made = min(logits, block) * FLOAT
    copies = 2 if trains or holding.element < FLOAT else 1
    return copies * made + 2 * states + 2 * by_weight


def scoring_pass(sizes: BaseSizes, holding: Holding, size: PassSize, device_memory: int) -> int:
    """Bytes of a pass without gradients: one layer's at a time, or the head's."""
    layers = [walked_back(sizes, layer, holding, size) for layer in sizes.layers]
    during = head_bytes(sizes, holding, size, device_memory)
    stream = 2 * sizes.hidden * FLOAT * size.tokens
    return stream + max(max(layers, default=0), during)
