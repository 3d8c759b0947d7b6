"""The version that samples each step, the steps that overlap, and their return from a checkpoint."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.batches import Episode, GrowingSample
from actors.batches.generations import Generations, sample_seed
from actors.errors import InvariantViolation, RunFailure
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.prompts import PromptData
from pipeline.stages.online.loop import RlLoop
from pipeline.stages.online.rewards import Rewards
from pipeline.stages.online.sampler import Prefetcher, SampledBatch, Sampler, load_sampled, save_sampled
from tests.pipeline.stages.online.test_loop import loop  # noqa: F401  (a fixture)

DATA = PromptData(["p", "q"], ["p", "q"], [[1], [2]], {"answer": ["7", "8"]}, Skipped(), "f")


class Engines:
    """Serve a version, and note which one drew which step."""

    def __init__(self) -> None:
        self.version, self.sampled = 0, dict[int, int]()

    def sample(self, step: int) -> SampledBatch:
        self.sampled[step] = self.version
        samples = Generations.of([([step], [-1.0], "stop")], 1, "m", 0.0, self.version)
        return SampledBatch(np.array([step % 2]), DATA.select([step % 2]), samples)


def train(engines: Engines, prefetcher: Prefetcher, steps: range) -> list[int]:
    """The loop's order: take, train, settle, new weights. Versions of the samples of each step."""
    versions = []
    for step in steps:
        versions.append(prefetcher.take(step).samples.version)
        prefetcher.settle()
        engines.version = step + 1
    return versions


@pytest.mark.parametrize(
    ("staleness", "versions"), [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (3, [0, 0, 0, 0, 1, 2])]
)
def test_samples_of_step_k_come_from_version_k_minus_the_staleness(
    staleness: int, versions: list[int]
) -> None:
    engines = Engines()
    assert train(engines, Prefetcher(engines.sample, staleness, 6), range(6)) == versions
    assert sorted(engines.sampled) == list(range(6))


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_resumed_stage_uses_what_was_drawn_before_it_was_killed(staleness: int, tmp_path: Path) -> None:
    whole = Engines()
    expected = train(whole, Prefetcher(whole.sample, staleness, 6), range(6))
    first = Engines()
    prefetcher = Prefetcher(first.sample, staleness, 6)
    versions = train(first, prefetcher, range(3))
    prefetcher.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"drawn-{step}.safetensors" for step in range(3, 3 + staleness)
    ]
    resumed = Engines()
    resumed.version = 3
    again = Prefetcher(resumed.sample, staleness, 6)
    again.load(tmp_path, DATA)
    assert versions + train(resumed, again, range(3, 6)) == expected
    assert first.sampled | resumed.sampled == whole.sampled
    assert not first.sampled.keys() & resumed.sampled.keys()


@pytest.mark.parametrize("scored", [None, [0.1, float("nan")]])
def test_a_batch_comes_back_from_its_file_as_it_was(scored: list[float] | None, tmp_path: Path) -> None:
    samples = Generations.of([([5, 6], [-0.5, -1.0], "stop"), ([7], [-2.0], "length")], 1, "m", 0.25, 4)
    load = np.arange(6).reshape(2, 3)
    rewards = None if scored is None else Rewards(np.array(scored), {"r": 0.5}, ["stood in"])
    sampled = SampledBatch(
        np.array([1, 0]), DATA.select([1, 0]), samples, load, rewards, {"a": 1.0}, ("said",)
    )
    save_sampled(tmp_path / "drawn-9.safetensors", sampled)
    again = load_sampled(tmp_path / "drawn-9.safetensors", DATA)
    for name, value in samples.arrays().items():
        np.testing.assert_array_equal(again.samples.arrays()[name], value)
    assert (again.samples.n, again.samples.label, again.samples.seconds) == (1, "m", 0.25)
    np.testing.assert_array_equal(again.expert_load, load)
    assert again.prompts == sampled.prompts
    assert (again.metrics, again.notes, again.rows.tolist()) == ({"a": 1.0}, ("said",), [1, 0])
    assert (again.rewards is None) == (scored is None)
    if again.rewards is not None:
        np.testing.assert_array_equal(again.rewards.values, np.array(scored))
        assert (again.rewards.metrics, again.rewards.notes) == ({"r": 0.5}, ["stood in"])


def test_conversations_come_back_from_their_file_with_the_prompts_that_they_began_with(
    tmp_path: Path,
) -> None:
    messages: list[list[dict[str, str]]] = [[{"role": "user", "content": text}] for text in ("p", "q")]
    data = replace(DATA, messages=messages, template_kwargs=[{}, {}])
    talks = []
    for drawn in ([5], [6, 7]):
        sample = GrowingSample([9, 9])
        sample.drew(drawn, [-1.0] * len(drawn), [3] * len(drawn), 0)
        sample.earned(0.5)
        talks.append(sample)
    more = {"prompt_ids": [9, 9], "prompt_text": "q and more", "turns": 1, "ended": "done"}
    begun = [[{"role": "user", "content": "q and more"}], messages[1]]
    episodes = [Episode(prompt=prompt, messages=[{"role": "assistant"}], **more) for prompt in begun]  # type: ignore[arg-type]
    samples = Generations.of_episodes(talks, episodes, 2, "m", 0.5)
    sampled = SampledBatch(np.array([1]), data.of_samples([1], samples), samples)
    assert sampled.prompts.prompts == [begun[0], "q"]
    assert sampled.prompts.token_ids == [[9, 9], [9, 9]]
    save_sampled(tmp_path / "drawn-1.safetensors", sampled)
    again = load_sampled(tmp_path / "drawn-1.safetensors", data)
    assert again.prompts == sampled.prompts
    assert again.samples.episodes == samples.episodes
    for name, value in samples.arrays().items():
        np.testing.assert_array_equal(again.samples.arrays()[name], value)


def test_a_later_step_is_drawn_while_an_earlier_one_trains() -> None:
    training, drawing = threading.Event(), threading.Event()

    def sample(step: int) -> SampledBatch:
        if step == 1:
            drawing.set()
            assert training.wait(5)
        return Engines().sample(step)

    prefetcher = Prefetcher(sample, 1, 3)
    prefetcher.take(0)
    assert drawing.wait(5)
    training.set()
    prefetcher.settle()


def test_batches_are_drawn_together_where_weights_may_change_meanwhile() -> None:
    both = threading.Barrier(2, timeout=5)

    def sample(step: int) -> SampledBatch:
        both.wait()
        return Engines().sample(step)

    assert len(Prefetcher(sample, 1, 2, together=True).take(0).samples.finish) == 1


def test_what_fails_while_it_is_drawn_ahead_fails_the_step_that_waits_for_it() -> None:
    def sample(step: int) -> SampledBatch:
        if step == 1:
            raise RunFailure("rollout-0", "generate", "gone")
        return Engines().sample(step)

    prefetcher = Prefetcher(sample, 1, 3)
    prefetcher.take(0)
    with pytest.raises(RunFailure, match="gone"):
        prefetcher.settle()


def test_steps_of_stale_samples_say_how_old_they_are(loop: RlLoop) -> None:  # noqa: F811
    """Versions 0, 0, 1 for steps 0, 1, 2; the loop that allows no age refuses the second."""
    object.__setattr__(loop.spec, "staleness", 1)
    stale = RlLoop(loop.stage, loop.ctx)
    ages = [stale.step(step).metrics["staleness/mean"] for step in range(3)]
    assert ages == [0.0, 1.0, 1.0]
    object.__setattr__(loop.spec, "staleness", 0)
    loop.ctx.rollout.version = 0  # type: ignore[attr-defined]
    with pytest.raises(InvariantViolation, match="drawn by other weights than versions 2 to 2"):
        RlLoop(loop.stage, loop.ctx).step(2)


def test_a_prompt_that_comes_twice_in_a_step_gets_other_samples(loop: RlLoop) -> None:  # noqa: F811
    asked: list[int] = []
    loop.ctx.rollout.generate = lambda prompts, sampling, seeds: asked.extend(seeds)  # type: ignore[method-assign,assignment,return-value]
    sampler = Sampler(loop.stage, loop.ctx.rollout, loop.rewards, loop.ctx.tokenizer)
    sampler.ask(5, np.array([2, 0, 2]))
    assert asked == [sample_seed(3, 5, row, number, "ppo") for row, number in ((2, 0), (0, 0), (2, 1))]
