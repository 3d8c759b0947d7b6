"""Stages that were finished before settings and losses shared their declarations stay finished.

`earlier_manifests.json` was written by the version before: the run, and of each stage the settings in its
manifest (with the model's, which all have in common) and its fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts.identity import decide
from pipeline.artifacts.manifest import Manifest, write_json
from pipeline.config.run_config import RunConfig
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.prompts import PromptData
from pipeline.planning.nodes import stage_identity, with_prepared
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.specs.registry import STAGE_TYPES, GrpoStage

EARLIER: dict[str, Any] = json.loads(Path(__file__).with_name("earlier_manifests.json").read_text())
INPUTS, DATA, SEED = {"base": "abc"}, "data", 0


def finished_earlier(directory: Path, stage: str) -> None:
    earlier = EARLIER["stages"][stage]
    manifest = Manifest(
        type="adapter",
        stage=stage,
        fingerprint=earlier["fingerprint"],
        inputs=INPUTS,
        config={"stage": earlier["stage"], "model": EARLIER["model"]},
        data={"fingerprint": DATA},
        seed=SEED,
    )
    write_json(directory / "manifest.json", manifest.model_dump())


NEWER = {"distill"}
"""Types of stages that the version before did not have."""


@pytest.mark.parametrize("stage", sorted(STAGE_TYPES.keys() - NEWER))
def test_a_stage_of_the_version_before_is_fresh(stage: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(EARLIER["run"])
    finished_earlier(tmp_path, stage)
    identity = stage_identity(config, config.stages[stage], INPUTS, DATA, SEED)
    decision = decide(tmp_path, identity)
    assert (decision.state, decision.changed) == ("fresh", [])


def test_a_setting_that_moved_to_the_loss_still_tells_stages_apart(tmp_path: Path) -> None:
    run = json.loads(json.dumps(EARLIER["run"]))
    run["stages"]["grpo"]["epsilon_high"] = 4.0
    config = RunConfig.model_validate(run)
    finished_earlier(tmp_path, "grpo")
    decision = decide(tmp_path, stage_identity(config, config.stages["grpo"], INPUTS, DATA, SEED))
    assert (decision.state, decision.changed) == ("changed", ["stage.epsilon_high"])


@pytest.mark.parametrize(
    ("prompts", "steps", "state"), [(8, 3, "fresh"), (10, 2, "fresh"), (10, 3, "changed")]
)
def test_a_stage_is_made_again_only_where_a_step_was_smaller_than_the_others(
    prompts: int, steps: int, state: str, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(EARLIER["run"])
    finished_earlier(tmp_path, "grpo")
    spec = config.stages["grpo"]
    assert isinstance(spec, GrpoStage)
    data = PromptData(["q"] * prompts, ["q"] * prompts, [[1]] * prompts, {}, Skipped(), DATA)
    order = BatchOrder(prompts, 4, SEED, max_steps=steps, whole=True)
    prepared = PreparedRl("grpo", spec, SEED, data, order, spec.sampling())
    identity = with_prepared(stage_identity(config, spec, INPUTS, DATA, SEED), prepared)
    decision = decide(tmp_path, identity)
    assert (decision.state, decision.changed) == (state, ["last_step"] if state == "changed" else [])
