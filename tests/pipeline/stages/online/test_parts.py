"""Parts of the online loop that decide by themselves: estimates, minibatches, the count of updates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batches.generations import Generations
from actors.batches.trajectories import trajectory_batch
from actors.errors import InvariantViolation, UserError
from pipeline.config.run_config import RunConfig
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.prompts import PromptData
from pipeline.planning.nodes import remarks_on_data
from pipeline.stages.online.estimates import TokenScores, estimate
from pipeline.stages.online.loop import joined, lengths
from pipeline.stages.online.objectives import PolicyGradient
from pipeline.stages.prepared import PreparedRl, prepare
from pipeline.stages.specs.registry import DistillStage, GrpoStage, PolicyGradientStage, PpoStage, RlStage

DATA = {"data": [{"source": "builtin:arithmetic", "split": "prompts"}], "rewards": ["exact_match"]}


def stage_of(spec: RlStage, prompts: int = 10, steps: int = 7) -> PreparedRl:
    data = PromptData(["q"] * prompts, ["q"] * prompts, [[1]] * prompts, {}, Skipped(), "f")
    order = BatchOrder(prompts, spec.prompts_per_step, 3, max_steps=steps)
    return PreparedRl("rl", spec, 3, data, order, spec.sampling())


def samples_of(*lengths_: int, finish: str = "stop") -> Generations:
    return Generations.of([([5] * n, [-1.0] * n, finish) for n in lengths_], 1, "v0", 0.0)


def test_ppo_advantages_are_those_of_gae() -> None:
    """The literals of GAE: rewards [0, 0, 1], values [.5, .4, .3], gamma 1, lambda .95."""
    spec = PpoStage(**DATA, whiten_advantages="none", beta=0)
    batch = trajectory_batch([[1, 2]], samples_of(3))
    scores = TokenScores(np.full(3, -1.0), None, np.array([0.5, 0.4, 0.3]))
    found = estimate(spec, batch, np.array([1.0]), scores, beta=0.0)
    assert found.batch.token_columns["advantages"] == pytest.approx([0.43675, 0.565, 0.7])
    assert found.batch.token_columns["returns"] == pytest.approx([0.93675, 0.965, 1.0])
    assert found.kl is None
    residual = np.array([0.43675, 0.565, 0.7])
    varied = np.array([0.93675, 0.965, 1.0])
    assert found.metrics["explained_variance"] == pytest.approx(1 - residual.var() / varied.var())


def test_divergence_in_the_reward_is_taken_off_token_by_token() -> None:
    """lambda 0, gamma 0, values 0: an advantage is the token's own reward; k1 of [-1, -2], [-1.5, -1]."""
    spec = PpoStage(**DATA, whiten_advantages="none", lam=0, gamma=0, beta=0.1)
    batch = trajectory_batch([[1]], samples_of(2))
    scores = TokenScores(np.array([-1.0, -2.0]), np.array([-1.5, -1.0]), np.zeros(2))
    found = estimate(spec, batch, np.array([3.0]), scores, beta=0.1)
    assert found.batch.token_columns["advantages"] == pytest.approx([-0.05, 3.1])
    assert found.kl == pytest.approx(-0.5)
    assert found.metrics["kl"] == pytest.approx(-0.25)


def test_a_teacher_s_log_probabilities_less_the_policy_s_are_the_advantages() -> None:
    spec = DistillStage(data=DATA["data"], teacher="dpo")
    batch = trajectory_batch([[1], [1]], samples_of(2, 1))
    scores = TokenScores(np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -1.0, -0.5]))
    found = estimate(spec, batch, np.zeros(2), scores, beta=spec.beta)
    assert found.batch.token_columns["advantages"] == pytest.approx([-0.5, 1.0, 0.0])
    assert (found.metrics["kl"], found.kl) == (pytest.approx(-0.5 / 3), pytest.approx(-0.25))
    whole = estimate(spec.model_copy(update={"gamma": 1.0}), batch, np.array([2.0, 0.0]), scores, spec.beta)
    assert whole.batch.token_columns["advantages"] == pytest.approx([2.5, 3.0, 0.0])


def test_older_samples_weigh_by_what_drew_them() -> None:
    """The engine drew at log-probability -1; the policy has log 2 more, then log 8 more: bounded at 3."""
    batch = trajectory_batch([[1], [1]], samples_of(2, 1))
    scores = TokenScores(-1.0 + np.log([2.0, 8.0, 1.0]))
    stale: dict[str, Any] = {"num_generations": 2, "staleness": 1}
    spec = GrpoStage(**DATA, **stale, vllm_importance_sampling_mode="token_truncate")
    found = estimate(spec, batch, np.array([0.0, 1.0]), scores, 0.0)
    assert found.batch.token_columns["importance_sampling_ratio"] == pytest.approx([2, 3, 1])
    assert found.batch.token_columns["old_logps"] == pytest.approx(scores.old_logps)
    assert found.metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(2)
    uncorrected = GrpoStage(**DATA, **stale, vllm_importance_sampling_correction=False)
    found = estimate(uncorrected, batch, np.array([0.0, 1.0]), scores, 0.0)
    assert "importance_sampling_ratio" not in found.batch.token_columns
    assert found.batch.token_columns["old_logps"].tolist() == [-1.0] * 3
    strict = estimate(GrpoStage(**DATA, num_generations=2), batch, np.array([0.0, 1.0]), scores, 0.0)
    assert "importance_sampling_ratio" not in strict.batch.token_columns


def test_cut_samples_leave_the_loss_where_the_stage_says_so() -> None:
    batch = trajectory_batch([[1], [1]], samples_of(2, 1, finish="length"))
    scores = TokenScores(np.full(3, -1.0), None, None)
    kept = estimate(GrpoStage(**DATA, num_generations=2), batch, np.array([0.0, 1.0]), scores, 0.0)
    assert kept.batch.token_columns["mask"].all()
    spec = GrpoStage(**DATA, num_generations=2, mask_truncated_completions=True)
    masked = estimate(spec, batch, np.array([0.0, 1.0]), scores, 0.0)
    assert not masked.batch.token_columns["mask"].any()
    assert (kept.kept.tolist(), masked.kept.tolist()) == ([True] * 2, [False] * 2)  # type: ignore[union-attr]


def test_a_short_generation_weighs_a_token_as_its_own_optimizer_steps_do() -> None:
    """`dapo` divides by tokens per optimizer step: of 4 batches of 2 samples, a short one fills 1 or 2."""
    spec = GrpoStage(**DATA, batch_size=2, steps_per_generation=4, num_generations=2)
    for samples, expected in ((8, 6.0), (4, 6.0), (2, 6.0)):
        batch = trajectory_batch([[1]] * samples, samples_of(*[3] * samples))
        scores = TokenScores(np.full(3 * samples, -1.0))
        found = estimate(spec, batch, np.arange(samples, dtype=float), scores, 0.0)
        assert found.batch.columns["tokens_per_step"] == pytest.approx([expected] * samples)


@pytest.mark.parametrize(("prompts", "steps"), [(64, 2), (40, 2), (20, 1)])
def test_every_step_is_as_wide_as_the_others(prompts: int, steps: int, repository: Path) -> None:
    """Of 32 prompts, whatever is left at the end of an epoch; and as wide where there are fewer prompts."""
    from actors.models.base.loading import load_tokenizer

    base = str(repository / "assets" / "tiny-moe")
    data = {"source": "builtin:arithmetic", "split": "prompts", "max_rows": prompts}
    stage = {"data": data, "rewards": "exact_match", "batch_size": 32, "num_train_epochs": 1}
    made = {"name": "a", "model": {"base": base}, "stages": {"ppo": stage}}
    config = RunConfig.model_validate(made)
    found = prepare(config.stage("ppo"), load_tokenizer(config.model))
    assert isinstance(found, PreparedRl)
    assert [len(rows) for rows in found.order] == [32] * steps
    assert found.total_updates == 4 * steps
    assert bool([note for note in remarks_on_data(found) if "20 prompts, and a step samples 32" in note]) == (
        prompts == 20
    )


def minibatches(stage: PreparedRl, step: int, samples: int) -> list[np.ndarray]:
    assert isinstance(stage.spec, PolicyGradientStage)
    return PolicyGradient(stage.spec).minibatches(samples, samples, stage.seed, step)


def test_minibatches_go_through_all_samples_once_an_iteration() -> None:
    stage = stage_of(
        GrpoStage(**DATA, batch_size=4, steps_per_generation=2, num_generations=4, num_iterations=2)
    )
    found = minibatches(stage, 1, 8)
    assert [len(rows) for rows in found] == [4, 4, 4, 4]
    first, second = np.concatenate(found[:2]), np.concatenate(found[2:])
    assert sorted(first) == sorted(second) == list(range(8))
    assert not np.array_equal(found[0], found[2])
    assert [x.tolist() for x in found] == [x.tolist() for x in minibatches(stage, 1, 8)]
    assert [x.tolist() for x in found] != [x.tolist() for x in minibatches(stage, 2, 8)]


def test_updates_are_counted_over_short_last_steps_of_an_epoch() -> None:
    """10 prompts, 4 a step, 2 samples each, batches of 4: 2, 2 and 1 updates an epoch, twice over."""
    spec = GrpoStage(**DATA, batch_size=4, steps_per_generation=2, num_generations=2, num_iterations=2)
    stage = stage_of(spec)
    assert [stage.updates_before(step) for step in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]
    counted = [len(minibatches(stage, s, len(stage.order[s]) * 2)) for s in range(7)]
    assert np.cumsum([0, *counted]).tolist() == [stage.updates_before(step) for step in range(8)]
    assert stage.total_updates == 24


def test_metrics_of_updates_are_averaged_and_the_critics_kept_apart() -> None:
    done = [("", {"loss": 1.0}), ("critic/", {"loss": 5.0, "value_loss": 2.0}), ("", {"loss": 3.0})]
    assert joined(done) == {"loss": 2.0, "critic/loss": 5.0, "value_loss": 2.0}
    worst = joined([("", {"ratio/max_deviation": 0.1}), ("", {"ratio/max_deviation": 0.3})])
    assert worst == {"ratio/max_deviation": 0.3}


def test_lengths_have_trls_names() -> None:
    found = lengths(Generations.of([([1], [0.0], "stop"), ([1, 2, 3], [0.0] * 3, "length")], 1, "v", 0.0))
    assert found == {
        "completions/mean_length": 2.0,
        "completions/min_length": 1.0,
        "completions/max_length": 3.0,
        "completions/clipped_ratio": 0.5,
    }


def test_a_warm_up_longer_than_the_stage_is_refused(repository: Path) -> None:
    """64 prompts, 32 a step, one epoch: 2 steps."""
    from actors.models.base.loading import load_tokenizer

    base = str(repository / "assets" / "tiny-moe")
    stage = {
        "data": {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 64},
        "rewards": "exact_match",
        "batch_size": 32,
        "num_train_epochs": 1,
    }
    made = {"name": "a", "model": {"base": base}, "stages": {"ppo": stage | {"critic_warmup_steps": 2}}}
    config = RunConfig.model_validate(made)
    with pytest.raises(UserError, match="only the critic learns in the first 2 steps, and there are 2"):
        prepare(config.stage("ppo"), load_tokenizer(config.model))
    made["stages"] = {"ppo": stage | {"critic_warmup_steps": 1}}
    config = RunConfig.model_validate(made)
    assert prepare(config.stage("ppo"), load_tokenizer(config.model)).total_steps == 2


def test_the_first_update_of_a_step_is_checked_where_log_probabilities_were_stored() -> None:
    within = {"ratio/beyond": 0.0, "ratio/beyond_tenth": 0.0}
    own_pass = PolicyGradient(GrpoStage(**DATA, batch_size=8, num_generations=2, beta=0.0))
    assert own_pass.on_policy
    for metrics in ({}, within):  # Later steps have nothing to compare with: the ratio is 1 by definition.
        own_pass.check_first(metrics, "float32", at_reference=False)
    stored = PolicyGradient(GrpoStage(**DATA, batch_size=8, num_generations=2, beta=0.04))
    stored.check_first(within, "float32", at_reference=False)
    for objective in (own_pass, stored):
        with pytest.raises(InvariantViolation, match="of the tokens"):
            objective.check_first(within | {"ratio/beyond": 1.0}, "float32", at_reference=False)
    with pytest.raises(KeyError):
        stored.check_first({}, "float32", at_reference=False)
