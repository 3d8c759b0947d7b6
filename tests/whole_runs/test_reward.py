"""SFT -> reward model through the command line on real Ray: the artifact, its pairs, and `raylign eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from actors.models.base.loading import load_tokenizer
from actors.models.spec import ModelSpec
from actors.trainer.model_host import ModelHost
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import tokenize
from tests.actors.trainer.host_cases import host_spec
from tests.whole_runs.runs import command_of, complete, lines_of, raylign

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PAIRS = DataSpec(source="builtin:arithmetic", split="test_preference", max_rows=40)


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its directory is `run` beside it."""
    path = tmp_path_factory.mktemp("reward") / "run.yaml"
    stage = {"batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "max_length": 128}
    data = {"source": "builtin:arithmetic", "max_rows": 64}
    content = {
        "name": "judged",
        "output_dir": str(path.parent / "run"),
        "model": {"base": str(tiny_base), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "sft": {"data": data | {"split": "train"}, **stage},
            "reward": {
                "data": data | {"split": "preference"},
                "eval_data": PAIRS.model_dump(exclude_defaults=True),
                "center_rewards_coefficient": 0.01,
                **stage,
            },
        },
        "roles": {"policy": {"workers": 2}},
    }
    assert "Held-out pairs" in complete(command_of(path.parent, content), path.parent)
    return path


def evaluation(run: Path) -> dict[str, object]:
    found = json.loads((run / "run.json").read_text())["eval"]["reward"]
    return {name: value for name, value in found.items() if name != "seconds"}


def test_the_artifact_is_a_reward_model_and_its_held_out_pairs_are_scored(
    config: Path, tiny_base: Path
) -> None:
    run = config.parent / "run"
    assert json.loads((run / "reward" / "manifest.json").read_text())["type"] == "reward_model"
    assert json.loads((run / "sft" / "manifest.json").read_text())["type"] == "adapter"
    assert "AutoModelForSequenceClassification" in (run / "reward" / "adapter" / "README.md").read_text()
    host = ModelHost(host_spec(tiny_base))
    host.add_adapter("reward", run / "reward" / "adapter")
    tokenizer = load_tokenizer(ModelSpec(base=str(tiny_base)))
    pairs = tokenize(load_records([PAIRS], "preference", seed=0), tokenizer, scored=True)
    scores = host.scores.scores(pairs.sequences, "reward").reshape(-1, 2)
    found = evaluation(run)
    assert (found["metric"], found["n"]) == ("pair_accuracy", 40)
    assert found["accuracy"] == pytest.approx(np.mean(scores[:, 0] > scores[:, 1]))
    assert found["margin"] == pytest.approx(np.mean(scores[:, 0] - scores[:, 1]), abs=1e-5)
    last = lines_of(run, "reward")[-1]
    assert last["eval_accuracy"] == pytest.approx(found["accuracy"])


def test_eval_scores_the_pairs_again_where_that_was_lost(config: Path) -> None:
    run = config.parent / "run"
    before = evaluation(run)
    shutil.rmtree(run / "eval")
    said = raylign("eval", str(config))
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    assert "Held-out pairs" in said.stdout
    after = evaluation(run)
    assert after["margin"] == pytest.approx(before["margin"], abs=1e-6)
    assert {**after, "margin": 0} == {**before, "margin": 0}
    assert len((run / "eval" / "reward.jsonl").read_text().splitlines()) == 40
