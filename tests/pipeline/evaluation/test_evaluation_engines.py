"""Held-out prompts through engines of which one dies: it is replaced, serves the same model, and all answers
are there."""

from pathlib import Path

import pytest

from actors.batches.generations import SamplingSpec, sample_seed
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from pipeline.artifacts.weights import Weights
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.prompts import PromptData
from pipeline.evaluation.held_out import EvalSet, generate


class Tokenizer:
    """Writes token ids as text."""

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, one)) for one in ids]


@pytest.mark.ray
def test_an_engine_that_dies_in_an_evaluation_is_replaced(ray_cluster: None, tmp_path: Path) -> None:
    group = WorkerGroup("rollout", RoleSpec(workers=2), LimitsSpec(start=60, stop=1), tmp_path / "logs")
    try:
        group.start().ready().build("tests.actors.rollout.pool_engines:ServedEngine", str(tmp_path)).result()
        prompts = [[1002 if i == 30 else i, i] for i in range(40)]
        weights = Weights("base", "adapter", "fingerprint")
        asked = [str(ids) for ids in prompts]
        held_out = EvalSet(PromptData([*asked], asked, prompts, {}, Skipped(), ""), SamplingSpec())
        texts = generate(group, weights, "grpo", held_out, Tokenizer(), seed=3).texts(Tokenizer())
        seeds = [sample_seed(3, 0, i, 0) for i in range(40)]
        assert texts == [f"{seed % 97} {sum(prompt)} 3" for seed, prompt in zip(seeds, prompts)]
        assert sorted(member.generation for member in group.fleet.members) == [0, 1]
    finally:
        group.shutdown()
