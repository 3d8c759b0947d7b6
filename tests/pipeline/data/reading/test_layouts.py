"""Every layout is recognised by itself and gives the same canonical record."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.errors import UserError
from tests.pipeline.data.reading.rows import BAD, GOOD, USER, load

HUMAN = {"from": "human", "value": "2+2?"}
GPT = {"from": "gpt", "value": "4"}


SFT = {
    "messages": {"messages": [USER, GOOD]},
    "conversations": {"conversations": [HUMAN, GPT]},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    "instruction": {"instruction": "2+2?", "input": "", "output": "4"},
    "question_answer": {"question": "2+2?", "answer": "4"},
}


@pytest.mark.parametrize("layout", SFT)
def test_an_sft_layout_is_recognised_and_asks_two_plus_two(tmp_path: Path, layout: str) -> None:
    records = load(tmp_path, [SFT[layout]], "sft")
    assert records.layout == layout
    assert records[0].prompt + records[0].completion == [USER, GOOD]


@pytest.mark.parametrize("layout", SFT)
def test_any_sft_layout_serves_as_prompts_with_the_answer_as_a_column(tmp_path: Path, layout: str) -> None:
    record = load(tmp_path, [SFT[layout]], "prompt")[0]
    assert (record.prompt, record.answers, record.columns["answer"]) == ([USER], (), "4")


def test_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    records = load(tmp_path, [{"text": "once upon a time"}], "sft")
    assert records.layout == "text"
    assert records[0].is_text
    assert records[0].plain == ("", "once upon a time")


def test_the_input_of_an_instruction_follows_it_after_a_blank_line(tmp_path: Path) -> None:
    record = load(tmp_path, [{"instruction": "Add.", "input": "2 and 2", "output": "4"}], "sft")[0]
    assert record.prompt[0]["content"] == "Add.\n\n2 and 2"


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    record = load(tmp_path, [{"prompt": [USER], "completion": [GOOD]}], "sft")[0]
    assert (record.prompt, record.completion, record.plain) == ([USER], [GOOD], None)


PREFERENCES = {
    "preference": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "preference_conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "preference_transcripts": {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    },
    "rejected_response": {"messages": [USER, GOOD], "rejected_response": "5"},
    "question_preference": {"question": "2+2?", "chosen": "4", "rejected": "5"},
    "instruction_preference": {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"},
}


@pytest.mark.parametrize("layout", PREFERENCES)
def test_a_preference_layout_is_recognised_and_prefers_four(tmp_path: Path, layout: str) -> None:
    records = load(tmp_path, [PREFERENCES[layout]], "preference")
    assert records.layout == layout
    assert (records[0].prompt, records[0].chosen, records[0].rejected) == ([USER], [GOOD], [BAD])


@pytest.mark.parametrize("layout", PREFERENCES)
def test_a_preference_layout_serves_as_prompts(tmp_path: Path, layout: str) -> None:
    record = load(tmp_path, [PREFERENCES[layout]], "prompt")[0]
    assert record.prompt == [USER]
    assert record.columns["answer"] == "4"


MIXED_FORMS = {
    "message lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "a string prompt with message lists": {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
    "a string prompt that is inside the answers too": {
        "prompt": "2+2?",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "a message prompt with string answers": {"prompt": [USER], "chosen": "4", "rejected": "5"},
}


@pytest.mark.parametrize("form", MIXED_FORMS)
def test_forms_of_prompt_chosen_rejected_are_normalised_to_messages(tmp_path: Path, form: str) -> None:
    record = load(tmp_path, [MIXED_FORMS[form]], "preference")[0]
    assert (record.prompt, record.chosen, record.rejected) == ([USER], [GOOD], [BAD])
    assert record.plain is None


def test_a_transcript_of_several_turns_keeps_them_in_the_prompt(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
    record = load(tmp_path, [{"chosen": f"{start} 4", "rejected": f"{start} 5"}], "preference")[0]
    assert [m["role"] for m in record.prompt] == ["user", "assistant", "user"]
    assert record.plain == (start, " 4", " 5")


def test_a_system_column_goes_first(tmp_path: Path) -> None:
    record = load(tmp_path, [{"system": "Be brief.", "question": "2+2?", "answer": "4"}], "sft")[0]
    assert record.prompt == [{"role": "system", "content": "Be brief."}, USER]


def test_columns_are_mapped_by_name(tmp_path: Path) -> None:
    row = {"query": "2+2?", "better": "4", "worse": "5", "id": 7}
    columns = {"prompt": "query", "chosen": "better", "rejected": "worse"}
    record = load(tmp_path, [row], "preference", columns=columns)[0]
    assert (record.prompt, record.chosen) == ([USER], [GOOD])
    assert record.columns == {"id": 7}


def test_evaluation_prompts_keep_answer_and_other_columns(tmp_path: Path) -> None:
    records = load(
        tmp_path, [{"prompt": "2+2?", "answer": 4, "id": "a"}, {"prompt": "1+1?", "answer": 2}], "prompt"
    )
    assert records.layout == "prompt"
    assert records.columns == {"answer": [4, 2], "id": ["a", None]}


def test_tools_as_json_reach_the_template(tmp_path: Path) -> None:
    record = load(tmp_path, [{"messages": [USER, GOOD], "tools": '[{"name": "f"}]'}], "sft")[0]
    assert record.template_kwargs == {"tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("sft", PREFERENCES["preference"], "preferences, which a dpo or reward stage takes"),
        ("preference", SFT["prompt_completion"], "one answer each, which an sft stage takes"),
        ("sft", {"promt": "2+2?", "completio": "4"}, "columns: {prompt: promt, completion: completio}"),
        ("prompt", {"text": "once upon a time"}, "are no layout for prompts"),
    ],
)
def test_a_layout_that_does_not_fit_the_stage_is_refused(
    tmp_path: Path, kind: str, row: dict, said: str
) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl") as error:
        load(tmp_path, [row], kind)
    assert said in str(error.value)


def test_a_mapped_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row has \(prompt: query\); the rows have: question, answer"):
        load(tmp_path, [SFT["question_answer"]], "sft", columns={"prompt": "query"})


def test_an_explicit_layout_says_what_it_misses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layout messages needs the columns messages"):
        load(tmp_path, [SFT["question_answer"]], "sft", layout="messages")
