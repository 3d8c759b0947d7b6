"""Turns on one device: what moves, who is awake, and what happens to whoever does not sleep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.cluster.health import Members, ProcessEvent
from actors.cluster.lasting_group import RanksReplaced
from actors.cluster.turn_plan import Device, EngineBytes, TrainerBytes, plan_turns
from actors.cluster.turns import OneDevice, SleepingEngines, SleepingRanks
from actors.errors import InvariantViolation, RunFailure, UserError
from actors.rollout.engine import RolloutEngine
from actors.trainer.model_host import ModelHost
from tests.actors.faces import calls_of, mismatches

GIB = 2**30


def trainer(base: int = 60, optimizer: int = 2, activations: int = 0, device: int = 140) -> TrainerBytes:
    return TrainerBytes(base * GIB, optimizer * GIB, activations * GIB, device * GIB, on_host=False)


@pytest.mark.parametrize(
    ("cache", "moves", "stays"),
    [(10, "none", 62), (13, "none", 62), (15, "optimizer", 60), (16, "all", 0), (60, "all", 0)],
)
def test_no_more_moves_than_makes_room_for_the_engine(cache: int, moves: str, stays: int) -> None:
    plan = plan_turns("auto", trainer(), EngineBytes(60 * GIB, cache * GIB))
    assert (plan.moves, plan.stays) == (moves, stays * GIB)
    assert plan.moved + plan.stays == 62 * GIB
    assert plan.engines_turn == (60 + cache + stays) * GIB <= 0.97 * 140 * GIB


def test_what_is_asked_for_is_done_where_it_fits() -> None:
    small = EngineBytes(10 * GIB, 10 * GIB)
    assert [plan_turns(one, trainer(), small).moves for one in ("none", "optimizer", "all")] == [
        "none",
        "optimizer",
        "all",
    ]
    with pytest.raises(UserError, match=r"62 GiB of the policy \(offload: none\).*offload to auto"):
        plan_turns("none", trainer(), EngineBytes(60 * GIB, 20 * GIB))


def test_two_sides_that_do_not_fit_one_after_the_other_are_both_named() -> None:
    with pytest.raises(UserError) as refused:
        plan_turns("auto", trainer(base=130, activations=10), EngineBytes(130 * GIB, 10 * GIB))
    engines, policys = refused.value.problems
    assert "in the engine's turn 140 GiB of it" in engines
    assert "gpu_memory_utilization" in engines
    assert "in the policy's turn 142 GiB" in policys
    assert "roles.policy.sharding" in policys


def test_an_engine_takes_its_share_of_the_gpu_whatever_it_weighs() -> None:
    engine = EngineBytes.by_share(0.9, trainer())
    assert (engine.weights, engine.weights + engine.cache) == (60 * GIB, 126 * GIB)
    plan = plan_turns("auto", trainer(), engine)
    assert str(plan) == (
        "policy and rollout take turns: 62 GiB of weights, gradients and moments go to the host and back "
        "(roles.rollout.offload: auto); of the GPU's 140 GiB the engine's turn takes 126 GiB, the policy's "
        "62 GiB and more for activations"
    )


def test_without_a_gpu_moving_makes_no_room_and_is_only_done_when_asked_for() -> None:
    host = TrainerBytes(60 * GIB, 2 * GIB, 0, 8 * GIB, on_host=True)
    assert plan_turns("auto", host, EngineBytes.by_share(0.9, host)).moves == "none"
    assert plan_turns("all", host, EngineBytes.by_share(0.9, host)).moved == 62 * GIB


def test_nobody_wakes_before_the_other_sleeps() -> None:
    device = Device().with_(policy=True)
    with pytest.raises(InvariantViolation, match="never both awake"):
        device.with_(engines=True)
    assert device.with_(policy=False).with_(engines=True) == Device(engines=True)


# --- Turns over groups ------------------------------------------------------------------------------


@dataclass
class Answer:
    """A call that was submitted, and what comes of it."""

    value: Any

    def result(self) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


@dataclass
class Group:
    """Stands in for a `WorkerGroup`, whose processes say what they are told to."""

    name: str
    size: int = 2
    says: dict[str, list[Any]] = field(default_factory=dict)
    """By method: the answer of each rank in place of the right one."""
    log: list[str] = field(default_factory=list)
    """Shared by the groups of a device."""
    replaced_over: list[str] = field(default_factory=list)
    """Calls over which its processes are replaced, once each."""

    def __post_init__(self) -> None:
        self.fleet = Members.of(self.size)

    def submit(self, method: str, *args: Any, phase: str) -> Answer:
        self.log.append(" ".join([method, *map(str, args)]))
        right: Any = {"bytes": trainer(), "park": False, "wake": True}[method.rpartition(".")[2]]
        if method in self.replaced_over:
            self.replaced_over.remove(method)
            return Answer(RanksReplaced(self.name, phase, "its processes were replaced"))
        return Answer(self.says.get(method, [right] * self.size))

    def submit_rank(self, rank: int, method: str, phase: str) -> Answer:
        self.log.append(f"{method} {rank}")
        said = self.says.get(method, [method == "wake_up"] * self.size)[rank]
        if isinstance(said, ProcessEvent):
            self.fleet = self.fleet.after([rank], said, "gone")
            said = RunFailure(self.who(rank), phase, "gone")
        return Answer(said)

    def restart(self, rank: int) -> None:
        self.log.append(f"restart {rank}")
        self.fleet = self.fleet.after([rank], ProcessEvent.RESTARTED)

    def rebuild(self, rank: int) -> float:
        self.log.append(f"rebuild {rank}")
        return 0.0

    def who(self, rank: int) -> str:
        return f"{self.name}-{rank}"


def one_device(
    policys: dict[str, list[Any]] | None = None, engines: dict[str, list[Any]] | None = None
) -> tuple[OneDevice, list[str], Group]:
    """Turns of a policy that is built and two engines, what they are asked, and the engines."""
    log = list[str]()
    policy, rollout = (
        Group("policy", says=policys or {}, log=log),
        Group("rollout", says=engines or {}, log=log),
    )
    by_share = lambda rank: EngineBytes.by_share(0.9, rank)  # noqa: E731
    turns = OneDevice(lambda: policy, lambda: rollout, "auto", by_share, log.append)  # type: ignore[arg-type,return-value]
    turns.policy_built()
    return turns, log, rollout


def test_a_turn_begins_when_all_of_the_other_side_sleep_and_is_planned_once() -> None:
    turns, log, _ = one_device()
    turns.to_policy()
    assert log == []
    turns.to_engines()
    turns.to_engines()
    plan = log.pop(1)
    assert "take turns: 62 GiB of weights" in plan
    assert log == ["residence.bytes", "residence.park all", "wake_up 0", "wake_up 1"]
    log.clear()
    turns.to_policy()
    turns.to_policy()
    turns.to_engines()
    assert log == [
        "sleep 0",
        "sleep 1",
        "residence.wake",
        "residence.park all",
        "wake_up 0",
        "wake_up 1",
    ]
    turns.to_policy()
    turns.policy_built()
    log.clear()
    turns.to_engines()
    assert log[0] == "residence.bytes"


def test_an_engine_that_lives_and_does_not_sleep_ends_the_run_before_the_policy_wakes() -> None:
    turns, log, _ = one_device(engines={"sleep": [False, True]})
    turns.to_engines()
    with pytest.raises(InvariantViolation, match=r"rollout-1.*never both awake: it was told to sleep"):
        turns.to_policy()
    assert "residence.wake" not in log


def test_a_rank_that_does_not_sleep_ends_the_run_before_an_engine_wakes() -> None:
    turns, log, _ = one_device(policys={"residence.park": [True, False]})
    with pytest.raises(InvariantViolation, match=r"policy-0.*never both awake"):
        turns.to_engines()
    assert "wake_up 0" not in log


def test_ranks_that_are_replaced_over_a_turn_are_told_again() -> None:
    turns, log, _ = one_device()
    policy = turns._policy()
    policy.replaced_over = ["residence.bytes", "residence.park", "residence.wake"]  # type: ignore[union-attr]
    turns.to_engines()
    turns.to_policy()
    asked = [call.split()[0] for call in log if call.startswith("residence")]
    assert asked == [f"residence.{name}" for name in ("bytes", "bytes", "park", "park", "wake", "wake")]


def test_an_engine_that_is_gone_holds_nothing_and_one_that_hangs_is_ended() -> None:
    turns, log, rollout = one_device(engines={"sleep": [ProcessEvent.DIED, ProcessEvent.OVERDUE]})
    turns.to_engines()
    turns.to_policy()
    assert log[-5:] == ["sleep 0", "sleep 1", "restart 1", "rebuild 1", "residence.wake"]
    log.clear()
    turns.to_engines()
    # Whoever uses the dead one next replaces it.
    assert log == ["residence.park all", "wake_up 1"]
    assert rollout.fleet.serving == [1]


def test_an_engine_that_fails_and_lives_ends_the_run() -> None:
    turns, _, _ = one_device(engines={"sleep": [RunFailure("rollout-0", "sync", "no room"), False]})
    turns.to_engines()
    with pytest.raises(RunFailure, match="no room"):
        turns.to_policy()


def test_processes_that_are_gone_are_not_asked() -> None:
    log = list[str]()
    turns = OneDevice(lambda: None, lambda: None, "auto", lambda rank: EngineBytes(0, 0), log.append)
    turns.to_engines()
    turns.to_policy()
    turns.policy_built()
    turns.gone()
    turns.to_engines()
    assert log == []


def test_every_call_fits_the_method_that_it_names() -> None:
    assert mismatches(SleepingRanks, ModelHost) == {}
    assert mismatches(SleepingEngines, RolloutEngine) == {}
    assert set(calls_of(SleepingRanks)) == {"bytes", "park", "wake"}
