"""Writes docs/architectures.md from the table of architectures and its tests' last results (`make docs`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from actors.models.facts import (
    REFUSED,
    ROWS,
    VLLM_ROWS,
    Architecture,
    VllmRow,
    has_sequence_classifier,
    replay_problem,
)
from actors.rollout.vllm.workarounds.registry import WORKAROUNDS

PAGE = Path("docs/architectures.md")
RESULTS = Path("docs/architectures.json")
"""The last measurements of `make test-architectures`."""

Results = Mapping[str, Any]

INTRO = """\
# Architectures

<!-- Made by `make docs` from actors/models/architectures/ (table.py, vllm_table.py) and
docs/architectures.json. -->

Which models can be used, what LoRA can adapt in them, and what vLLM is given so that it computes them \
rightly. A base whose `model_type` is not here is refused, or tried with `model.allow_untested: true`: its \
target groups are then read off its modules, nothing is packed, and before anything trains an engine has to \
agree with transformers on the same tokens, as loaded and after weights were brought in.

`raylign validate` and `--dry-run` print the row of a run's base."""
TRAINER = """\
## Training
`packed`: sequences may share a row; others are padded. `aux loss`: transformers defines the load-balancing \
loss. `head`: where a reward model or critic keeps its score, a `classifier` that transformers can load or a \
`file` of ours. `replay`: `moe.router_replay` knows how it makes gates."""
ENGINE = """\
## In vLLM
`code`: vLLM's own class, or transformers' modules in vLLM's frame. Keys are given to vLLM's config, \
variables to its environment; they and the workarounds act in our engines only, by themselves. `LoRA slots`: \
target groups that `sync.payload: lora` can bring, as tests on the CPU have shown (experts up to their \
kernel, which is for GPUs and was not run)."""
CAUSES = """\
## Workarounds
Each was written for the vLLM named and is refused by name where vLLM's code there has changed."""
MEASURED = """\
## Last results of the tests
Largest |difference| of log-probabilities on tiny random models. `reload`: a saved adapter in plain PEFT. \
`merge`: the merged model loaded again. `rows`: packed (or padded) rows against one sequence at a time. \
`adapter`, `merged`: an engine after five syncs of either kind against transformers, in float32. `fresh`: an \
updated engine in bfloat16 against one that loaded the same weights. An empty field was not \
measured.{versions}"""
FIGURES = ("reload", "merge", "rows", "adapter", "merged", "fresh")


def page(results: Results) -> str:
    """The whole page."""
    moe = [row for row in ROWS if row.is_moe]
    dense = [row for row in ROWS if not row.is_moe]
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    parts = [
        INTRO,
        TRAINER,
        _table(
            ["`model_type`", "LoRA groups", "packed", "aux loss", "head", "replay"],
            (_trainer_row(row) for row in [*moe, *dense]),
        ),
        "\n".join(f"- {line}" for row in moe for line in _limits(row)),
        ENGINE,
        _table(
            ["`model_type`", "code", "set for it", "workarounds", "CPU dtypes", "LoRA slots"],
            (_vllm_row(row, VLLM_ROWS[row.model_type]) for row in [*moe, *dense]),
        ),
        "\n".join(f"- `{name}`: {engine.note}." for name, engine in VLLM_ROWS.items() if engine.note),
        CAUSES,
        _table(
            ["workaround", "vLLM", "cause"],
            ([f"`{one.name}`", ", ".join(one.versions), one.cause] for one in WORKAROUNDS.values()),
        ),
        MEASURED.format(versions=f" With {versions}." if versions else ""),
        _table(
            ["`model_type`", *FIGURES],
            (_figures(row, results.get("figures", {}).get(row.model_type, {})) for row in [*moe, *dense]),
        ),
        "## Refused",
        _table(["`model_type`", "why, and what would work"], ([f"`{n}`", why] for n, why in REFUSED.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _trainer_row(row: Architecture) -> list[str]:
    router = row.router
    return [
        f"`{row.model_type}`",
        ", ".join(row.groups),
        "no" if row.packs == "no" else "yes",
        "" if router is None else "yes" if router.has_aux_loss else "no",
        "classifier" if has_sequence_classifier(row.model_type) else "file",
        "" if router is None else "no" if replay_problem(row.model_type) else "yes",
    ]


def _limits(row: Architecture) -> list[str]:
    only = [f"trains by {', '.join(row.stages)} only: {row.why_only}."] if row.stages is not None else []
    refused = [f"`{group}` can't be adapted: {why}." for group, why in row.refused.items()]
    whole = [] if row.shards_by_layer else ["is not sharded: transformers has no plan by layer for it."]
    return [f"`{row.model_type}`: {text}" for text in (*only, *refused, *whole, *row.limits)]


def _vllm_row(row: Architecture, engine: VllmRow) -> list[str]:
    settings = [f"`{key}={value}`" for key, value in {**engine.hf_overrides, **engine.environment}.items()]
    settings += [
        f"`{key}`" if callable(value) else f"`{key}={value}`" for key, value in engine.config_extras.items()
    ]
    if engine.attention_backend is not None:
        settings.append(f"`attention_config.backend={engine.attention_backend}`")
    return [
        f"`{row.model_type}`",
        "transformers'" if engine.transformers_backend else "its own",
        ", ".join(settings),
        ", ".join(f"`{one}`" for one in engine.workarounds),
        ", ".join(engine.dtypes),
        ", ".join(engine.slots),
    ]


def _figures(row: Architecture, measured: Mapping[str, float]) -> list[str]:
    return [f"`{row.model_type}`", *(f"{measured[k]:.1g}" if k in measured else "" for k in FIGURES)]


def read_results(root: Path) -> Results:
    """The last results, kept next to the page; empty where nothing was measured."""
    file = root / RESULTS
    found: Results = json.loads(file.read_text()) if file.is_file() else {}
    return found


def main() -> None:
    """Write the page of the checkout in which this is run."""
    PAGE.write_text(page(read_results(Path())))


if __name__ == "__main__":
    main()
