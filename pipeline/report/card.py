"""Model cards: README.md of an adapter or model directory, with its origin and the code to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.report.evals import interval_text, score_text
from pipeline.report.run_view import EvalRow

HUB_NAME_PARTS = 2
"""A hub id is `org/name`; data sets named otherwise (files, builtin:) stay out of the metadata."""


@dataclass(frozen=True)
class CardFacts:
    """Facts for a model card. Everything but the first four may be left out."""

    name: str
    """Name of the adapter: the run's and the stage's."""
    stage_type: str
    """sft, dpo, ..."""
    base_model: str
    """Hub id or directory that the adapter belongs to."""
    is_adapter: bool = True
    """False for a full model."""
    is_reward_model: bool = False
    """An adapter with a score head, instead of a policy."""
    loads_elsewhere: bool = True
    """True where transformers has a sequence classifier of this architecture, which a reward model needs."""
    started_from: str = ""
    """Stage whose weights this one continued, empty for the base."""
    datasets: Sequence[str] = ()
    """Sources as in the config."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Training settings worth naming, e.g. learning_rate, batch_size, beta."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """r, lora_alpha, targets ..."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Final training metrics."""
    evaluations: Sequence[EvalRow] = ()
    """Models evaluated so far, in order."""
    versions: Mapping[str, str] = field(default_factory=dict)


def adapter_card(facts: CardFacts) -> str:
    """The card's text: Hugging Face's metadata header in YAML, then Markdown."""
    header = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True).strip()
    parts = [f"---\n{header}\n---", f"# {facts.name}", summary(facts), "## Use", usage(facts)]
    if facts.evaluations:
        parts += ["## Evaluation", evaluation_table(facts.evaluations)]
    for title, values in (
        ("Training", facts.settings),
        ("LoRA", facts.lora),
        ("Final metrics", facts.metrics),
        ("Versions", facts.versions),
    ):
        if values:
            parts += [f"## {title}", value_table(values)]
    return "\n\n".join(parts) + "\n"


def write_card(directory: Path | str, facts: CardFacts) -> Path:
    """Write `adapter_card` to DIRECTORY/README.md and return its path."""
    path = Path(directory) / "README.md"
    path.write_text(adapter_card(facts), encoding="utf-8")
    return path


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The header under Hugging Face's keys; only ids that the hub would accept are named as data sets."""
    header: dict[str, Any] = {
        "base_model": facts.base_model,
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-classification" if facts.is_reward_model else "text-generation",
        "tags": ["raylign", facts.stage_type, "moe", *(["lora"] if facts.is_adapter else [])],
    }
    hub = [source.split("[")[0] for source in facts.datasets if is_hub_id(source)]
    if hub:
        header["datasets"] = list(dict.fromkeys(hub))
    if facts.evaluations:
        header["metrics"] = sorted({row.metric for row in facts.evaluations})
    return header


def is_hub_id(source: str) -> bool:
    """True for a data source that reads like `org/name` and is no file here."""
    parts = source.split("/")
    well_formed = len(parts) == HUB_NAME_PARTS and all(part.strip(".") for part in parts)
    return well_formed and ":" not in source and not source.startswith("~") and not Path(source).exists()


def summary(facts: CardFacts) -> str:
    """The model in two sentences."""
    kind = "LoRA adapter for" if facts.is_adapter else "model trained from"
    if facts.is_reward_model:
        kind = "reward model: a LoRA adapter and a score head for"
    start = f", continued from the stage `{facts.started_from}`" if facts.started_from else ""
    data = ", ".join(f"`{source}`" for source in facts.datasets)
    trained = f" Trained by {facts.stage_type.upper()}" + (f" on {data}." if data else ".")
    return f"A {kind} `{facts.base_model}`{start}.{trained}"


def usage(facts: CardFacts) -> str:
    """Code that loads it with the ecosystem's own libraries."""
    if facts.is_reward_model:
        return reward_model_usage(facts)
    if not facts.is_adapter:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_DIRECTORY")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_DIRECTORY")\n```'
        )
    return (
        "```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({facts.base_model!r})\n"
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({facts.base_model!r})\n```\n\n"
        "As one model: `raylign merge PATH_OF_THIS_DIRECTORY OUT`."
    )


def reward_model_usage(facts: CardFacts) -> str:
    """Code that scores a text: by transformers and PEFT, or, where these lack the class, by Raylign alone."""
    if not facts.loads_elsewhere:
        return (
            "transformers has no sequence classifier of this architecture, so the score head "
            "(`score.weight`) is kept in a file that Raylign reads. Use it by naming this directory under "
            "`rewards`."
        )
    return (
        "The score is that of the last token.\n\n"
        "```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f"base = AutoModelForSequenceClassification.from_pretrained({facts.base_model!r}, num_labels=1)\n"
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({facts.base_model!r})\n```"
    )


def evaluation_table(rows: Sequence[EvalRow]) -> str:
    """Markdown table of the evaluations, each with its own metric where they differ."""
    several = len({row.metric for row in rows}) > 1
    lines = [f"| model | {'score' if several else rows[0].metric} | 95 % interval | n |", "|---|---|---|---|"]
    for row in rows:
        score = f"{score_text(row)} {row.metric}" if several else score_text(row)
        n = "" if row.n is None else row.n
        lines.append(f"| {row.model} | {score} | {interval_text(row)} | {n} |")
    return "\n".join(lines)


def value_table(values: Mapping[str, Any]) -> str:
    """Markdown table of names and values."""
    lines = ["| | |", "|---|---|"]
    for key, value in values.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {key} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
