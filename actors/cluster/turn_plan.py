"""A device on which trainer and engines take turns: who is awake, and what of the trainer goes to the host.

Pure: states, bytes and a plan; no processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from actors.errors import InvariantViolation, UserError

Offload = Literal["auto", "none", "optimizer", "all"]
"""Of the trainer, what leaves the device while the engine is awake: nothing, gradients and moments, or these
and all weights; `auto`: the least that makes room."""
Moves = Literal["none", "optimizer", "all"]

RESERVE = 0.03
"""Share of a GPU that nobody plans with: contexts, workspaces of libraries, gaps between blocks."""
GIB = 2**30
NEVER_BOTH = "never both awake"
"""Name of the invariant."""


@dataclass(frozen=True)
class Device:
    """Sides that are awake on one device."""

    policy: bool = False
    engines: bool = False

    def with_(self, **awake: bool) -> Device:
        """The device after a change.

        Raises:
            InvariantViolation: both would be awake.
        """
        after = replace(self, **awake)
        if after.policy and after.engines:
            raise both_awake("policy and engines", "one was to wake before the other slept")
        return after


def both_awake(who: str, reason: str) -> InvariantViolation:
    """The error of a broken schedule."""
    next_step = "report this, with the logs; without roles.rollout.share each has a device of its own"
    return InvariantViolation(who, "sync", f"{NEVER_BOTH}: {reason}", next_step)


@dataclass(frozen=True)
class TrainerBytes:
    """Bytes of one trainer rank."""

    base: int
    """Weights, the adapters' and buffers included, on this rank."""
    optimizer: int
    """Gradients and moments of what trains."""
    activations: int
    """Most that passes took on top so far; 0 before the first, and on CPUs, where nobody counts them."""
    device: int
    """Of the whole GPU, or of the machine where there is none."""
    on_host: bool
    """There is no GPU: what goes to the host stays in the same memory."""


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of the engine beside it, awake. Asleep it has none on the device."""

    weights: int
    cache: int

    @staticmethod
    def by_share(share: float, trainer: TrainerBytes) -> EngineBytes:
        """Of an engine that is given this share of the device (`gpu_memory_utilization`), and fills with its
        cache what the weights leave. Its weights are the trainer's, in the same dtype."""
        return EngineBytes(trainer.base, max(0, int(share * trainer.device) - trainer.base))


@dataclass(frozen=True)
class TurnPlan:
    """Moves of each turn, and the bytes on a GPU in each, by count."""

    asked: Offload
    moves: Moves
    trainer: TrainerBytes
    engine: EngineBytes

    @property
    def moved(self) -> int:
        """Bytes of one rank that go to the host before the engine wakes, and come back after it sleeps."""
        base, optimizer = self.trainer.base, self.trainer.optimizer
        return {"none": 0, "optimizer": optimizer, "all": base + optimizer}[self.moves]

    @property
    def trainers_turn(self) -> int:
        return self.trainer.base + self.trainer.optimizer + self.trainer.activations

    @property
    def engines_turn(self) -> int:
        return self.engine.weights + self.engine.cache + self.stays

    @property
    def stays(self) -> int:
        """Of the trainer, beside an engine that is awake."""
        return self.trainer.base + self.trainer.optimizer - self.moved

    def __str__(self) -> str:
        what = {
            "none": "nothing of the policy moves",
            "optimizer": f"{_gib(self.moved)} of gradients and moments go to the host and back",
            "all": f"{_gib(self.moved)} of weights, gradients and moments go to the host and back",
        }[self.moves]
        said = f"policy and rollout take turns: {what} (roles.rollout.offload: {self.asked})"
        if self.trainer.on_host:
            return f"{said}; both are in this machine's memory"
        return (
            f"{said}; of the GPU's {_gib(self.trainer.device)} the engine's turn takes "
            f"{_gib(self.engines_turn)}, the policy's {_gib(self.trainers_turn)} and more for activations"
        )


def plan_turns(asked: Offload, trainer: TrainerBytes, engine: EngineBytes) -> TurnPlan:
    """The way that was asked for; `auto`: the one that moves least and makes room for the engine. Without a
    GPU moving makes no room, and `auto` moves nothing.

    Raises:
        UserError: they don't fit on the GPU one after the other.
    """
    if trainer.on_host:
        return TurnPlan(asked, "none" if asked == "auto" else asked, trainer, engine)
    room = int(trainer.device * (1 - RESERVE))
    ways: list[Moves] = ["none", "optimizer", "all"] if asked == "auto" else [asked]
    plans = [TurnPlan(asked, moves, trainer, engine) for moves in ways]
    plan = next((one for one in plans if one.engines_turn <= room), plans[-1])
    problems = []
    if plan.engines_turn > room:
        more = "" if plan.moves == "all" else "set roles.rollout.offload to auto, or "
        problems.append(
            f"roles.rollout.share: in the engine's turn {_gib(engine.weights + engine.cache)} of it and "
            f"{_gib(plan.stays)} of the policy (offload: {asked}) don't fit in {_gib(room)}; {more}lower "
            "roles.rollout.engine.gpu_memory_utilization"
        )
    if plan.trainers_turn > room:
        problems.append(
            f"roles.rollout.share: in the policy's turn {_gib(plan.trainers_turn)} of weights, gradients, "
            f"moments and activations don't fit in {_gib(room)}; split the base by roles.policy.sharding, or "
            "lower the stage's max_tokens_per_micro_batch"
        )
    if problems:
        raise UserError(problems)
    return plan


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
