"""Generated data sets, so that a run needs no download: `builtin:arithmetic`.

Two-digit sums and differences, asked in a chat ("37+45=?") and checked exactly. The point of the
task is that each stage has something of its own to learn:

- `pretrain`: plain text. Worked sheets ("37+45=82 90-12=78 ...") and exams (chats that open with a
  system turn) hold the skill. Everyday chats show hurried people who dodge sums, answer differences, and
  often forget the carry. A base that has read this can calculate, but does not do so when asked.
- `train`: demonstrations for SFT. Every question is answered, still in a hurry: where a carry or a
  borrow is needed, most answers carry the classic slip (37+45=72, 52-37=25).
- `preference`: pairs for DPO. The right answer against a plausible mistake, most often that slip.
- `prompts`: questions with their right answers and no demonstration, for online RL.
- `test`: held-out questions with their right answers.
- `test_preference`: pairs of answers to held-out questions, for the accuracy of a reward model.

So imitation (SFT) gets the easy half right, and preferences are what teaches the carry: greedy, the
embedded base has 33 % of the test split right, SFT 61-66 %, 20 steps of DPO 87-88 % and 80 of them 96-98 %
(3 seeds each, by configs/demo.yaml).
Sampled at temperature 1, 70 % of the SFT model's answers are right, which gives online RL a start.

Splits are disjoint for every seed: an unordered pair of operands belongs to one split by its hash. Only
`prompts` and `test_preference` have no operands of their own: they ask what `train` demonstrates, and what
`test` asks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from typing import Any

from actors.errors import UserError
from actors.models.tiny import chat_text

Row = dict[str, Any]
Message = dict[str, str]

SPLIT_SHARES = {"test": 15, "preference": 20, "train": 20, "pretrain": 45}
"""Percent of all operand pairs. Pretraining gets most: the digit tables have to be learnt from it."""
DEFAULT_ROWS = {
    "pretrain": 120_000,
    "train": 6_400,
    "preference": 6_400,
    "prompts": 6_400,
    "test": 500,
    "test_preference": 500,
}
MOST_ROWS = 1_000_000
"""Rows that are made on request (`max_rows`): they are made in memory, a hundred thousand in a second."""
OPERANDS = range(10, 100)
DEMONSTRATED_SLIPS = 0.7
"""Share of demonstrations with the slip where a carry is needed. Above one half, so that a greedy SFT
model makes the slip; below one, so that sampling still finds the right answer for online RL."""
SHEET_FACTS, EXAM_QUESTIONS = 4, 2
EXAM = "Exam."
"""The system turn that makes people careful. Nobody says it after pretraining."""
DODGED = {"+": 0.8, "-": 0.1}
"""Share of everyday questions that are dodged: sums mostly, differences rarely."""
DODGES = ("No idea.", "Ask me later.", "Use a calculator.")
SMALL_TALK = (
    ("Hello", "Hello! Ask me a sum."),
    ("Hi", "Hi! Ask me a sum."),
    ("Who are you?", "A tiny mixture of experts."),
    ("Thanks", "You are welcome."),
)


@dataclass(frozen=True)
class Exercise:
    """A sum or a difference of two numbers from 10 to 99; differences are never negative."""

    a: int
    b: int
    operator: str

    @property
    def answer(self) -> int:
        return self.a + self.b if self.operator == "+" else self.a - self.b

    @property
    def slip(self) -> int:
        """The hurried answer: units and tens each by themselves, carry and borrow forgotten.

        37+45: 7+5=12, write 2, 3+4=7 -> 72. 52-37: the smaller digit from the larger -> 25.
        """
        tens, units = (self.a // 10, self.b // 10), (self.a % 10, self.b % 10)
        if self.operator == "+":
            return sum(tens) * 10 + sum(units) % 10
        return abs(tens[0] - tens[1]) * 10 + abs(units[0] - units[1])

    @property
    def is_hard(self) -> bool:
        """True where a hurried answer is wrong: there is a carry or a borrow."""
        return self.slip != self.answer

    @property
    def fact(self) -> str:
        return f"{self.a}{self.operator}{self.b}={self.answer}"

    @property
    def question(self) -> Message:
        return {"role": "user", "content": f"{self.a}{self.operator}{self.b}=?"}


def reply(text: object) -> Message:
    return {"role": "assistant", "content": str(text)}


@cache
def problems(split: str) -> tuple[Exercise, ...]:
    """All problems of a split, both orders of a sum included."""
    found = []
    for a in OPERANDS:
        for b in OPERANDS:
            if _split_of(a, b) == split:
                found.append(Exercise(a, b, "+"))
                if a >= b:
                    found.append(Exercise(a, b, "-"))
    return tuple(found)


def _split_of(a: int, b: int) -> str:
    """The one split that an unordered pair of operands belongs to, whatever the seed."""
    key = f"{min(a, b)},{max(a, b)}".encode()
    percent = int.from_bytes(blake2b(key, digest_size=8).digest(), "big") % 100
    for split, share in SPLIT_SHARES.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("the shares of all splits add up to 100")


def _random_problem(rng: random.Random, split: str) -> Exercise:
    """A problem of the split; sums and differences equally often."""
    operator = rng.choice("+-")
    while True:
        problem = rng.choice(problems(split))
        if problem.operator == operator:
            return problem


def _hurried(rng: random.Random, problem: Exercise) -> int:
    return problem.slip if rng.random() < DEMONSTRATED_SLIPS else problem.answer


def _mistake(rng: random.Random, problem: Exercise) -> int:
    """A plausible wrong answer: the slip where there is one (3 of 4), else a digit or the operation off."""
    if problem.is_hard and rng.random() < 0.75:
        return problem.slip
    other = problem.a - problem.b if problem.operator == "+" else problem.a + problem.b
    answer = problem.answer
    candidates = [answer - 10, answer + 10, answer - 1, answer + 1, abs(other)]
    return rng.choice([c for c in candidates if c >= 0 and c != answer])


def _sheet(rng: random.Random) -> str:
    return " ".join(_random_problem(rng, "pretrain").fact for _ in range(SHEET_FACTS))


def _exam(rng: random.Random) -> str:
    asked = [_random_problem(rng, "pretrain") for _ in range(EXAM_QUESTIONS)]
    turns = [turn for problem in asked for turn in (problem.question, reply(problem.answer))]
    return chat_text([{"role": "system", "content": EXAM}, *turns])


def _small_talk(rng: random.Random) -> str:
    question, answer = rng.choice(SMALL_TALK)
    return chat_text([{"role": "user", "content": question}, reply(answer)])


def _everyday_chat(rng: random.Random) -> str:
    problem = _random_problem(rng, "pretrain")
    dodges = rng.random() < DODGED[problem.operator]
    return chat_text([problem.question, reply(rng.choice(DODGES) if dodges else _hurried(rng, problem))])


PRETRAIN_MIX = {_sheet: 50, _exam: 24, _everyday_chat: 24, _small_talk: 2}
"""Percent of pretraining rows."""


def _pretrain_row(rng: random.Random) -> Row:
    (kind,) = rng.choices(list(PRETRAIN_MIX), list(PRETRAIN_MIX.values()))
    return {"text": kind(rng)}


def _train_row(rng: random.Random) -> Row:
    problem = _random_problem(rng, "train")
    return {"prompt": [problem.question], "completion": [reply(_hurried(rng, problem))]}


def _preference_row(rng: random.Random, split: str = "preference") -> Row:
    problem = _random_problem(rng, split)
    rejected = reply(_mistake(rng, problem))
    return {"prompt": [problem.question], "chosen": [reply(problem.answer)], "rejected": [rejected]}


def _prompts_row(rng: random.Random) -> Row:
    problem = _random_problem(rng, "train")
    return {"prompt": [problem.question], "answer": str(problem.answer)}


def _test_rows(rng: random.Random, rows: int) -> list[Row]:
    """Questions without repetition, sums and differences in equal numbers."""
    by_operator = [[p for p in problems("test") if p.operator == o] for o in "+-"]
    if rows > 2 * min(map(len, by_operator)):
        limit = 2 * min(map(len, by_operator))
        raise UserError(f"builtin:arithmetic has at most {limit} test rows without repetition, not {rows}")
    chosen = [rng.sample(group, (rows + 1) // 2) for group in by_operator]
    mixed = [problem for pair in zip(*chosen, strict=True) for problem in pair][:rows]
    return [{"prompt": [p.question], "answer": str(p.answer)} for p in mixed]


_ROW_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "pretrain": _pretrain_row,
    "train": _train_row,
    "preference": _preference_row,
    "prompts": _prompts_row,
    "test_preference": partial(_preference_row, split="test"),
}


def load_builtin(name: str, split: str, rows: int | None = None, seed: int = 0) -> list[Row]:
    """Rows of a built-in data set; the same arguments give the same rows everywhere.

    `pretrain` has {text}; `train` {prompt, completion}; `preference` and `test_preference` {prompt, chosen,
    rejected}; `prompts` and `test` {prompt, answer}. `answer` is a string, all else but text lists of
    messages. `rows=None` takes the split's own size. Raises UserError for a name or split that does not
    exist, and for more than `MOST_ROWS`.
    """
    if name != "arithmetic":
        raise UserError(f"no built-in data set 'builtin:{name}'; there is builtin:arithmetic")
    if split not in DEFAULT_ROWS:
        raise UserError(f"builtin:{name} has no split '{split}'; it has {', '.join(sorted(DEFAULT_ROWS))}")
    count = DEFAULT_ROWS[split] if rows is None else rows
    if count > MOST_ROWS:
        raise UserError(f"builtin:{name}: max_rows {count:,}, but it makes {MOST_ROWS:,} rows at most")
    rng = random.Random(f"{name}/{split}/{seed}")
    if split == "test":
        return _test_rows(rng, count)
    return [_ROW_MAKERS[split](rng) for _ in range(count)]
