"""Model cards: the metadata header, and what a reader needs to use the directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from pipeline.report import CardFacts, adapter_card, write_card
from pipeline.report.run_view import EvalRow

FACTS = CardFacts(
    name="demo: dpo",
    stage_type="dpo",
    base_model="org/base",
    started_from="sft",
    datasets=["org/pairs", "builtin:arithmetic", "data/pairs/train.jsonl"],
    settings={"learning_rate": 5e-4, "loss_type": "a|b"},
    evaluations=[EvalRow("base", "exact_match", 0.25, 500, (0.21, 0.29)), EvalRow("dpo", "reward", -1.25)],
)


def header(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_header_names_base_library_tags_and_hub_data_only() -> None:
    assert header(adapter_card(FACTS)) == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["raylign", "dpo", "moe", "lora"],
        "datasets": ["org/pairs"],
        "metrics": ["exact_match", "reward"],
    }


def test_the_card_says_how_to_load_it_and_how_it_did(tmp_path: Path) -> None:
    card = write_card(tmp_path, FACTS).read_text()
    assert 'PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY")' in card
    assert "continued from the stage `sft`" in card
    assert "| base | 25.0 % exact_match | 21.0 to 29.0 % | 500 |" in card
    assert "| learning_rate | 0.0005 |" in card
    assert r"a\|b" in card


def test_a_full_model_is_a_transformers_model() -> None:
    card = adapter_card(CardFacts("m", "sft", "org/base", is_adapter=False))
    assert header(card)["library_name"] == "transformers"
    assert "PeftModel" not in card


def test_a_reward_model_says_how_to_score_with_it() -> None:
    facts = CardFacts("m", "reward", "org/base", is_reward_model=True)
    card = adapter_card(facts)
    assert header(card)["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained('org/base', num_labels=1)" in card
    assert "AutoModelForCausalLM" not in card


def test_a_reward_model_that_no_class_of_transformers_can_load_says_so() -> None:
    facts = CardFacts("m", "reward", "org/base", is_reward_model=True, loads_elsewhere=False)
    card = adapter_card(facts)
    assert "transformers has no sequence classifier of this architecture" in card
    assert "from_pretrained" not in card


def test_evaluations_of_different_metrics_name_them() -> None:
    rows = [*FACTS.evaluations, EvalRow("reward", "pair_accuracy", 0.9, 400)]
    assert "| reward | 90.0 % pair_accuracy |  | 400 |" in adapter_card(replace(FACTS, evaluations=rows))
