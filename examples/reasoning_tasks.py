"""Tasks of reasoning-gym by name: rows of questions, and their own scorers as a reward.

pip install reasoning-gym
python -m examples.reasoning_tasks build/reasoning chain_sum letter_counting --set chain_sum.max_terms=3

writes prompts.jsonl and test.jsonl, which have no question in common. Reward and metric are
`examples.reasoning_tasks:score`: 1 for the right answer, by most tasks less where it is part of a longer one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def score(completions: Sequence[Any], entry: Sequence[str], **columns: Any) -> list[float]:
    """Scores by the tasks' own rules, from 0 to 1. What a scorer can't read is no answer."""
    _library()
    return [_score(_text(said), json.loads(one)) for said, one in zip(completions, entry, strict=True)]


def _score(answer: str, entry: Row) -> float:
    try:
        return float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))
    except Exception:  # Some scorers read the answer as numbers, which a policy need not have written.
        return 0.0


@cache
def _scorer(task: str) -> Any:
    return _library().factory.get_score_answer_fn(task)


def _text(said: Any) -> str:
    """The answer of a completion, which is text or messages."""
    return (said if isinstance(said, str) else said[-1]["content"] or "").strip()


def rows(task: str, size: int, seed: int, settings: Row) -> Iterator[Row]:
    """Rows of one task: the question as a user's turn, and its entry as JSON for the scorer."""
    for entry in _library().create_dataset(task, size=size, seed=seed, **settings):
        yield {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "answer": entry["answer"],
            "entry": json.dumps(entry, default=str),
        }


def write(out: Path, tasks: Sequence[str], size: int, tests: int, seed: int, settings: Row) -> None:
    """Write so many prompts and test rows of each task."""
    prompts, test = [], []
    for task in tasks:
        # One sequence: a row's seed is the task's and the row's number, so that a seed beside it would repeat
        # rows. More than asked for: easy tasks repeat themselves.
        made = [*rows(task, size + 4 * tests, seed, settings.get(task, {}))]
        asked = {_question(row) for row in made[:size]}
        prompts += made[:size]
        test += [row for row in made[size:] if _question(row) not in asked][:tests]
    out.mkdir(parents=True, exist_ok=True)
    for name, made in (("prompts", prompts), ("test", test)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        print(f"{out / name}.jsonl: {len(made)} rows")


def _question(row: Row) -> str:
    return str(row["prompt"][0]["content"])


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"reasoning-gym is not there ({error}): pip install reasoning-gym") from None
    return reasoning_gym


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for prompts.jsonl and test.jsonl")
    parser.add_argument("tasks", nargs="+", help="names of tasks")
    parser.add_argument("--size", type=int, default=1000, help="prompts of each task")
    parser.add_argument("--tests", type=int, default=125, help="test rows of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="TASK.KEY=VALUE", help="settings of tasks")
    args = parser.parse_args()
    settings: dict[str, Row] = {}
    for one in args.set:
        (task, _, key), value = (part := one.partition("="))[0].partition("."), part[2]
        settings.setdefault(task, {})[key] = json.loads(value)
    write(args.out, args.tasks, args.size, args.tests, args.seed, settings)


if __name__ == "__main__":
    main()
