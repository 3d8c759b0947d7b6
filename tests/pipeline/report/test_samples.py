"""Generations side by side, and the paired comparison of two models."""

from __future__ import annotations

import pytest

from pipeline.report.evals import paired_difference
from pipeline.report.samples import TEXT_LIMIT, as_text, clip, samples_by_step, side_by_side, stage_samples


def rows(scores: list[float]) -> list[dict[str, object]]:
    return [{"prompt": f"p{at}", "completion": "c", "score": score} for at, score in enumerate(scores)]


def test_prompts_are_joined_and_losses_are_always_shown() -> None:
    before = rows([0.0] * 10 + [1.0] * 10)
    after = rows([1.0] * 10 + [0.0] * 1 + [1.0] * 9)
    side = side_by_side({"base": before, "sft": after})
    assert side.counts == {"better": 10, "worse": 1, "same": 9}
    assert side.total == 20
    assert [sample.change for sample in side.samples] == ["better"] * 4 + ["worse"] + ["same"] * 4


def test_a_stages_samples_before_and_after_stand_side_by_side() -> None:
    side = stage_samples([{"prompt": "1+1", "before": "3", "after": "2"}])
    assert [(answer.label, answer.text) for answer in side.samples[0].answers] == [
        ("before", "3"),
        ("after", "2"),
    ]
    side = stage_samples([{"prompt": "1+1", "when": when, "completion": "2"} for when in ("before", "after")])
    assert side.labels == ["before", "after"]


def test_messages_become_text_and_long_texts_are_cut_with_a_count() -> None:
    assert as_text([{"role": "user", "content": "hi"}]) == "hi"
    assert as_text([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]) == (
        "system: be brief\nuser: hi"
    )
    assert clip("x" * (TEXT_LIMIT + 7)).endswith("… (7 more characters)")


def test_the_chat_templates_markers_are_left_out_and_shared_words_stay() -> None:
    around = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    rows = [{"prompt": around.format(f"What is\n{n}?"), "completion": "c"} for n in (1, 2)]
    assert [sample.prompt for sample in side_by_side({"base": rows}).samples] == [
        "What is\n1?",
        "What is\n2?",
    ]
    plain = [{"prompt": f"Sum up:\n{n}", "completion": "c"} for n in (1, 2)]
    assert side_by_side({"base": plain}).samples[0].prompt == "Sum up:\n1"
    assert side_by_side({"base": rows[:1]}).samples[0].prompt == rows[0]["prompt"].strip("\n")


def test_a_model_that_gets_more_of_the_same_prompts_right_is_better() -> None:
    before, after = rows([0.0, 1.0] * 100), rows([1.0, 1.0] * 50 + [0.0, 1.0] * 50)
    difference = paired_difference(before, after)
    assert difference is not None
    assert difference.value == pytest.approx(0.25)
    # Normal approximation of the same interval: .25 -+ 1.96 sqrt(.25 * .75 / 200) = .190 to .310
    assert difference.low == pytest.approx(0.190, abs=0.012)
    assert difference.high == pytest.approx(0.310, abs=0.012)
    assert difference.verdict == "better"


def test_equal_models_are_even_and_other_prompts_are_not_compared() -> None:
    same = paired_difference(rows([0.0, 1.0] * 20), rows([1.0, 0.0] * 20))
    assert same is not None
    assert same.verdict == "even"
    assert paired_difference(rows([0.0]), [{"prompt": "another", "score": 1.0}]) is None
    assert paired_difference([], []) is None


def test_of_an_online_stage_a_few_steps_show_the_prompts_whose_answers_differ_most() -> None:
    def row(step: int, prompt: str, reward: float) -> dict[str, object]:
        return {"step": step, "prompt": prompt, "completion": f"{reward}", "reward": reward}

    generated = [row(step, "all right", 1.0) for step in range(100) for _ in range(6)]
    generated += [row(step, "mixed", reward) for step in range(100) for reward in (0, 1, 0.5, 0.2, 0.7, 0.1)]
    shown = samples_by_step([*generated, {"prompt": "no step", "completion": "x"}], {0: 0.71})
    assert [one.step for one in shown] == [0, 25, 50, 74, 99]
    assert [one.reward for one in shown] == [0.71, None, None, None, None]
    assert not shown[0].singles
    assert [sample.prompt for sample in shown[0].samples] == ["mixed", "all right"]
    assert [answer.score for answer in shown[0].samples[0].answers] == [1.0, 0.7, 0.1, 0.0]


@pytest.mark.parametrize("nobody", [float("nan"), None])
def test_a_sample_that_nobody_scored_is_shown_without_a_score(nobody: float | None) -> None:
    """NaN in files of earlier versions, null now."""
    (answer,) = (
        side_by_side({"base": [{"prompt": "p", "completion": "c", "score": nobody}]}).samples[0].answers
    )
    assert (answer.score, answer.verdict) == (None, "")
    row = {"step": 1, "prompt": "p", "completion": "c", "reward": nobody}
    assert samples_by_step([row], {})[0].samples[0].answers[0].score is None
