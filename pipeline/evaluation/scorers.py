"""Metrics of an evaluation: found, compared with the rows, tried before the run, and called after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.errors import RunFailure, UserError
from pipeline.data.reading.records import Records
from pipeline.data.tokens.prompts import as_row, in_form_of
from pipeline.evaluation.conversations import ENV_REWARD, env_reward
from pipeline.evaluation.spec import REWARD
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
    from pipeline.evaluation.spec import EvalSpec
    from pipeline.rewards.user_functions import UserFunction

OWN_METRICS: dict[str, RewardFunction] = {EXACT_MATCH: exact_match, REWARD: env_reward}
"""Metrics that need no process of their own."""
TRIED = 2
"""Rows that a scorer is tried with before the run."""


def find_scorer(metric: str) -> RewardFunction | UserFunction:
    """`exact_match`, `reward`, or `module:function`.

    Raises:
        UserError: nothing of that name can be imported.
    """
    if metric in OWN_METRICS:
        return OWN_METRICS[metric]
    return import_function(
        metric, "eval.metric", "exact_match, reward, or module:function with the module on the path"
    )


def try_scorer(spec: EvalSpec, records: Records, *, converses: bool = False) -> None:
    """Call the scorer once with the first rows, each answered by its `answer` where it has one, so that what
    it can't do is known before anything is trained. What the call leaves behind ends with its process.

    Raises:
        UserError: it can't be imported, asks for a column that the rows lack, can't be called, or returns
            something else than scores.
    """
    from pipeline.rewards.user_functions import UserFunction

    check_columns(spec, records, converses=converses)
    scorer = find_scorer(spec.metric)
    if not isinstance(scorer, UserFunction) or not len(records):
        return
    samples = tried_samples(records, converses=converses)
    called = call_reward_function(scorer, samples, spec.timeout_s)
    scorer.release()
    if called.problem:
        raise UserError(
            f"eval.metric: {spec.metric} can't score, tried with {len(samples)} of the rows: "
            f"{called.problem}\n"
            f"{samples.shown(called.bad[0])}"
        )


def tried_samples(records: Records, *, converses: bool = False) -> Samples:
    """The first rows as samples, each answered by its `answer` where it has one; `converses`: as
    conversations of one turn."""
    rows = [records[i] for i in range(min(TRIED, len(records)))]
    prompts = [as_row(row) for row in rows]
    texts = [str(row.columns.get("answer") or "an answer") for row in rows]
    columns = {name: [row.columns.get(name) for row in rows] for name in records.columns}
    ids = [list(text.encode()) for text in texts]
    if converses:
        said = [[{"role": "assistant", "content": text}] for text in texts]
        return Samples(prompts, said, ids, columns | {ENV_REWARD: [0.0] * len(rows)})
    return Samples(prompts, in_form_of(prompts, texts), ids, columns)


def check_columns(spec: EvalSpec, records: Records, *, converses: bool = False) -> None:
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
    given = [*ARGUMENTS, *columns, *([ENV_REWARD] if converses else [])]
    missing = scorer.missing(given) if isinstance(scorer, UserFunction) else []
    if missing:
        raise UserError(
            f"eval.data: {spec.metric} asks for {', '.join(missing)}, which an evaluation does not have "
            f"(it has {', '.join(given)}); add such a column, or give the argument a default"
        )


def score(scorer: RewardFunction | UserFunction, spec: EvalSpec, samples: Samples) -> list[float | None]:
    """Call the scorer on everything, as a reward function is called, and check what it returns.

    Raises:
        RunFailure: it raised, took longer than `timeout_s`, or returned something else than scores; with the
            sample.
    """
    if scorer is env_reward:  # Raylign's own, as `exact_match` is: no process.
        return env_reward(**samples.columns)
    called = call_reward_function(scorer, samples, spec.timeout_s)
    if called.problem:
        raise RunFailure(
            f"metric '{spec.metric}'",
            "score",
            f"{called.problem}\n{samples.shown(called.bad[0])}",
            f"mend {spec.metric}; the same command then trains nothing again",
        )
    return called.values
