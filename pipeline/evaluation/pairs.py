"""Evaluates reward models on held-out pairs: the share whose chosen answer scores higher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.batches import Batch
from pipeline.artifacts.json_text import json_text
from pipeline.artifacts.manifest import fingerprint, write_json
from pipeline.artifacts.weights import Weights
from pipeline.data.tokens.tokenize import TokenizedData
from pipeline.evaluation.intervals import wilson

PAIR_ACCURACY = "pair_accuracy"
ROWS_PER_CALL = 256

Scorer = Callable[[Batch], np.ndarray]
"""A batch of pairs -> float64 (sequences,), chosen first."""


def pair_key(weights: Weights, pairs: TokenizedData) -> str:
    """Identity of an evaluation: a finished one with the same key is not run again."""
    return fingerprint([weights.fingerprint, pairs.fingerprint, PAIR_ACCURACY])


def score_pairs(scorer: Scorer, pairs: TokenizedData) -> np.ndarray:
    """float64 (pairs, 2): scores of chosen and rejected."""
    rows = np.arange(pairs.n_rows)
    chunks = [rows[i : i + ROWS_PER_CALL] for i in range(0, len(rows), ROWS_PER_CALL)]
    return np.concatenate([scorer(pairs.batch(chunk)) for chunk in chunks]).reshape(-1, 2)


def pair_figures(scores: np.ndarray) -> dict[str, Any]:
    """Share of pairs whose chosen answer scores higher (a tie is none), with its 95 % interval."""
    right = int((scores[:, 0] > scores[:, 1]).sum())
    return {
        "accuracy": right / len(scores),
        "n": len(scores),
        "ci95": list(wilson(right, len(scores))),
        "metric": PAIR_ACCURACY,
        "margin": float((scores[:, 0] - scores[:, 1]).mean()),
    }


def write_scores(path: Path, pairs: TokenizedData, scores: np.ndarray, tokenizer: Any) -> None:
    """One line a pair: the texts, both scores, and `score` 1 where the chosen answer won."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as handle:
        for row, (chosen, rejected) in enumerate(scores.tolist()):
            line = {
                **_texts(pairs.batch([row]), tokenizer),
                "chosen_score": chosen,
                "rejected_score": rejected,
                "score": float(chosen > rejected),
            }
            handle.write(json_text(line, ensure_ascii=False) + "\n")
    aside.rename(path)


def evaluate_pairs(
    name: str, scorer: Scorer, pairs: TokenizedData, tokenizer: Any, directory: Path, key: str
) -> dict[str, Any]:
    """Score a stage's held-out pairs; writes `eval/NAME.jsonl` and returns its entry for run.json."""
    scores = score_pairs(scorer, pairs)
    directory.mkdir(parents=True, exist_ok=True)
    write_scores(directory / f"{name}.jsonl", pairs, scores, tokenizer)
    result = {**pair_figures(scores), "fingerprint": key}
    write_json(directory / f"{name}.json", result)
    return result


def _texts(pair: Batch, tokenizer: Any) -> dict[str, str]:
    """Texts that the model read: the prompt as both answers have it, then each answer."""
    texts: dict[str, str] = {}
    for name, start, end in zip(("chosen", "rejected"), pair.offsets[:-1], pair.offsets[1:], strict=True):
        ids, counted = pair.token_ids[start:end], pair.loss_mask[start:end]
        texts.setdefault("prompt", tokenizer.decode(ids[~counted]))
        texts[name] = tokenizer.decode(ids[counted])
    return texts
