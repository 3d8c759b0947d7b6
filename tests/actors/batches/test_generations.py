"""Seeds of samples, and generations as columns."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from actors.batches.generations import Generations, SamplingSpec, sample_seed
from actors.batches.routed_experts import RoutedExperts


def test_seeds_of_neighbours_have_nothing_in_common_and_fit_63_bits() -> None:
    seeds = {sample_seed(0, step, p, s) for step in range(4) for p in range(50) for s in range(4)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 0, 0, 1) - sample_seed(0, 0, 0, 0) != 1


def test_a_seed_depends_on_run_step_prompt_and_sample_only() -> None:
    assert sample_seed(1, 2, 3, 4) == sample_seed(1, 2, 3, 4)
    assert (
        len({sample_seed(*place) for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]}) == 4
    )


def test_stages_and_attempts_sample_with_other_seeds() -> None:
    """The first of them is the seed of evaluations: it has neither."""
    places = [("", 0), ("grpo", 0), ("ppo", 0), ("grpo", 1)]
    seeds = [sample_seed(1, 2, 3, 4, stage, attempt) for stage, attempt in places]
    assert len(set(seeds)) == 4
    assert seeds[0] == sample_seed(1, 2, 3, 4) == 6152771116767582224


def test_versions_go_with_tokens_through_joining_and_files() -> None:
    old, new = (Generations.of([([1, 2], [0.0, 0.0], "stop")], 1, "m", 1.0, version) for version in (3, 4))
    with pytest.raises(ValueError, match=r"not of \[\('m', 3\), \('m', 4\)\]"):
        Generations.join([old, new], 1)
    both = Generations.join([old, new], 1, mixed=True)
    assert both.token_versions.tolist() == [3, 3, 4, 4]
    assert (both.version, both.seconds) == (3, 2.0)
    again = Generations.from_arrays(both.arrays(), both.n, both.label, both.seconds)
    assert again.token_versions.tolist() == [3, 3, 4, 4]
    assert [ids.tolist() for ids in again.sequences()] == [[1, 2], [1, 2]]


def test_generations_keep_samples_apart() -> None:
    made = Generations.of(
        [([5, 6], [-0.5, -1.0], "stop"), ([], [], "abort"), ([7], [-2.0], "length")], 1, "m", 0.1
    )
    assert [ids.tolist() for ids in made.sequences()] == [[5, 6], [], [7]]
    assert made.finish_reasons == ["stop", "abort", "length"]
    assert len(made.finish) == 3
    np.testing.assert_allclose(made.logprobs, [-0.5, -1.0, -2.0])


def test_no_samples_are_no_error() -> None:
    assert list(Generations.of([], 1, "m", 0.0).sequences()) == []


def test_texts_are_cut_before_the_first_stop_string() -> None:
    from actors.models.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("12+5=17 END and so on;", add_special_tokens=False)
    made = Generations.of([(ids, [0.0] * len(ids), "stop")], 1, "m", 0.0)
    assert made.texts(tokenizer) == ["12+5=17 END and so on;"]
    assert made.texts(tokenizer, [";", " END"]) == ["12+5=17"]


def test_samples_can_be_selected_in_any_order_with_all_that_belongs_to_them() -> None:
    drawn = [([1, 2], [-0.1, -0.2], "stop"), ([3], [-0.3], "length"), ([4, 5, 6], [-0.4, -0.5, -0.6], "stop")]
    experts = RoutedExperts.of([np.full((n, 1, 2), n, np.uint8) for n in (2, 1, 3)])
    found = Generations.of(drawn, 1, "v", 0.0, version=4).with_experts(experts).select([2, 0])
    assert [ids.tolist() for ids in found.sequences()] == [[4, 5, 6], [1, 2]]
    assert found.logprobs.tolist() == pytest.approx([-0.4, -0.5, -0.6, -0.1, -0.2])
    assert (found.finish_reasons, found.version) == (["stop", "stop"], 4)
    assert found.routed_experts is not None
    assert [int(one[0, 0, 0]) for one in found.routed_experts.samples()] == [3, 2]


@pytest.mark.parametrize(
    ("wrong", "instead"),
    [
        (0.005, "vLLM would draw at 0.01; write 0.01 to 2, or 0 for"),
        (1e-9, "vLLM would draw at 0.01"),
        (2.5, "vLLM takes 2 at most"),
    ],
)
def test_a_temperature_that_vllm_would_change_is_refused(wrong: float, instead: str) -> None:
    with pytest.raises(ValidationError, match=instead):
        SamplingSpec(temperature=wrong)


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.7, 2.0])
def test_vllm_samples_at_every_temperature_that_is_allowed(temperature: float) -> None:
    pytest.importorskip("vllm")
    from actors.rollout.vllm.requests import sampling_params

    assert sampling_params(SamplingSpec(temperature=temperature), 1).temperature == temperature
