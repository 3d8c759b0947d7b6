"""Numbers in words: what earns a reward, and what the data of the example is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.number_words import (
    LARGEST,
    TEXTS,
    answer,
    found,
    in_form,
    in_words,
    read_numbers,
    read_rows,
    right,
    slips,
    texts_of,
    write_data,
)

THREE = "A book has 8 chapters. Beth has read 2 chapters in 3 hours."
TWO = "Tom's fruit bowl contains 3 oranges and 42 lemons."


@pytest.mark.parametrize(
    ("completion", "rewards"),
    [
        ("Eight, two and three.", (1.0, 1.0)),
        (" Eight, two and three.\n", (1.0, 1.0)),
        ("Two, eight and three.", (0.0, 1.0)),
        ("Eight and three.", (0.0, 1.0)),
        ("eight, two and three.", (0.0, 0.0)),
        ("Eight, two and three. Beth", (0.0, 0.0)),
        ("Eight, two and 3.", (0.0, 0.0)),
        ("Eight, two and chapters.", (0.0, 0.0)),
        ("Eight.", (0.0, 0.0)),
        ("", (0.0, 0.0)),
    ],
)
def test_an_answer_is_right_where_form_numbers_and_order_are(
    completion: str, rewards: tuple[float, float]
) -> None:
    wanted = answer(THREE)
    rewarded = right(prompts=["q"], completions=[completion], answer=[wanted])
    assert (*rewarded, *in_form(prompts=["q"], completions=[completion], answer=[wanted])) == rewards


def test_numbers_in_words_are_read_as_they_are_written() -> None:
    assert [in_words(number) for number in (0, 13, 20, 42, 99)] == [
        *("zero", "thirteen", "twenty", "forty-two", "ninety-nine")
    ]
    assert answer(TWO) == "Three and forty-two."
    assert read_numbers(answer(TWO)) == [3, 42]


def test_numbers_in_common_count_as_a_share_of_the_longer_answer() -> None:
    said = ["Eight and three.", "Three, two and eight.", "Eight, eight and three.", "8 and 3.", ""]
    assert found(said, [answer(THREE)] * len(said)) == [2 / 3, 1.0, 2 / 3, 0.0, 0.0]


def test_every_slip_has_the_form_and_is_wrong() -> None:
    for text in (TWO, THREE, "He has 1 cat and 1 dog."):
        wrong = slips(text)
        assert len(set(wrong)) == len(wrong) >= 4
        assert sum(in_form(wrong)) == len(wrong)
        assert not any(right(wrong, [answer(text)] * len(wrong)))


def test_texts_are_sentences_with_two_or_three_plain_numbers() -> None:
    questions = [
        f"Beth reads. {THREE} How many are left?",
        "She ate 1/2 of the 6 cakes.",
        "She has 20% of 30 marbles.",
        "She has two cats, 3 dogs and 4 birds.",
        "There are 90 cows and 15 hens.",
        "There are 4 hens.",
        "The 4th of 6 boxes was empty.",
        THREE,
    ]
    assert texts_of(questions) == [THREE]


def test_no_text_is_asked_in_training_and_in_the_test(tmp_path: Path) -> None:
    texts = [row["text"] for row in read_rows(TEXTS)]
    counts = write_data(texts, tmp_path)
    assert counts["test"] >= 200
    asked = {name: {row["prompt"] for row in read_rows(tmp_path / f"{name}.jsonl")} for name in counts}
    assert asked["prompts"] == asked["train"]
    assert asked["test_pairs"] == asked["test"]
    assert not asked["test"] & (asked["train"] | asked["pairs"])
    assert not asked["train"] & asked["pairs"]
    assert len(asked["train"] | asked["pairs"] | asked["test"]) == len(texts)


def test_the_data_of_a_seed_is_always_the_same(tmp_path: Path) -> None:
    texts = [row["text"] for row in read_rows(TEXTS)]
    for name in ("one", "two"):
        write_data(texts, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_texts_of_the_repository_are_usable() -> None:
    texts = [row["text"] for row in read_rows(TEXTS)]
    assert len(texts) == len(set(texts)) > 600
    assert all(texts_of([text]) and read_numbers(answer(text)) for text in texts)
    assert max(number for text in texts for number in read_numbers(answer(text)) or []) < LARGEST
