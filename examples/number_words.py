"""Numbers in words: the task of examples/number-words.yaml, its data and its reward functions.

    Write the numbers in words: Tom's fruit bowl contains 3 oranges and 6 lemons.   ->   Three and six.

The texts are sentences of GSM8K's questions, as they stand (`gsm8k-texts/`, with GSM8K's licence).

python examples/number_words.py build/number-words      # writes the five files that the run reads
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).parent / "gsm8k-texts" / "texts.jsonl"
QUESTION = "Write the numbers in words: "
SPLITS = {"train": 0.42, "pairs": 0.2, "test": 0.38}
"""Shares of the texts; no text is in two of them."""

SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = dict(
    zip(range(20, 100, 10), ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
)
LARGEST = 99

Row = dict[str, str]


# --- Reward functions, with TRL's signature -------------------------------------------------------


def right(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where a completion is the row's answer, else 0.0."""
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]


def found(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """Numbers that a completion and the row's answer have in common, as a share of the longer of the two; 0.0
    for a completion without the form."""
    return [_in_common(read_numbers(text), read_numbers(wanted)) for text, wanted in zip(completions, answer)]


def _in_common(said: list[int] | None, wanted: list[int] | None) -> float:
    if said is None or wanted is None:
        return 0.0
    return (Counter(said) & Counter(wanted)).total() / max(len(said), len(wanted))


def in_form(completions: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where a completion has the form `Three and six.`, whichever the numbers are, else 0.0."""
    return [float(read_numbers(text) is not None) for text in completions]


def read_numbers(text: str) -> list[int] | None:
    """Numbers of one sentence `Three, six and two.`; None for any other text."""
    found = re.fullmatch(r"([A-Z].*) and ([a-z-]+)\.", text.strip())
    if found is None:
        return None
    first, *others = [*found[1].split(", "), found[2]]
    numbers = [NUMBERS.get(word) for word in (first.lower(), *others)]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) else None


def in_words(number: int) -> str:
    """The English word of 0 to 99: `forty-two`."""
    if number < len(SMALL):
        return SMALL[number]
    tens = TENS[number - number % 10]
    return f"{tens}-{SMALL[number % 10]}" if number % 10 else tens


NUMBERS = {in_words(number): number for number in range(LARGEST + 1)}


def sentence(numbers: Sequence[int]) -> str:
    """`Three, six and two.`"""
    *most, last = map(in_words, numbers)
    return f"{', '.join(most)} and {last}.".capitalize()


# --- Data -----------------------------------------------------------------------------------------


def numbers_of(text: str) -> list[int]:
    """The numbers that a text has in digits, in its order."""
    return [int(number) for number in re.findall(r"\d+", text)]


def question(text: str) -> str:
    return QUESTION + text


def answer(text: str) -> str:
    return sentence(numbers_of(text))


def slips(text: str) -> list[str]:
    """Wrong answers of the kinds that a small model gives: a number left out, said twice, or misread."""
    numbers = numbers_of(text)
    places = range(len(numbers))
    wrong = [[*numbers[:i], *numbers[i + 1 :]] for i in places if len(numbers) > 2]
    wrong += [
        [*numbers[:i], misread, *numbers[i + 1 :]] for i in places for misread in misreadings(numbers[i])
    ]
    if len(numbers) == 2:
        wrong += [[numbers[0], *numbers], [*numbers, numbers[1]]]
    return [sentence(one) for one in dict.fromkeys(map(tuple, wrong)) if list(one) != numbers]


def misreadings(number: int) -> list[int]:
    """Of 28: 20, 8, 2 and 18; of 40: 4 and 14; of 6: 16 and 60."""
    tens, ones = divmod(number, 10)
    if number < 10:
        return [number + 10, number * 10]
    found = [tens * 10, ones, tens, 10 + ones] if ones else [tens, 10 + tens]
    return [one for one in dict.fromkeys(found) if one not in (0, number)]


def write_data(texts: Sequence[str], out: Path, seed: int = 0) -> dict[str, int]:
    """Write train, pairs, prompts, test and test_pairs as jsonl into `out`; returns rows of each.

    Prompts ask what `train` demonstrates, and `test_pairs` what `test` asks.
    """
    draw = random.Random(seed)
    shuffled = draw.sample(list(texts), len(texts))
    parts, start = {}, 0
    for name, share in SPLITS.items():
        end = start + round(share * len(shuffled))
        parts[name] = shuffled[start:end]
        start = end
    rows: dict[str, list[Row]] = {
        "train": [{"prompt": question(t), "completion": answer(t)} for t in parts["train"]],
        "prompts": [{"prompt": question(t), "answer": answer(t)} for t in parts["train"]],
        "pairs": [pair for t in parts["pairs"] for pair in pairs(t, 3, draw)],
        "test": [{"prompt": question(t), "answer": answer(t)} for t in parts["test"]],
        "test_pairs": [pair for t in parts["test"] for pair in pairs(t, 1, draw)],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, of_split in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    return {name: len(of_split) for name, of_split in rows.items()}


def pairs(text: str, count: int, draw: random.Random) -> list[Row]:
    """The right answer against each of `count` slips."""
    wrong = draw.sample(slips(text), count)
    return [{"prompt": question(text), "chosen": answer(text), "rejected": slip} for slip in wrong]


# --- Texts, from GSM8K's questions ----------------------------------------------------------------

PLAIN = re.compile(r"\$?\d{1,2}[.,?!]?")
"""A word with digits that counts as a plain number: no fractions, shares, times, or 4th."""
WORDS = re.compile(
    rf"\b({'|'.join([*SMALL, *TENS.values(), 'hundred', 'dozen', 'first', 'second'])})\b", re.I
)
LONGEST = 120
"""Characters of a text."""


def usable(text: str) -> bool:
    """Whether a text has two or three plain numbers of at most 89, and none in words."""
    words = [word for word in text.split() if re.search(r"\d", word)]
    plain = all(PLAIN.fullmatch(word) for word in words) and not WORDS.search(text)
    numbers = numbers_of(text)
    return plain and 2 <= len(numbers) <= 3 and min(numbers) > 0 and max(numbers) <= LARGEST - 10


def texts_of(questions: Sequence[str]) -> list[str]:
    """One text of every question that has one: of its sentences and neighbouring two, the richest."""
    found = []
    for whole in questions:
        sentences = re.split(r"(?<=[a-z0-9][.?!]) ", " ".join(whole.split()))
        windows = [" ".join(sentences[i : i + n]) for n in (1, 2) for i in range(len(sentences) - n + 1)]
        good = [text for text in windows if len(text) <= LONGEST and text.isascii() and usable(text)]
        if good:
            found.append(max(good, key=lambda text: len(numbers_of(text))))
    return sorted(set(found), key=found.index)


def main(read: Callable[[Path], list[Row]]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for train.jsonl, pairs.jsonl, ...")
    parser.add_argument("--gsm8k", type=Path, help="texts from this file with `question` instead")
    args = parser.parse_args()
    if args.gsm8k:
        texts = texts_of([row["question"] for row in read(args.gsm8k)])
    else:
        texts = [row["text"] for row in read(TEXTS)]
    for name, rows in write_data(texts, args.out).items():
        print(f"{args.out / name}.jsonl: {rows} rows")


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main(read_rows)
