"""Seconds of a step, from operations and bytes over a device's rates, and what bounds them.

A linear layer of P elements takes 2 P operations a token forward, 2 P for the gradient of its input and 2 P
for its own (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Causal attention reads half of all pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pipeline.planning.costs.activations import PassSize, saved_by_layer
from pipeline.planning.costs.engines import engine_memory
from pipeline.planning.costs.payloads import PAYLOADS, payload_bytes
from pipeline.planning.costs.weights import MOMENTS, Holding, base_bytes, trained_bytes
from pipeline.roles import CRITIC, POLICY, REFERENCE, REWARD, ROLLOUT

if TYPE_CHECKING:
    from actors.models.facts import BaseSizes, Weight
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.devices import Device
    from pipeline.planning.costs.processes import Budget

Bound = Literal["products", "attention", "memory", "logits", "wire"]
PASSES_OVER_SAVED = 11
"""Times that as many bytes as a layer keeps are read or written in a forward and a backward pass, beside
products: by norms, rotations, gates and sums, each an operation of its own. By the time that they take on a
CPU (docs/plan.md)."""
ROWS_OF_EXPERTS = 12
"""Times that a row of each choice is read or written in a forward pass: gathered from its token, multiplied,
scaled, and added up. Likewise."""
BYTES_OF_GLOO = 5
"""Times that gathering a byte with gloo takes what sending it takes, in CPU seconds. Likewise."""
ATTENTION_BACKWARD = 2.5
"""Operations of attention's backward pass for one of its forward pass (Dao 2023, arXiv 2307.08691)."""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one rank."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    wire: float = 0.0
    logits: float = 0.0

    def seconds_by(self, device: Device, link: float) -> dict[Bound, float]:
        return {
            "products": self.products / device.products,
            "attention": self.attention / device.attention,
            "memory": self.memory / device.bandwidth,
            "logits": self.logits / device.logits,
            "wire": self.wire / link,
        }


@dataclass(frozen=True)
class StepTime:
    """One step of a stage: an optimizer step, or a round of sampling, scoring, updates and a sync."""

    stage: str
    parts: dict[str, float]
    """Seconds by what is done."""
    bound: Bound
    """What takes most of them."""
    tokens: int
    """That are trained on."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass
class StepClock:
    """Adds up parts of a step."""

    device: Device
    link: float
    parts: dict[str, float] = field(default_factory=dict)
    by: dict[Bound, float] = field(default_factory=dict)

    def add(self, part: str, work: Work, times: float = 1.0) -> None:
        """Operations follow one another. On GPUs what is on the wire meanwhile is hidden behind them, but for
        what takes longer; on a CPU sending is work of the same cores."""
        found = work.seconds_by(self.device, self.link)
        if self.device.is_gpu:
            found["wire"] = max(0.0, 2 * found["wire"] - sum(found.values()))
        self.parts[part] = self.parts.get(part, 0.0) + times * sum(found.values())
        for bound, seconds in found.items():
            self.by[bound] = self.by.get(bound, 0.0) + times * seconds

    def step(self, stage: str, tokens: int) -> StepTime:
        bound = max(self.by, key=lambda one: self.by[one])
        return StepTime(stage, self.parts, bound, tokens)


def forward(sizes: BaseSizes, holding: Holding, size: PassSize) -> Work:
    """Of a forward pass of one micro-batch, output head included."""
    tp = holding.tensor_parallel
    pairs = size.attended * size.longest / 2
    attention = 2 * pairs * (sizes.query_width + sizes.value_width) * len(sizes.layers) / tp
    adapters = sum(
        w.adapter_elements(holding.lora, sizes.top_k) * _acting(sizes, w.part == "experts")
        for w in sizes.weights
    )
    products = 2 * (sizes.active_elements() / tp + adapters) * size.tokens
    head = 2 * sizes.head_elements * size.counted
    saved = sum(saved_by_layer(sizes, layer, holding, size) for layer in sizes.layers)
    gathers = base_bytes(sizes, holding) * (holding.ranks - 1) if holding.gathers else 0.0
    gathers *= 1 if holding.on_gpu else BYTES_OF_GLOO
    # Two sums of all activations over the ranks that hold one model, for each layer.
    sums = 4 * size.tokens * sizes.hidden * holding.element * len(sizes.layers) if tp > 1 else 0.0
    rows = sum(sizes.top_k * sizes.hidden for layer in sizes.layers if layer.width("experts"))
    gathered = ROWS_OF_EXPERTS * rows * size.tokens * holding.element
    beside = sum(_beside(sizes, w, holding) for w in sizes.weights) * size.tokens * holding.element
    memory = PASSES_OVER_SAVED / 3 * saved + gathered + beside + sizes.elements * holding.element
    return Work(products + head, attention, memory, gathers + sums, size.counted * sizes.vocabulary)


def _beside(sizes: BaseSizes, weight: Weight, holding: Holding) -> float:
    """Elements that a token's product with an adapter reads and writes beside the base's: its input, its own
    result, and the base's result twice."""
    if not weight.adapter_elements(holding.lora, sizes.top_k):
        return 0.0
    width = weight.shape[-1] + 3 * weight.shape[-2]
    return float(width * (sizes.top_k if weight.part == "experts" else 1))


def _acting(sizes: BaseSizes, of_experts: bool) -> float:
    return sizes.top_k / sizes.experts if of_experts and sizes.experts else 1.0


def update(sizes: BaseSizes, holding: Holding, size: PassSize) -> Work:
    """Of forward and backward pass of one micro-batch. Where the head trains its logits are made again
    (`actors.algorithms.chunked_logprob`)."""
    once = forward(sizes, holding, size)
    again = 1.0 if holding.model.gradient_checkpointing else 0.0
    weights = 1.0 if holding.lora is None else 0.0
    head = 2 * sizes.head_elements * size.counted
    return Work(
        (once.products - head) * (2 + again + weights) + head * (2 + weights),
        once.attention * (1 + again + ATTENTION_BACKWARD),
        once.memory * (3 + again),
        once.wire * 2,
        once.logits * (1 + weights),
    )


def optimizer_step(sizes: BaseSizes, holding: Holding, optim: str) -> Work:
    """Reads parameter, gradient and moments, writes all but the gradient; gradients are added up by an all-
    reduce before."""
    trained = trained_bytes(sizes, holding)
    passes = 2 + 1 + 2 * MOMENTS[optim] + 3
    return Work(0, 0, trained * passes, 2 * trained if holding.sharding != "full" else trained)


def step_time(budget: Budget, name: str) -> StepTime:
    """Of one step of a stage, all rows as long as they may be."""
    config, sizes, device = budget.config, budget.sizes, budget.device
    stage, work = config.stages[name], budget.work(name)
    policy = config.roles.policy
    holding = Holding.of(config.model, policy)
    clock = StepClock(device, device.link if policy.workers <= max(device.per_node, 1) else device.network)
    size = budget.largest(name, policy)
    groups = max(1, policy.workers // policy.tensor_parallel_size)
    passes = work.tokens / groups / max(size.attended, 1)
    optim = optimizer_step(sizes, holding, stage.optim)
    scored = budget.largest(name, policy, reads_logps=False)
    if stage.makes == "reward_model":
        size = scored
    if not stage.online:
        clock.add("update", update(sizes, holding, size), passes)
        clock.add("optimizer", optim)
        if stage.has_reference:
            clock.add("reference (first epoch)", forward(sizes, holding, size), passes)
        return clock.step(name, work.tokens)
    rounds = stage.steps_per_generation
    for role in (POLICY, REFERENCE, CRITIC, REWARD):
        times = {POLICY: 1, REFERENCE: stage.has_reference, CRITIC: stage.critic is not None}.get(
            role, len(stage.reward_models)
        )
        if times:
            what = forward(sizes, holding, size if role in (POLICY, REFERENCE) else scored)
            clock.add("log-probabilities and scores", what, times * rounds * passes)
    clock.add("updates", update(sizes, holding, size), stage.updates_per_step * passes)
    clock.add("optimizer", optim, stage.updates_per_step)
    if stage.critic is not None:
        clock.add("updates", update(sizes, holding, scored), stage.updates_per_step * passes)
        clock.add("optimizer", optim, stage.updates_per_step)
    samples = work.rows * rounds
    clock.add("generation", *generation(config, sizes, device, samples, work.longest, work.counted))
    clock.add("sync", sync_work(sizes, config, stage.sync.payload))
    return clock.step(name, work.tokens * rounds)


def generation(
    config: RunConfig, sizes: BaseSizes, device: Device, samples: int, longest: int, answer: int
) -> tuple[Work, float]:
    """(work of one token of all samples that an engine has in flight, how many such steps there are).

    Each step reads the weights that act on any of them (of experts, those that any token chose) and all keys
    and values so far.
    """
    options, role = config.roles.rollout.engine, config.roles.rollout
    on_gpu = config.roles.gpus_of(ROLLOUT) > 0
    made = engine_memory(sizes, options, config.model.dtype, device.memory if on_gpu else None, 0)
    own = -(-samples // role.workers)
    room = max(1, made.tokens(options.tensor_parallel_size) // longest)
    at_once = min(own, options.max_num_seqs, room)
    workers, element = options.tensor_parallel_size, 4 if config.model.dtype == "float32" else 2
    chosen = 1 - (1 - sizes.top_k / sizes.experts) ** at_once if sizes.experts else 1.0
    read = sum(w.elements * (chosen if w.part == "experts" else 1.0) for w in sizes.weights) * element
    keys = at_once * (longest - answer / 2) * made.per_token
    operations = 2 * (sizes.active_elements() + sizes.head_elements) * at_once
    attended = 2 * at_once * (longest - answer / 2) * len(sizes.layers)
    attention = attended * (sizes.query_width + sizes.value_width)
    prompts = (longest - answer) / max(answer, 1)
    work = Work(operations * (1 + prompts) / workers, attention / workers, (read + keys) / workers)
    return work, -(-own // at_once) * answer


def sync_work(sizes: BaseSizes, config: RunConfig, payload: str) -> Work:
    """A payload on the wire; then the engine reads and writes what it merges, and reads it back once to prove
    it."""
    sent = payload_bytes(payload, sizes, config.model)
    touched = payload_bytes("merged", sizes, config.model)
    moved = sent if payload == "lora" else 3 * touched
    return Work(0, 0, moved / config.roles.rollout.engine.tensor_parallel_size, sent)


def sync_seconds(budget: Budget) -> Mapping[str, tuple[int, float]]:
    """Payload -> (bytes to one engine, seconds of one sync)."""
    found: dict[str, tuple[int, float]] = {}
    for payload in PAYLOADS if budget.config.model.lora is not None else ("merged",):
        clock = StepClock(budget.device, budget.device.link)
        clock.add("sync", sync_work(budget.sizes, budget.config, payload))
        seconds = sum(clock.parts.values(), 0.0)
        found[payload] = payload_bytes(payload, budget.sizes, budget.config.model), seconds
    return found
