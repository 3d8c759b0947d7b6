"""Evaluates models on held-out prompts: vLLM answers, a scorer scores, with a 95 % interval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches import SamplingSpec, sample_seed
from actors.errors import RunFailure, UserError, attempt
from actors.models.turn_ends import TurnEnds, turn_ends
from pipeline.artifacts.json_text import json_text
from pipeline.artifacts.manifest import fingerprint, write_json
from pipeline.artifacts.user_code import code_digests, unread_code
from pipeline.artifacts.weights import Weights
from pipeline.data.reading.records import Records, load_records
from pipeline.data.tokens.prompts import PromptData, read_prompts
from pipeline.environments.playing import Player
from pipeline.environments.prepared import Conversing, conversing_prompts
from pipeline.evaluation.conversations import (
    ENV_REWARD,
    identity_of,
    is_whole_talk,
    rewards_of,
    talk_figures,
    talk_rows,
)
from pipeline.evaluation.intervals import mean_with_interval
from pipeline.evaluation.scorers import OWN_METRICS, check_columns, find_scorer, score
from pipeline.evaluation.spec import REWARD
from pipeline.rewards.functions import Samples

if TYPE_CHECKING:
    from actors.batches import Generations
    from actors.cluster import WorkerFuture, WorkerGroup
    from actors.rollout.pool import RolloutPool
    from pipeline.environments.spec import TurnSettings
    from pipeline.evaluation.spec import EvalSpec


@dataclass(frozen=True)
class EvalSet:
    """Held-out prompts as tokens, with the columns that their scorer needs."""

    data: PromptData
    """Prompts, and which rows were left out, as their source's `on_bad_row` says."""
    sampling: SamplingSpec
    """Settings of sampling, with every token that ends a turn."""
    fingerprint: str = ""
    """Of the prompts, and of what ends a turn where the base doesn't say it."""
    code: dict[str, str] = field(default_factory=dict)
    """The scorer, environment and tools -> digest of their code; without `exact_match`."""
    unread_code: tuple[str, ...] = ()
    """Those of them whose code can't be read."""
    talks: Conversing | None = None
    """Conversations that the prompts begin; None: an answer is one turn."""
    env_of: str = ""
    """Stage whose environment or tools these are with."""

    def samples(
        self,
        completions: Sequence[str],
        ids: Sequence[Sequence[int] | np.ndarray],
        made: Generations | None = None,
    ) -> Samples:
        """One completion of each prompt, in the form in which reward functions get them; `made` holds the
        conversations, if these are some."""
        data = self.data
        if made is None or made.episodes is None:
            return Samples(data.prompts, data.completions(completions), ids, data.columns)
        prompts = data.of_samples(range(data.n_rows), made).prompts
        said = [one.messages for one in made.episodes]
        return Samples(prompts, said, ids, data.columns | {ENV_REWARD: rewards_of(made)})

    def remarks(self) -> list[str]:
        """Lines about what is done with the prompts, the rows that were left out and code that can't be
        read, for the user."""
        lines = [unread_code("eval", source) for source in self.unread_code]
        if self.talks is not None:
            spec = self.talks.spec
            lines.append(
                f"eval: each prompt begins a conversation with {', '.join(spec.user_code)} "
                f"(stages.{self.env_of}), of {self.sampling.max_tokens:,} tokens at most "
                "(eval.sampling.max_tokens), what that says included; `env_of: null` evaluates single answers"
            )
        if (skipped := self.data.skipped).counts:
            lines += [f"eval: left out {skipped.summary()}", *(f"  {row}" for row in skipped.listing)]
        return lines


def read_eval_set(
    spec: EvalSpec,
    tokenizer: Any,
    seed: int,
    records: Records | None = None,
    ends: TurnEnds | None = None,
    vocab_size: int | None = None,
    turns: tuple[str, TurnSettings] | None = None,
) -> EvalSet:
    """Tokenise the held-out prompts (read here unless given); bad rows follow their source's `on_bad_row`.
    `ends`: of the base; None: of the tokenizer. `vocab_size`: rows of the base's embedding. `turns`: the
    stage whose environment or tools the models converse with; None: an answer is one turn.

    Raises:
        UserError: everything wrong with the rows, and with the environment.
    """
    ends = ends or turn_ends(tokenizer)
    sampling = ends.sampling(spec.sampling, tokenizer, "eval.sampling")
    records = records or load_records(spec.data, "prompt", seed=seed, max_rows=spec.max_rows)
    check_columns(spec, records, converses=turns is not None)
    problems: list[str] = []
    talks, env_of = None, ""
    if turns is None:
        data = attempt(problems, "eval.data", read_prompts, records, tokenizer, vocab_size=vocab_size)
    else:
        env_of, settings = turns
        made = attempt(
            problems, "eval.data", conversing_prompts, settings, f"stages.{env_of}", records, tokenizer,
            sampling, key="eval.data", known=vocab_size,
        )  # fmt: skip
        data, talks = made or (None, None)
    if data is None:
        raise UserError(problems)
    if spec.metric == REWARD and talks is not None and not (talks.kind["steps"] or talks.kind["rewards"]):
        raise UserError(
            f"eval.metric: reward is what the environment gives, and that of stages.{env_of} gives none; "
            "name exact_match or module:function"
        )
    # Empty where the base's own EOS tokens are all that end a turn: evaluations of earlier versions, whose
    # keys have no such part, are then still the same.
    told = "".join(f" ends at {token}" for token in ends.added)
    functions = [] if spec.metric in OWN_METRICS else [spec.metric]
    functions += [] if talks is None else talks.spec.user_code
    code = code_digests(functions)
    unread = tuple(source for source in functions if source not in code)
    return EvalSet(data, sampling, data.fingerprint + told, code, unread, talks, env_of)


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
    if spec.metric not in OWN_METRICS:
        start_functions([spec.metric])
    sampling = held_out.sampling
    generated = generate(rollout, weights, name, held_out, tokenizer, seed)
    completions = generated.texts(tokenizer, sampling.stop, sampling.stop_token_ids)
    samples = held_out.samples(completions, list(generated.sequences()), generated)
    scores = score(find_scorer(spec.metric), spec, samples)
    counted = [s for s in scores if s is not None]
    if held_out.talks is not None and spec.metric == REWARD and not counted:
        raise RunFailure(
            f"environment '{held_out.talks.spec.env_name}'", "evaluate", "it gave no conversation a reward",
            "return one from `step` or `get_reward`, or set eval.metric to module:function",
        )  # fmt: skip
    accuracy, low, high = mean_with_interval(counted)
    directory.mkdir(parents=True, exist_ok=True)
    answers = held_out.data.columns.get("answer", [None] * len(scores))
    talked = talk_rows(generated)
    rows = [
        {"prompt": prompt, "completion": completion, "answer": answer, "score": value} | talk
        for prompt, completion, answer, value, talk in zip(
            held_out.data.texts, completions, answers, scores, talked, strict=True
        )
    ]
    path, aside = directory / f"{name}.jsonl", directory / f".{name}.tmp"
    aside.write_text("".join(json_text(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.rename(path)
    result = {
        "accuracy": accuracy,
        "n": len(counted),
        "ci95": [low, high],
        "metric": spec.metric,
        "fingerprint": key,
        **({"code": held_out.code} if held_out.code else {}),
        **({"conversations": talk_figures(generated)} if held_out.talks is not None else {}),
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
            # Nothing where an answer is one turn: evaluations of earlier versions stay finished.
            *([] if held_out.talks is None else [identity_of(held_out.talks.spec)]),
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
        and is_whole_talk(result.get("conversations"))
    )


def changed_code(directory: Path, name: str, key: str, code: Mapping[str, str]) -> bool:
    """True where an evaluation is there that differs in nothing but the scorer's code."""
    there = finished(directory, name, key) is not None
    return there and finished(directory, name, key, code) is None


def generate(
    rollout: WorkerGroup, weights: Weights, name: str, held_out: EvalSet, tokenizer: Any, seed: int
) -> Generations:
    """Completions of all prompts by one model, or conversations that they begin; a sample's seed depends on
    its prompt only. Engines that die over it are replaced.

    Raises:
        UserError: the tool parser doesn't fit the base.
        RunFailure: engines or an environment failed.
    """
    data, talks, sampling = held_out.data, held_out.talks, held_out.sampling
    seeds = [sample_seed(seed, 0, i, 0) for i in range(data.n_rows)]
    pool = loaded_pool(rollout, weights, name)
    if talks is None:
        return pool.generate(data.token_ids, sampling, seeds)
    if talks.parsing and (problem := pool.check_parser(talks.parsing)):
        raise UserError(f"stages.{held_out.env_of}.tool_parser: {problem}")
    return Player(talks, tokenizer).play(pool, data, sampling, seeds, seeds)


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
