"""The built-in arithmetic task: what its splits hold, and that they never touch."""

from __future__ import annotations

import re

import pytest

from actors.errors import UserError
from pipeline.data.reading.builtin import DEFAULT_ROWS, SPLIT_SHARES, Exercise, load_builtin, problems
from pipeline.rewards.exact_match import exact_match

QUESTION = re.compile(r"(\d+)([+-])(\d+)=\?")


def problem_of(row: dict) -> Exercise:
    a, operator, b = QUESTION.fullmatch(row["prompt"][0]["content"]).groups()
    return Exercise(int(a), int(b), operator)


def pairs_in(rows: list[dict]) -> set[frozenset[int]]:
    """Unordered operand pairs of every problem that the rows mention, in any wording."""
    found = re.findall(r"(\d+)[+-](\d+)", str(rows))
    return {frozenset((int(a), int(b))) for a, b in found}


@pytest.mark.parametrize(
    ("a", "operator", "b", "answer", "slip"),
    [(37, "+", 45, 82, 72), (52, "-", 37, 15, 25), (91, "+", 19, 110, 100), (60, "-", 28, 32, 48)],
)
def test_the_slip_forgets_carry_and_borrow(a, operator, b, answer, slip):
    problem = Exercise(a, b, operator)
    assert (problem.answer, problem.slip, problem.is_hard) == (answer, slip, True)


def test_without_a_carry_hurrying_does_no_harm():
    assert not Exercise(31, 45, "+").is_hard
    assert not Exercise(58, 37, "-").is_hard


def test_every_operand_pair_belongs_to_exactly_one_split():
    every = [p for split in SPLIT_SHARES for p in problems(split)]
    assert len(every) == len(set(every)) == 90 * 90 + 90 * 91 // 2


def test_splits_share_no_operand_pair_in_either_order_whatever_the_seed():
    seen = {
        split: pairs_in(load_builtin("arithmetic", split, 500, seed=i))
        for i, split in enumerate(SPLIT_SHARES)
    }
    for split, pairs in seen.items():
        others = set().union(*(p for name, p in seen.items() if name != split))
        assert pairs
        assert not pairs & others


@pytest.mark.parametrize("split", DEFAULT_ROWS)
def test_rows_are_a_function_of_split_count_and_seed(split):
    assert load_builtin("arithmetic", split, 50, seed=1) == load_builtin("arithmetic", split, 50, seed=1)
    assert load_builtin("arithmetic", split, 50, seed=1) != load_builtin("arithmetic", split, 50, seed=2)
    assert len(load_builtin("arithmetic", split, 7)) == 7


def test_the_test_split_asks_500_different_questions_and_knows_their_answers():
    rows = load_builtin("arithmetic", "test")
    assert len(rows) == 500
    assert len({problem_of(r) for r in rows}) == 500
    assert all(r["answer"] == str(problem_of(r).answer) for r in rows)
    assert sum(problem_of(r).operator == "+" for r in rows) == 250


def test_prompts_ask_what_is_demonstrated_and_know_the_right_answer():
    rows = load_builtin("arithmetic", "prompts", 2000)
    assert {problem_of(r) for r in rows} <= set(problems("train"))
    assert all(r["answer"] == str(problem_of(r).answer) for r in rows)
    assert 0.45 < sum(problem_of(r).operator == "+" for r in rows) / 2000 < 0.55


def test_demonstrations_slip_where_a_carry_is_needed_and_only_there():
    rows = [(problem_of(r), r["completion"][0]["content"]) for r in load_builtin("arithmetic", "train", 4000)]
    assert all(text == str(p.answer) for p, text in rows if not p.is_hard)
    hard = [(p, text) for p, text in rows if p.is_hard]
    assert all(text in (str(p.answer), str(p.slip)) for p, text in hard)
    assert 0.66 < sum(text == str(p.slip) for p, text in hard) / len(hard) < 0.74


@pytest.mark.parametrize(("split", "operands"), [("preference", "preference"), ("test_preference", "test")])
def test_preferences_hold_the_right_answer_against_a_wrong_one(split, operands):
    for row in load_builtin("arithmetic", split, 2000):
        assert problem_of(row) in problems(operands)
        right = problem_of(row).answer
        assert row["chosen"][0]["content"] == str(right)
        assert row["rejected"][0]["content"].isdigit()
        assert int(row["rejected"][0]["content"]) != right


def test_exact_match_scores_strings_and_messages_and_ignores_other_columns():
    prompts = ["a", "b", "c"]
    assert exact_match(prompts, [" 82\n", "72", ""], answer=["82", "82", "82"], kind=[1, 2, 3]) == [
        1.0,
        0.0,
        0.0,
    ]
    turns = [[{"role": "assistant", "content": text}] for text in ("82", "82.", "8 2")]
    assert exact_match(prompts, turns, answer=["82", "82", "82"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "split", "rows", "says"),
    [
        ("algebra", "train", 5, "builtin:arithmetic"),
        ("arithmetic", "validation", 5, "preference, pretrain, prompts, test, test_preference, train"),
        ("arithmetic", "test", 100_000, "at most"),
    ],
)
def test_a_wrong_name_split_or_size_is_answered_with_what_there_is(name, split, rows, says):
    with pytest.raises(UserError, match=says):
        load_builtin(name, split, rows)
