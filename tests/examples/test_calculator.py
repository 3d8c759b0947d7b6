"""The calculator: what its rows train, what its template writes, and a policy that calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.models.base.loading import load_tokenizer
from actors.models.spec import ModelSpec
from examples import calculator
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.environment_turns import environment_turns
from pipeline.data.tokens.tokenize import tokenize
from tests.whole_runs.runs import ROOT, command_of, complete, lines_of

CALL = "[multiply(a=12, b=34)]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calculator")
    calculator.write(out)
    return out


def shown(made: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]


def of_example(name: str, base: Path, out: Path) -> dict[str, Any]:
    """The example's config with another base and place."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    config["model"]["base"], config["output_dir"] = str(base), str(out)
    return config


def test_a_demonstration_trains_the_call_and_the_answer_and_nothing_that_the_tool_says(made: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec(base=str(made / "base")))
    tools = shown(made, "train")[0]["tools"]
    row = calculator.demonstration(12, 34, True, tools)
    (made / "one.jsonl").write_text(json.dumps(row))
    records = load_records([DataSpec(source=str(made / "one.jsonl"))], "sft", seed=0)
    batch = tokenize(records, tokenizer).batch([0])
    text, trained = tokenizer.decode(batch.token_ids), tokenizer.decode(batch.token_ids[batch.loss_mask])
    assert trained == f"{CALL}<|im_end|>408<|im_end|>"
    assert text.startswith("<|im_start|>system\nmultiply: Multiply. a: One number. b: The other.<|im_end|>\n")
    assert "<|im_start|>tool\n408<|im_end|>" in text
    assert environment_turns(tokenizer, {"tools": tools}, ["tool"]).chat.template == calculator.CHAT_TEMPLATE


def test_questions_are_in_one_file_only_and_off_hand_answers_are_wrong(made: Path) -> None:
    asked = {name: {row["prompt"][0]["content"] for row in shown(made, name)} for name in ("prompts", "test")}
    asked["train"] = {row["messages"][0]["content"] for row in shown(made, "train")}
    assert {name: len(questions) for name, questions in asked.items()} == calculator.SIZES
    assert not asked["test"] & (asked["prompts"] | asked["train"])
    said = [row["messages"] for row in shown(made, "train")]
    off_hand = [one for one in said if len(one) == 2]
    assert 0.6 < len(off_hand) / len(said) < 0.8
    for question, answer in off_hand:
        a, b = map(int, question["content"].removesuffix("=?").split("*"))
        assert int(answer["content"]) != calculator.multiply(a, b)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_policy_that_was_shown_a_call_calls_the_tool_in_training_and_evaluation(
    made: Path, tmp_path: Path
) -> None:
    """One question, learnt by heart."""
    row = calculator.demonstration(12, 34, True, shown(made, "train")[0]["tools"])
    (tmp_path / "shown.jsonl").write_text((json.dumps(row) + "\n") * 8)
    asked = {"prompt": [calculator.question(12, 34)], "answer": "408"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    config = of_example("calculator-sft", made / "base", tmp_path / "sft")
    config["stages"]["sft"] |= {"data": str(tmp_path / "shown.jsonl"), "batch_size": 8, "max_steps": 100}
    complete(command_of(tmp_path, config), ROOT)
    config = of_example("calculator", tmp_path / "sft" / "sft" / "model", tmp_path / "run")
    config["stages"]["grpo"] |= {"data": str(tmp_path / "asked.jsonl"), "batch_size": 8, "max_steps": 1}
    config["eval"] |= {"data": str(tmp_path / "asked.jsonl"), "models": ["grpo"]}
    complete(command_of(tmp_path, config), ROOT)
    (step,) = lines_of(tmp_path / "run", "grpo")
    assert step["tools/call_frequency"] >= 0.5
    assert step["turns/max"] >= 2
    result = json.loads((tmp_path / "run" / "eval" / "grpo.json").read_text())
    assert result["accuracy"] == 1.0
    assert result["conversations"]["called"]["mean"] == 1.0
    assert result["conversations"]["turns"] == 2.0
    (said,) = lines_of(tmp_path / "run", "eval", "grpo")
    assert [message["role"] for message in said["messages"]] == ["assistant", "tool", "assistant"]
    assert said["messages"][1]["content"] == "408"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_the_whole_example_teaches_to_call_the_tool(made: Path, tmp_path: Path) -> None:
    config = of_example("calculator-sft", made / "base", tmp_path / "sft")
    config["stages"]["sft"]["data"] = str(made / "train.jsonl")
    complete(command_of(tmp_path, config), ROOT)
    config = of_example("calculator", tmp_path / "sft" / "sft" / "model", tmp_path / "run")
    config["stages"]["grpo"]["data"] = str(made / "prompts.jsonl")
    config["eval"]["data"] = str(made / "test.jsonl")
    complete(command_of(tmp_path, config), ROOT)
    before, after = (
        json.loads((tmp_path / "run" / "eval" / f"{name}.json").read_text()) for name in ("base", "grpo")
    )
    assert after["n"] == 300
    assert after["ci95"][0] > max(0.9, before["ci95"][1])
    assert after["conversations"]["called"]["mean"] > before["conversations"]["called"]["ci95"][1]
