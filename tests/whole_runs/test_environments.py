"""Runs whose samples are conversations, on real Ray and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs.runs import (
    TINY_MOE,
    adapter_digest,
    command_of,
    complete,
    has_done,
    kill_an_engine_as_it_generates,
    kill_when,
    lines_of,
    start,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

WORLDS = """
def ask(prompt, base_url, api_key):
    from openai import OpenAI

    OpenAI(base_url=base_url, api_key=api_key).chat.completions.create(model="policy", messages=prompt)


def tries(row, base_url, api_key):
    from openai import OpenAI

    client, messages = OpenAI(base_url=base_url, api_key=api_key), list(row["prompt"])
    for _ in range(3):
        made = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        if made.content.strip() == str(row["answer"]):
            return 1.0
        messages += [made, {"role": "user", "content": "Again. " + row["prompt"][0]["content"]}]
    return 0.0


class One:
    def reset(self):
        return None

    def step(self, messages):
        return [], None, True


class Tries:
    def __init__(self, row, seed):
        self.row, self.left = row, 3

    def reset(self):
        return None

    def step(self, messages):
        self.left -= 1
        right = messages[-1]["content"].strip() == str(self.row["answer"])
        again = [{"role": "user", "content": "Again. " + messages[0]["content"]}]
        return ([] if right else again), float(right), right or not self.left
"""


def command_for(directory: Path, engines: int = 1, **stage: Any) -> list[str]:
    directory.mkdir()
    (directory / "worlds.py").write_text(WORLDS)
    grpo = {
        "data": {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 64},
        "batch_size": 32, "num_generations": 4, "max_completion_length": 12, "max_length": 256,
        "max_steps": 2, "save_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    lora = {"r": 4, "lora_alpha": 8, "targets": ["attention", "experts"]}
    run = {
        "name": "turns", "output_dir": str(directory / "run"), "seed": 5,
        "model": {"base": str(TINY_MOE), "lora": lora}, "stages": {"grpo": grpo | stage},
        "roles": {"rollout": {"workers": engines}}, "logging": {"logging_steps": 1},
    }  # fmt: skip
    return command_of(directory, run)


def test_an_environment_or_agent_of_one_turn_gives_the_adapter_of_the_stage_without(tmp_path: Path) -> None:
    adapters = []
    ways = {"without": {}, "with": {"env": "worlds:One"}, "agent": {"agent": "worlds:ask"}}
    for name, more in ways.items():
        complete(command_for(tmp_path / name, rewards="exact_match", **more), tmp_path / name)
        adapters.append(adapter_digest(tmp_path / name / "run", "grpo"))
    assert adapters[0] == adapters[1] == adapters[2]


@pytest.mark.slow
def test_one_engine_or_three_an_agent_and_runs_that_were_killed_give_the_same_conversations(
    tmp_path: Path,
) -> None:
    stage = {"max_completion_length": 100, "max_steps": 4}
    adapters, samples = [], []
    for name, engines in (("one", 1), ("three", 3), ("killed", 1), ("killed-agent", 2)):
        directory, who = tmp_path / name, "agent" if "agent" in name else "env"
        speaks = {"env": "worlds:Tries", "agent": "worlds:tries"}[who]
        command = command_for(directory, engines, **stage, **{who: speaks})
        if "killed" in name:
            # In its third step, whose conversations are drawn by the second version.
            begun = has_done(directory / "run", "policy-0", "weight_source.prepare", 3)
            kill_when(command, directory, begun)
        complete(command, directory)
        adapters.append(adapter_digest(directory / "run", "grpo"))
        rows = lines_of(directory / "run", "grpo", "samples")
        samples.append([row["completion"] for row in rows])
    assert len(set(adapters)) == 1
    assert samples[0] == samples[1] == samples[2] == samples[3]
    assert any("Again." in text for text in samples[0])


@pytest.mark.slow
def test_conversations_that_were_drawn_ahead_are_gone_on_with_after_a_kill(tmp_path: Path) -> None:
    stage = {"env": "worlds:Tries", "max_completion_length": 100, "staleness": 1, "max_steps": 4}
    complete(command_for(tmp_path / "whole", **stage), tmp_path / "whole")
    command, run = command_for(tmp_path / "killed", **stage), tmp_path / "killed" / "run"
    kill_when(command, tmp_path / "killed", has_done(run, "policy-0", "weight_source.prepare", 4))
    complete(command, tmp_path / "killed")
    assert adapter_digest(run, "grpo") == adapter_digest(tmp_path / "whole" / "run", "grpo")
    assert max(row["staleness/max"] for row in lines_of(run, "grpo")) == 1


@pytest.mark.slow
def test_an_engine_that_dies_in_the_middle_of_conversations_changes_nothing(tmp_path: Path) -> None:
    stage = {"env": "worlds:Tries", "max_completion_length": 100, "max_steps": 3}
    complete(command_for(tmp_path / "whole", **stage), tmp_path / "whole")
    command, run = command_for(tmp_path / "killed", 2, **stage), tmp_path / "killed" / "run"
    kill_an_engine_as_it_generates(start(command, tmp_path / "killed"), run)
    assert adapter_digest(run, "grpo") == adapter_digest(tmp_path / "whole" / "run", "grpo")


@pytest.mark.slow
def test_weights_in_flight_change_between_turns(tmp_path: Path) -> None:
    directory = tmp_path / "keep"
    stage = {"env": "worlds:Tries", "max_completion_length": 100, "staleness": 1, "max_steps": 4}
    complete(command_for(directory, **stage, sync={"in_flight": "keep"}), directory)
    assert max(row["staleness/max"] for row in lines_of(directory / "run", "grpo")) == 1


@pytest.mark.slow
def test_experts_of_all_turns_are_replayed(tmp_path: Path) -> None:
    directory = tmp_path / "replayed"
    command = command_for(directory, env="worlds:Tries", max_completion_length=100)
    command += ["model.moe.router_replay=rollout", "model.moe.router_aux_loss_coef=0"]
    complete(command, directory)
    rows = lines_of(directory / "run", "grpo")
    assert min(row["moe/route_agreement"] for row in rows) > 0.99
