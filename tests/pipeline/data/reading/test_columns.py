"""Columns of a layout: `columns:` goes first, every row is looked at, and proposals in messages work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from actors.batches.generations import SamplingSpec
from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.reading.layouts import LAYOUTS
from pipeline.data.spec import ColumnName, LayoutName
from pipeline.data.tokens.prompts import PromptData
from pipeline.data.tokens.tokenize import tokenize
from pipeline.evaluation.held_out import EvalSet
from pipeline.evaluation.scorers import find_scorer, score
from pipeline.evaluation.spec import EvalSpec
from tests.pipeline.data.reading.rows import BAD, GOOD, USER, load


def test_every_name_of_a_layout_can_be_said_in_columns_and_every_layout_in_layout() -> None:
    assert set(get_args(ColumnName)) == {name for layout in LAYOUTS for name in layout.names}
    assert set(get_args(LayoutName)) == {layout.name for layout in LAYOUTS}


PLAIN = {"instruction": "Say it.", "output": "it"}
LATE: dict[str, tuple[dict[str, Any], Any]] = {
    "input": ({"input": "2 and 2"}, lambda r: r.prompt[0]["content"] == "Say it.\n\n2 and 2"),
    "system": ({"system": "Be brief."}, lambda r: r.prompt[0]["content"] == "Be brief."),
    "tools": ({"tools": [{"name": "f"}]}, lambda r: r.template_kwargs == {"tools": [{"name": "f"}]}),
    "chat_template_kwargs": ({"chat_template_kwargs": {"x": 1}}, lambda r: r.template_kwargs == {"x": 1}),
    "history": ({"history": [["Hi.", "Hello."]]}, lambda r: r.prompt[1]["content"] == "Hello."),
}


@pytest.mark.parametrize("column", LATE)
def test_a_column_that_first_comes_late_is_used(tmp_path: Path, column: str) -> None:
    value, holds = LATE[column]
    rows = [PLAIN] * 999 + [{**PLAIN, **value}]
    assert holds(load(tmp_path, rows, "sft")[999])


def test_a_row_that_lacks_a_column_which_most_have_is_a_bad_row_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 301: missing column: output"):
        load(tmp_path, [PLAIN] * 300 + [{"instruction": "Say it.", "messages": [USER, GOOD]}], "sft")


def test_a_needed_column_without_a_single_value_is_named_row_by_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1: missing column: completion is null"):
        load(tmp_path, [{"prompt": "2+2?", "completion": None}], "sft")


def test_a_layout_without_values_gives_way_to_one_that_has_them(tmp_path: Path) -> None:
    rows = [{"messages": None, "question": "2+2?", "answer": "4"}]
    assert load(tmp_path, rows, "sft").layout == "question_answer"


def test_an_optional_column_without_values_gives_way_to_the_one_that_has_them(tmp_path: Path) -> None:
    row = {"system": None, "system_prompt": "Be brief.", "question": "2+2?", "answer": "4"}
    assert load(tmp_path, [row], "sft")[0].prompt[0]["content"] == "Be brief."


NUMINA = {"problem": "2+2?", "solution": "4", "messages": [USER, BAD]}


def test_columns_that_are_mapped_go_before_a_layout_that_the_names_show(tmp_path: Path) -> None:
    record = load(tmp_path, [NUMINA], "sft", columns={"question": "problem", "answer": "solution"})[0]
    assert (record.prompt, record.completion) == ([USER], [GOOD])
    assert record.columns == {"messages": [USER, BAD]}


MAPPED: dict[str, tuple[str, dict[str, Any], dict[str, str], Any]] = {
    "system": ("sft", {"persona": "Be brief.", "messages": [USER, GOOD]}, {"system": "persona"},
               lambda r: r.completion[0] == {"role": "system", "content": "Be brief."}),
    "tools": ("sft", {"functions": '[{"name": "f"}]', "messages": [USER, GOOD]}, {"tools": "functions"},
              lambda r: r.template_kwargs == {"tools": [{"name": "f"}]}),
    "chat_template_kwargs": ("sft", {"kw": {"x": 1}, "messages": [USER, GOOD]},
 {"chat_template_kwargs": "kw"},
                             lambda r: r.template_kwargs == {"x": 1}),
    "history": ("sft", {"past": [["Hi.", "Hello."]], "question": "2+2?", "answer": "4"}, {"history": "past"},
                lambda r: [m["content"] for m in r.prompt] == ["Hi.", "Hello.", "2+2?"]),
    "margin": ("preference", {"prompt": "2+2?", "chosen": "4", "rejected": "5", "gap": 0.5, "margin": 9},
               {"margin": "gap"}, lambda r: r.columns["margin"] == 0.5),
    "label": ("unpaired", {"prompt": "2+2?", "completion": "4", "good": "yes", "label": "spam"},
              {"label": "good"}, lambda r: r.columns["label"] is True),
    "answer": ("prompt", {"messages": [USER, BAD], "gold": 4, "answer": "five"}, {"answer": "gold"},
               lambda r: r.prompt == [USER] and r.columns["answer"] == 4),
    "completion": ("sft", {"prompt": "2+2?", "response": "5", "better": "4"}, {"completion": "better"},
                   lambda r: r.completion == [GOOD]),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_column_is_read_in_place_of_one_that_is_called_so(tmp_path: Path, name: str) -> None:
    kind, row, columns, holds = MAPPED[name]
    assert holds(load(tmp_path, [row], kind, columns=columns)[0])


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "what no such stage reads": (
        "sft",
        {"prompt": "2+2?", "completion": "4", "gap": 1},
        {"columns": {"margin": "gap"}},
        "`columns` says what margin is, which an sft stage does not read",
    ),
    "what no layout reads together": (
        "sft",
        {"q": "2+2?", "r": "4"},
        {"columns": {"question": "q", "completion": "r"}},
        r"no layout reads question, completion together; .*question_answer \(question, answer",
    ),
    "one column twice": (
        "sft",
        {"q": "2+2?"},
        {"columns": {"prompt": "q", "completion": "q"}},
        "`columns` gives 'q' to prompt and completion",
    ),
    "what the named layout does not read": (
        "sft",
        {"messages": [USER, GOOD], "past": []},
        {"layout": "messages", "columns": {"history": "past"}},
        "layout messages does not read history",
    ),
    "half of a layout": (
        "sft",
        {"query": "2+2?", "reply": "4"},
        {"columns": {"prompt": "query"}},
        r"for example `columns: \{prompt: query, completion: reply\}`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_entry_that_nothing_uses_is_refused_and_not_ignored(tmp_path: Path, case: str) -> None:
    kind, row, spec, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        load(tmp_path, [row], kind, **spec)


HINTED: dict[str, tuple[str, dict[str, Any]]] = {
    "another word": ("sft", {"query": "2+2?", "reply": "4"}),
    "misspelt": ("sft", {"promt": "2+2?", "completio": "4"}),
    "capitals": ("sft", {"Question": "2+2?", "Response": "4"}),
    "input and output": ("sft", {"input": "2+2?", "output": "4"}),
    "pairs of other names": ("preference", {"query": "2+2?", "better": "4", "worse": "5"}),
    "the chosen of pairs": ("sft", {"question": "2+2?", "chosen": "4", "rejected": "5"}),
    "the chosen of conversations": ("sft", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    "a label of another name": ("unpaired", {"messages": [USER, GOOD], "is_correct": 1}),
    "a dialogue": ("sft", {"dialog": [USER, GOOD]}),
    "prompts": ("prompt", {"input": "2+2?"}),
}


@pytest.mark.parametrize("case", HINTED)
def test_a_hint_says_what_is_not_there_and_works_when_it_is_followed(tmp_path: Path, case: str) -> None:
    kind, row = HINTED[case]
    with pytest.raises(UserError) as error:
        load(tmp_path, [row], kind)
    (hint,) = re.findall(r"`columns: ({.*?})`", str(error.value))
    columns = yaml.safe_load(hint)
    assert all(name != column for name, column in columns.items())
    record = load(tmp_path, [row], kind, columns=columns)[0]
    said = record.completion if record.answers else []
    assert [m["content"] for m in [*record.prompt, *said]] == ["2+2?", "4"][: 1 if kind == "prompt" else 2]


NO_HINT: dict[str, tuple[str, dict[str, Any], str]] = {
    "numbered answers": (
        "preference",
        {"prompt": "a", "response_0": "b", "response_1": "c", "better": 0},
        "several answers in a row (`response_0` and `response_1`); write one row for each pair",
    ),
    "a column that only looks like a label": (
        "unpaired",
        {"problem": "a", "level": "Level 1", "solution": "b"},
        "are no layout for a kto stage",
    ),
    "prompts alone": ("sft", {"prompt": "a", "id": 1}, "prompts without answers"),
}


@pytest.mark.parametrize("case", NO_HINT)
def test_where_no_columns_would_do_none_are_said(tmp_path: Path, case: str) -> None:
    kind, row, said = NO_HINT[case]
    with pytest.raises(UserError) as error:
        load(tmp_path, [row], kind)
    assert said in str(error.value)
    assert "columns: {" not in str(error.value)


@pytest.mark.parametrize("history", [[["Hi.", "Hello."]], '[["Hi.", "Hello."]]', [USER, GOOD]])
def test_history_is_prompt_and_is_not_trained(tmp_path: Path, history: Any) -> None:
    row = {"system": "Be brief.", "history": history, "prompt": "And?", "response": "No."}
    record = load(tmp_path, [row], "sft")[0]
    assert [m["role"] for m in record.prompt] == ["system", "user", "assistant", "user"]
    assert record.prompt[-1]["content"] == "And?"
    tokenizer = byte_tokenizer()
    data = tokenize(load(tmp_path, [row], "sft"), tokenizer)
    assert tokenizer.decode(data.sequences.token_ids[data.sequences.loss_mask]) == "No.<|im_end|>"


@pytest.mark.parametrize("history", [[], "", None, "[]"])
def test_an_empty_history_is_none(tmp_path: Path, history: Any) -> None:
    record = load(tmp_path, [{"instruction": "2+2?", "output": "4", "history": history}], "sft")[0]
    assert (record.prompt, record.plain) == ([USER], ("2+2?\n", "4"))


@pytest.mark.parametrize("history", ["long ago", [["Hi."]], [1], [["Hi.", ""]], [USER], {"a": 1}])
def test_a_history_that_is_none_is_a_bad_row(tmp_path: Path, history: Any) -> None:
    with pytest.raises(UserError, match=r"row 1: .*history"):
        load(tmp_path, [{"instruction": "2+2?", "output": "4", "history": history}], "sft")


def test_history_beside_a_conversation_is_a_bad_row(tmp_path: Path) -> None:
    row = {"prompt": [USER, GOOD, USER], "completion": "4", "history": [["Hi.", "Hello."]]}
    with pytest.raises(UserError, match="history stands beside a prompt that is a conversation itself"):
        load(tmp_path, [row], "sft")


def test_a_held_out_column_does_not_take_the_place_of_what_the_model_said() -> None:
    columns = {"answer": ["4"], "completions": ["five"], "prompts": ["3+3?"]}
    held_out = EvalSet(PromptData(["2+2?"], ["2+2?"], [[1]], columns, Skipped(), ""), SamplingSpec())
    spec = EvalSpec(data=[{"source": "x"}])
    assert score(find_scorer("exact_match"), spec, held_out.samples(["4"], [[52]])) == [1.0]


def test_a_completion_that_holds_the_prompt_again_has_it_once(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    record = load(tmp_path, [row], "sft", columns={"completion": "chosen"})[0]
    assert (record.prompt, record.completion) == ([USER], [GOOD])
    with pytest.raises(UserError, match="row 1: the answer holds another prompt"):
        load(tmp_path, [{**row, "prompt": "3+3?"}], "sft", columns={"completion": "chosen"})
    system = [{"role": "system", "content": "Be brief."}]
    record = load(tmp_path, [{"prompt": system, "completion": [USER, GOOD]}], "sft")[0]
    assert (record.prompt, record.completion) == (system, [USER, GOOD])
