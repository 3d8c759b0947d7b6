"""The loop's order and its checks: each fault, planted in what a role answers, stops the step it is seen in.

Roles, engines and sync are stand-ins that answer with arrays; what they compute is tested beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batches.generations import Generations, SamplingSpec
from actors.cluster.health import Members
from actors.cluster.measured_limits import MeasuredLimits
from actors.cluster.spec import LimitsSpec
from actors.errors import InvariantViolation, RunFailure
from actors.sync.engine_set import EngineSet
from actors.sync.spec import SyncSpec
from actors.sync.weight_sync import WeightSync
from pipeline.artifacts.identity import Decision, Identity
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.prompts import PromptData
from pipeline.stages.context import WorkTime
from pipeline.stages.online import loop as rl
from pipeline.stages.online.loop import RlContext, RlLoop
from pipeline.stages.online.train import train_rl
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.specs.registry import GrpoStage, PpoStage

TOKENS = 3
"""Of every sample."""
LOGP = -1.0
"""Of every token, whoever is asked."""


@dataclass
class Answer:
    """A call that is back."""

    value: Any

    def result(self) -> Any:
        return self.value


@dataclass
class Role:
    """A view whose answers can be spoilt."""

    log: list[str]
    name: str
    logps: float = LOGP
    value: float = 0.5
    ratio: float = 0.0
    asked: int = 0
    group: Any = None

    @property
    def host(self) -> str:
        return self.name

    def shares_ranks_with(self, other: Role) -> bool:
        return self.group is other.group

    def token_logprobs(self, batch: Any, temperature: float) -> Answer:
        self.asked += 1
        return Answer(np.full(int(batch.loss_mask.sum()), self.logps))

    def values(self, batch: Any) -> Answer:
        return Answer(np.full(int(batch.loss_mask.sum()), self.value))

    def scores(self, batch: Any) -> Answer:
        return Answer(np.full(batch.n_rows, self.value))

    def update(self, batch: Any, loss: Any, number: int) -> Answer:
        self.log.append(f"{self.name} {number} beta {getattr(loss, 'beta', 0):.3g}")
        shares = {"ratio/beyond": self.ratio, "ratio/beyond_tenth": self.ratio}
        return Answer({"loss": 0.0, "ratio/max_deviation": self.ratio, **shares})

    def prepare(self, optim: Any, total: int, *, keep: bool = False) -> None:
        self.log.append(f"prepare {self.name} for {total}{' beside others' if keep else ''}")

    def router_load(self) -> None:
        return None

    def frozen_digest(self) -> str:
        return "frozen"


@dataclass
class Engines:
    """A pool that draws samples of three tokens."""

    logps: float = LOGP
    version: int = 0

    def expert_load(self) -> list[np.ndarray]:
        return []

    def generate(self, prompts: list[list[int]], sampling: SamplingSpec, seeds: list[int]) -> Generations:
        return Generations.of(
            [([5] * TOKENS, [self.logps] * TOKENS, "stop") for _ in seeds], 1, "v", 0.0, self.version
        )


@dataclass
class Report:
    version: int
    replaced: tuple[int, ...] = ()
    withheld: tuple[int, ...] = ()

    def metrics(self) -> dict[str, float]:
        return {"sync/version": self.version}


@dataclass
class Sync:
    log: list[str]
    engines: Engines

    def connect(self) -> None: ...

    def close(self) -> None: ...

    def push(self, version: int) -> Report:
        self.log.append(f"push {version}")
        self.engines.version = version
        return Report(version)


class NeverAsked:
    def begin(self, answer: str) -> bool:
        return True

    def asked(self) -> bool:
        return False


class Tokenizer:
    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["7"] * len(ids)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RlLoop:
    """PPO over four prompts, two a step, two optimizer steps each; first the critic learns alone."""
    monkeypatch.setattr(rl, "put", lambda batch: batch)
    log: list[str] = []
    spec = PpoStage(
        data=[{"source": "builtin:arithmetic", "split": "prompts"}],
        rewards=["exact_match", {"source": "judge", "weight": 0.5}],
        batch_size=2, num_iterations=2, critic_warmup_steps=1, kl_target=0.1, kl_horizon=20,
        kl_in="loss", kl_estimator="k3", whiten_advantages="none",
    )  # fmt: skip
    data = PromptData(["q"] * 4, ["q"] * 4, [[1]] * 4, {"answer": ["7"] * 4}, Skipped(), "f")
    stage = PreparedRl("ppo", spec, 3, data, BatchOrder(4, 2, 3, max_steps=3), spec.sampling())
    ranks, engines = object(), Engines()
    context = RlContext(
        directory=tmp_path, identity=Identity({}, {}, "", 3), dtype="float32",
        logging_steps=1, starts_as_reference=True, on_step=lambda *_: None,
        stop=NeverAsked(), limits=MeasuredLimits(LimitsSpec()), time=WorkTime(),
        on_log=lambda line: None, policy=Role(log, "policy", group=ranks), reference=Role(log, "reference"),
        critic=Role(log, "critic", group=ranks), reward_models={"judge": Role(log, "judge")},
        rollout=engines, sync=Sync(log, engines), tokenizer=Tokenizer(), note=lambda text: None,
    )  # type: ignore[arg-type]  # fmt: skip
    return RlLoop(stage, context)


def log_of(loop: RlLoop) -> list[str]:
    return loop.ctx.sync.log  # type: ignore[attr-defined,no-any-return]


def test_a_step_updates_then_syncs_and_beta_follows_what_it_saw(loop: RlLoop) -> None:
    """KL 0 against a target of 0.1 is an error of -0.2: with 2 of 20 samples beta shrinks by 2 % a step."""
    for step in range(2):
        loop.step(step)
    assert log_of(loop) == [
        "critic 0 beta 0", "critic 1 beta 0", "push 1",
        "policy 0 beta 0.049", "critic 2 beta 0", "policy 1 beta 0.049", "critic 3 beta 0", "push 2",
    ]  # fmt: skip
    resumed = RlLoop(loop.stage, loop.ctx)
    resumed.load_state(loop.state())
    assert resumed.state() == loop.state() == {"beta": 0.05 * 0.98**2, "idle": 0, "num_tokens": 16}


def test_a_resumed_run_remembers_why_steps_were_idle(loop: RlLoop) -> None:
    loop.load_state({"beta": 0.05, "idle": 3, "num_tokens": 16, "idle_cut": 2})
    resumed = RlLoop(loop.stage, loop.ctx)
    resumed.load_state(loop.state())
    assert resumed.idle == loop.idle
    assert (resumed.idle.steps, resumed.idle.reasons) == (3, {"cut": 2})


FAULTS = {
    "the reference is another model": ("reference", "logps", -2.0, "reference"),
    "the engine serves other weights": ("rollout", "logps", -2.0, "engine and trainer disagree"),
    "old log-probabilities are infinite": ("policy", "logps", -np.inf, "old_logps"),
    "the critic is not a number": ("critic", "value", np.nan, "are not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_before_an_update_stops_the_step_before_it(loop: RlLoop, fault: str) -> None:
    who, what, value, says = FAULTS[fault]
    setattr(getattr(loop.ctx, who), what, value)
    with pytest.raises(InvariantViolation, match=says):
        loop.step(0)
    assert log_of(loop) == []


def test_a_reward_model_that_returns_no_number_stops_the_step(loop: RlLoop) -> None:
    loop.ctx.reward_models["judge"].value = np.nan  # type: ignore[misc]
    with pytest.raises(InvariantViolation, match=r"reward 'judge'.*2 of 2 values are not finite"):
        loop.step(0)


def test_a_ratio_that_is_not_1_is_not_served(loop: RlLoop) -> None:
    loop.ctx.policy.ratio = 0.1  # type: ignore[misc]
    loop.step(0)
    with pytest.raises(InvariantViolation, match=r"every ratio is 1 there, and 10\.0% of the tokens"):
        loop.step(1)
    assert "push 2" not in log_of(loop)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, [1, 1]),
        ({"num_iterations": 2}, [1, 2]),
        ({"batch_size": 2, "steps_per_generation": 2}, [1, 2]),
        ({"beta": 0.1}, [1, 2]),
        ({"vllm_importance_sampling_correction": True}, [1, 2]),
    ],
)
def test_the_only_update_of_a_generation_finds_old_log_probabilities_itself(
    loop: RlLoop, settings: dict[str, Any], asked: list[int]
) -> None:
    """But for the first one of a run, fresh or resumed, which is held against a pass of its own."""
    few = {"batch_size": 4, "num_generations": 2, **settings}
    spec = GrpoStage(data=[{"source": "x"}], rewards=["exact_match"], **few)
    context, policy = replace(loop.ctx, critic=None), Role([], "policy")
    for _ in range(2):
        policy.asked, found = 0, []
        grpo = RlLoop(replace(loop.stage, spec=spec), replace(context, policy=policy))  # type: ignore[arg-type]
        for step in range(2):
            context.rollout.version = step  # type: ignore[attr-defined]
            grpo.step(step)
            found.append(policy.asked)
        assert found == asked


def test_an_engine_that_passed_no_weights_on_is_noted(loop: RlLoop) -> None:
    loop.ctx.sync.push = lambda version: Report(version, withheld=(1,))  # type: ignore[method-assign]
    (note,) = loop.step(0).notes
    assert note == "rollout-1 did not pass new weights on to engines below it: others do so now"


def stop(version: int) -> None:
    raise RunFailure("sync", "sync", "far enough")


@pytest.mark.parametrize("shared", [True, False])
def test_a_critic_trains_beside_the_policy_only_where_it_is_on_its_ranks(loop: RlLoop, shared: bool) -> None:
    if not shared:
        loop.ctx.critic.group = object()  # type: ignore[union-attr,misc]
    loop.ctx.sync.push = stop  # type: ignore[method-assign,assignment]
    with pytest.raises(RunFailure, match="far enough"):
        train_rl(loop.stage, loop.ctx, Decision("new"))
    beside = " beside others" if shared else ""
    assert log_of(loop) == ["prepare policy for 4", f"prepare critic for 6{beside}"]


class Gone:
    """A group whose processes are dead."""

    fleet = Members.of(1)

    def submit_rank(self, rank: int, method: str, phase: str) -> None:
        raise RunFailure("policy-0", phase, "its process died")


def test_a_trainer_that_is_gone_is_named_with_the_phase_in_which_it_died(loop: RlLoop) -> None:
    """Not with that of the connections that are dropped on the way out."""
    closing = WeightSync(Gone(), EngineSet(Gone()), SyncSpec(), "", "ppo", [])  # type: ignore[arg-type]
    loop.ctx.sync.close = closing.close  # type: ignore[method-assign]

    def die(*_: Any) -> None:
        raise RunFailure("policy-0", "update", "its process died")

    loop.ctx.critic.update = die  # type: ignore[union-attr,method-assign,assignment]
    with pytest.raises(RunFailure) as caught:
        train_rl(loop.stage, loop.ctx, Decision("new"))
    assert caught.value.phase == "update"
