"""Evaluates models on held-out prompts: vLLM answers, a scorer scores, with a 95 % interval."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches import SamplingSpec, sample_seed
from actors.errors import RunFailure, UserError
from actors.models.turn_ends import TurnEnds, turn_ends
from pipeline.artifacts.json_text import json_text
from pipeline.artifacts.manifest import fingerprint, write_json
from pipeline.artifacts.user_code import code_digests, unread_code
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.reading.records import Records, load_records
from pipeline.data.tokens.prompts import Prompt, as_row, in_form_of
from pipeline.data.tokens.tokenize import prompt_rows
from pipeline.rewards.exact_match import exact_match
from pipeline.rewards.functions import (
    ARGUMENTS,
    RewardFunction,
    Samples,
    call_reward_function,
    import_function,
)
from pipeline.rewards.spec import EXACT_MATCH

if TYPE_CHECKING:
    from actors.batches import Generations
    from actors.cluster import WorkerFuture, WorkerGroup
    from actors.rollout.pool import RolloutPool
    from pipeline.evaluation.spec import EvalSpec
    from pipeline.rewards.user_functions import UserFunction
from pipeline.artifacts.weights import Weights

TRIED = 2
"""Rows that a scorer is tried with before the run."""


@dataclass(frozen=True)
class EvalSet:
    """Held-out prompts as tokens, with the columns that their scorer needs."""

    prompts: list[str]
    """Texts that the model reads: prompts after the chat template."""
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]
    fingerprint: str
    sampling: SamplingSpec
    """Settings of sampling, with every token that ends a turn."""
    skipped: Skipped = field(default_factory=Skipped)
    """Rows left out, as their source's `on_bad_row` says."""
    code: dict[str, str] = field(default_factory=dict)
    """The scorer -> digest of its code; empty for `exact_match`."""
    unread_code: tuple[str, ...] = ()
    """The scorer, where its code can't be read."""
    rows: list[Prompt] | None = None
    """Prompts as their rows have them, for the scorer; None: `prompts`, since all are plain text."""

    def samples(self, completions: Sequence[str], ids: Sequence[Sequence[int] | np.ndarray]) -> Samples:
        """One completion of each prompt, in the form in which reward functions get them."""
        prompts = self.rows if self.rows is not None else self.prompts
        return Samples(prompts, in_form_of(prompts, completions), ids, self.columns)

    def remarks(self) -> list[str]:
        """Lines about the rows that were left out and code that can't be read, for the user."""
        unread = [unread_code("eval", source) for source in self.unread_code]
        if not self.skipped.counts:
            return unread
        return [
            *unread,
            f"eval: left out {self.skipped.summary()}",
            *(f"  {row}" for row in self.skipped.listing),
        ]


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927), bounds in [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def find_scorer(metric: str) -> RewardFunction | UserFunction:
    """`exact_match`, or `module:function`.

    Raises:
        UserError: nothing of that name can be imported.
    """
    if metric == EXACT_MATCH:
        return exact_match
    return import_function(
        metric, "eval.metric", "exact_match, or module:function with the module on the path"
    )


def try_scorer(spec: EvalSpec, records: Records) -> None:
    """Call the scorer once with the first rows, each answered by its `answer` where it has one, so that what
    it can't do is known before anything is trained. What the call leaves behind ends with its process.

    Raises:
        UserError: it can't be imported, asks for a column that the rows lack, can't be called, or returns
            something else than scores.
    """
    from pipeline.rewards.user_functions import UserFunction

    check_columns(spec, records)
    scorer = find_scorer(spec.metric)
    if not isinstance(scorer, UserFunction) or not len(records):
        return
    samples = tried_samples(records)
    called = call_reward_function(scorer, samples, spec.timeout_s)
    scorer.release()
    if called.problem:
        raise UserError(
            f"eval.metric: {spec.metric} can't score, tried with {len(samples)} of the rows: "
            f"{called.problem}\n"
            f"{samples.shown(called.bad[0])}"
        )


def tried_samples(records: Records) -> Samples:
    """The first rows as samples, each answered by its `answer` where it has one."""
    rows = [records[i] for i in range(min(TRIED, len(records)))]
    prompts = [as_row(row) for row in rows]
    texts = [str(row.columns.get("answer") or "an answer") for row in rows]
    columns = {name: [row.columns.get(name) for row in rows] for name in records.columns}
    ids = [list(text.encode()) for text in texts]
    return Samples(prompts, in_form_of(prompts, texts), ids, columns)


def read_eval_set(
    spec: EvalSpec,
    tokenizer: Any,
    seed: int,
    records: Records | None = None,
    ends: TurnEnds | None = None,
    vocab_size: int | None = None,
) -> EvalSet:
    """Tokenise the held-out prompts (read here unless given); bad rows follow their source's `on_bad_row`.
    `ends`: of the base; None: of the tokenizer. `vocab_size`: rows of the base's embedding."""
    ends = ends or turn_ends(tokenizer)
    sampling = ends.sampling(spec.sampling, tokenizer, "eval.sampling")
    records = records or load_records(spec.data, "prompt", seed=seed, max_rows=spec.max_rows)
    check_columns(spec, records)
    kept, texts, token_ids = prompt_rows(records, tokenizer, vocab_size)
    if not len(kept):
        raise UserError(f"eval.data: no prompts left ({kept.skipped.summary() or 'the data is empty'})")
    # Empty where the base's own EOS tokens are all that end a turn: evaluations of earlier versions, whose
    # keys have no such part, are then still the same.
    told = "".join(f" ends at {token}" for token in ends.added)
    functions = () if spec.metric == EXACT_MATCH else (spec.metric,)
    code = code_digests(functions)
    unread = tuple(source for source in functions if source not in code)
    rows = [as_row(row) for row in kept.rows]
    digest = kept.fingerprint + told
    return EvalSet(texts, token_ids, kept.columns, digest, sampling, kept.skipped, code, unread, rows)


def check_columns(spec: EvalSpec, records: Records) -> None:
    """Refuse held-out rows without a column that the scorer asks for."""
    from pipeline.rewards.user_functions import UserFunction

    columns = records.columns
    if spec.metric == "exact_match" and None in columns.get("answer", [None]):
        raise UserError(
            "eval.data: exact_match compares with a column `answer`, which some rows lack "
            f"(columns: {', '.join(columns) or 'none'}); name it under `columns:`, or set eval.metric to "
            "module:function"
        )
    scorer = find_scorer(spec.metric)
    missing = scorer.missing([*ARGUMENTS, *columns]) if isinstance(scorer, UserFunction) else []
    if missing:
        raise UserError(
            f"eval.data: {spec.metric} asks for {', '.join(missing)}, which an evaluation does not have "
            f"(it has {', '.join([*ARGUMENTS, *columns])}); add such a column, or give the argument a default"
        )


def evaluate(
    name: str,
    weights: Weights,
    held_out: EvalSet,
    spec: EvalSpec,
    rollout: WorkerGroup,
    tokenizer: Any,
    directory: Path,
    seed: int,
) -> dict[str, Any]:
    """Generate and score one model; writes `eval/NAME.jsonl` and returns its entry for run.json.

    Raises:
        RunFailure: the engines failed, or the scorer.
    """
    from pipeline.rewards.user_functions import start_functions

    key = eval_key(weights, held_out, spec, seed)
    if spec.metric != EXACT_MATCH:
        start_functions([spec.metric])
    sampling = held_out.sampling
    generated = generate(rollout, weights, name, held_out.token_ids, sampling, seed)
    completions = generated.texts(tokenizer, sampling.stop, sampling.stop_token_ids)
    samples = held_out.samples(completions, list(generated.sequences()))
    scores = score(find_scorer(spec.metric), spec, samples)
    counted = [s for s in scores if s is not None]
    total = float(sum(counted))
    low, high = wilson(total, len(counted)) if all(0 <= s <= 1 for s in counted) else mean_interval(counted)
    directory.mkdir(parents=True, exist_ok=True)
    path, aside = directory / f"{name}.jsonl", directory / f".{name}.tmp"
    answers = held_out.columns.get("answer", [None] * len(scores))
    with aside.open("w") as handle:
        for prompt, completion, answer, value in zip(held_out.prompts, completions, answers, scores):
            row = {"prompt": prompt, "completion": completion, "answer": answer, "score": value}
            handle.write(json_text(row, ensure_ascii=False) + "\n")
    aside.rename(path)
    result = {
        "accuracy": total / max(1, len(counted)),
        "n": len(counted),
        "ci95": [low, high],
        "metric": spec.metric,
        "fingerprint": key,
        **({"code": held_out.code} if held_out.code else {}),
    }
    write_json(directory / f"{name}.json", result)
    return result


def eval_key(weights: Weights, held_out: EvalSet, spec: EvalSpec, seed: int) -> str:
    """Identity of an evaluation: a finished one with the same key is not run again."""
    return fingerprint(
        [
            weights.fingerprint,
            held_out.fingerprint,
            spec.sampling.model_dump(exclude=None if spec.sampling.stop_token_ids else {"stop_token_ids"}),
            spec.metric,
            spec.max_rows,
            seed,
        ]
    )


def finished(
    directory: Path, name: str, key: str, code: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """The result of an evaluation that is already there, if it is this one.

    Args:
        code: of the scorer, where it counts. A result of a version that didn't keep it is taken as it is.
    """
    path = directory / f"{name}.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(result, dict) or result.get("fingerprint") != key or not _is_whole(result):
        return None
    earlier = result.get("code")
    if code is not None and earlier and earlier != code:
        return None
    return result if (directory / f"{name}.jsonl").is_file() else None


def _is_whole(result: Mapping[str, Any]) -> bool:
    """True for a result with all that is shown of one; a damaged one is made again."""
    interval = result.get("ci95")
    bounds = interval if isinstance(interval, list) and len(interval) == 2 else [None]
    return (
        all(type(one) in (int, float) for one in (result.get("accuracy"), *bounds))
        and {"n", "metric"} <= result.keys()
    )


def changed_code(directory: Path, name: str, key: str, code: Mapping[str, str]) -> bool:
    """True where an evaluation is there that differs in nothing but the scorer's code."""
    there = finished(directory, name, key) is not None
    return there and finished(directory, name, key, code) is None


def generate(
    rollout: WorkerGroup,
    weights: Weights,
    name: str,
    token_ids: list[list[int]],
    sampling: Any,
    seed: int,
) -> Generations:
    """Completions of all prompts by one model; a sample's seed depends on its prompt only. Engines that die
    over it are replaced."""
    seeds = [sample_seed(seed, 0, i, 0) for i in range(len(token_ids))]
    return loaded_pool(rollout, weights, name).generate(token_ids, sampling, seeds)


def loaded_pool(rollout: WorkerGroup, weights: Weights, name: str) -> RolloutPool:
    """A pool of engines that hold these weights, those that take the place of lost ones included."""
    from actors.rollout.pool import RolloutPool
    from actors.rollout.remote import RolloutEngines
    from actors.sync.engine_set import EngineSet

    def load(rank: int) -> WorkerFuture[dict[str, float]]:
        return RolloutEngines(rollout).load(rank, weights.base, weights.adapter, name)

    loading = {rank: load(rank) for rank in rollout.fleet.serving}
    for rank, waiting in loading.items():
        try:
            waiting.result()
        except RunFailure:
            if rank in rollout.fleet.serving:
                raise
    return RolloutPool(EngineSet(rollout, load=lambda rank: load(rank).result()))


def score(scorer: RewardFunction | UserFunction, spec: EvalSpec, samples: Samples) -> list[float | None]:
    """Call the scorer on everything, as a reward function is called, and check what it returns.

    Raises:
        RunFailure: it raised, took longer than `timeout_s`, or returned something else than scores; with the
            sample.
    """
    called = call_reward_function(scorer, samples, spec.timeout_s)
    if called.problem:
        raise RunFailure(
            f"metric '{spec.metric}'",
            "score",
            f"{called.problem}\n{samples.shown(called.bad[0])}",
            f"mend {spec.metric}; the same command then trains nothing again",
        )
    return called.values


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Normal 95 % interval of a mean, for scores that are not shares."""
    array = np.asarray(values, dtype=float)
    half = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return float(array.mean() - half), float(array.mean() + half)
