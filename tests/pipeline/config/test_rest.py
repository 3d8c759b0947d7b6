"""All mistakes at once: what pydantic refuses hides no broken rule elsewhere, and makes up none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.config.load import load_mapping

GOOD: dict[str, Any] = {
    "name": "a",
    "model": {"base": "b"},
    "stages": {
        "sft": {
            "data": [{"source": "x", "weight": 1}, {"source": "y", "weight": 2}],
            "eval_data": [{"source": "q"}, "r"],
            "eval_steps": 5,
        },
        "reward": {"data": "p", "eval_data": {"source": "q"}},
        "dpo": {"data": ["x", "y"], "eval_data": {"source": "q"}},
        "grpo": {"data": ["x", {"source": "y"}], "rewards": ["exact_match", {"source": "m:f"}, "reward"]},
        "ppo": {"data": "x", "rewards": "reward"},
    },
    "eval": {"data": [{"source": "h"}, "i"]},
}
REFUSED = [
    "model.dtype=8",
    "nam=1",
    "seed=-1",
    "stages.sft.data.0.max_rows=0",
    "stages.sft.data.1.weight=-1",
    "stages.sft.eval_data.0.splt=1",
    "stages.sft.eval_data.1=3",
    "stages.reward.eval_data={split: test}",
    "stages.dpo.data.0.columns={foo: x}",
    "stages.dpo.eval_data.max_rows=0",
    "stages.dpo.beta=-1",
    "stages.grpo.data.1.layout=foo",
    "stages.grpo.rewards.0=3",
    "stages.grpo.rewards.1.timeout_s=-1",
    "stages.ppo.data=3",
    "stages.baz=3",
    "stages.foo={type: bar}",
    "eval.data.0.splitt=y",
    "eval.data.1={source: ''}",
    "roles.policy.workers=0",
    "limits.start=-1",
]
"""Values that pydantic refuses."""
BROKEN = [
    "model.lora.targets=[router, router]",
    "stages.sft.max_steps=0",
    "stages.sft.lr_scheduler_kwargs={a: 1}",
    "stages.reward.init=nope",
    "stages.dpo.loss_weights=[1,2]",
    "stages.grpo.num_generations=7",
    "stages.grpo.rewards.2=nope",
    "stages.ppo.critic_init=sft",
    "stages.base={type: sft, data: x}",
    "eval.models=[nope]",
    "eval.metric=bad",
    "roles.reference.share=rollout",
]
"""Values that break a rule between keys."""


def said(mistakes: Sequence[str]) -> set[str]:
    """Keys that the one message names."""
    with pytest.raises(UserError) as refused:
        load_mapping(GOOD, mistakes)
    return {problem.split(": ")[0] for problem in refused.value.problems}


@pytest.mark.parametrize("mistake", REFUSED + BROKEN)
def test_a_mistake_alone_is_one_problem(mistake: str) -> None:
    (key,) = said([mistake])
    assert key.startswith(mistake.split("=")[0].rpartition(".")[0])


def test_a_mistake_hides_no_other_one() -> None:
    alone = {mistake: said([mistake]) for mistake in REFUSED + BROKEN}
    for first, second in itertools.product(REFUSED, BROKEN):
        assert said([first, second]) == alone[first] | alone[second], (first, second)


def test_a_mistake_in_each_place_is_said_at_once_and_nothing_else_is() -> None:
    alone = set[str]().union(*(said([mistake]) for mistake in REFUSED + BROKEN))
    assert said(REFUSED + BROKEN) == alone


@pytest.mark.parametrize(
    ("mistakes", "keys"),
    [
        # More elements than ten, and two of them go: the numbers of the others stay.
        (
            ["stages.dpo.data=[a, b, 3, d, e, f, g, h, i, j, 5, {source: l, weight: 1}]"],
            "data.2 data.10",
        ),
        # A weight that is refused is still one, and one that may have been meant as well.
        (["stages.dpo.data=[{source: a, weight: -1}, {source: b, weight: 1}]"], "data.0.weight"),
        (["stages.dpo.data=[{source: a, wieght: 1}, {source: b, weight: 1}]"], "data.0.wieght"),
        (["stages.dpo.data=[{source: a, weight: 1}, {source: b, spilt: x}]"], "data data.1.spilt"),
        # Losses and their weights belong together.
        (["stages.dpo.loss_type=[sigmoid, foo]", "stages.dpo.loss_weights=[1, 2]"], "loss_type.1"),
    ],
)
def test_what_follows_from_a_mistake_is_not_told_as_another(mistakes: list[str], keys: str) -> None:
    assert said(mistakes) == {f"stages.dpo.{key}" for key in keys.split()}


def test_a_stage_of_no_type_may_be_what_others_name() -> None:
    named = ["stages.more={type: nope, data: x}", "stages.last={type: ppo, data: x, rewards: more}"]
    assert said(named) == {"stages.more"}
    assert said([*named, "stages.last.init=nothing"]) == {"stages.more", "stages.last.init"}


def test_weights_of_some_sources_only_are_refused() -> None:
    assert said(["stages.dpo.data.1.weight=1"]) == {"stages.dpo.data"}
    assert said(["stages.sft.eval_data.0.weight=1", "eval.data.1.weight=1"]) == {
        "stages.sft.eval_data",
        "eval.data",
    }
