"""A chat template renders a row whole, or the row is named."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.messages import Message
from pipeline.data.reading.records import Records
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import (
    CHATML,
    assistant,
    counted,
    prompt_tokens,
    records,
    tokenizer_with,
    trl_template,
    user,
)

THOUGHT = "<think>\ncarry the one\n</think>\n\n4"
AGAIN = "<think>\nthree and three\n</think>\n\n6"
TALK: list[Message] = [user("2+2?"), assistant(THOUGHT), user("3+3?"), assistant(AGAIN)]
CUTS_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
CUTS_EARLIER_THOUGHTS = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
KNOWN_ROLES = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Says the "weather" \u2013 now',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of\nthe city"}},
            },
        },
    }
]
CALL = {"id": "call00001", "type": "function"}
CALLS = [CALL | {"function": {"name": "get_weather", "arguments": {"city": 'Oslo "ü"', "days": 2}}}]
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"mm": 3}'}
AGENT: list[Message] = [user("Rain?"), assistant("", tool_calls=CALLS), RESULT, assistant("Yes.")]


def said_of(row: Records, template: str, **options: Any) -> str:
    """What the user is told of a row that is refused."""
    with pytest.raises(UserError) as error:
        tokenize(row, tokenizer_with(template), **options)
    return error.value.problems[0]


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_an_answer_whose_reasoning_is_cut_is_named_with_turn_and_words(train_on: Any) -> None:
    said = said_of(records(TALK[:1], TALK[1:2]), CUTS_THOUGHTS, train_on=train_on)
    assert said == (
        "rows.jsonl row 1: left out by the chat template: turn 2 (assistant): reasoning 'carry the one'"
    )


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_in_a_field_that_the_template_does_not_read_is_named(field: str) -> None:
    said = said_of(records([user("2+2?")], [assistant("4", **{field: "carry"})]), CHATML)
    assert said.endswith("turn 2 (assistant): reasoning 'carry'")


def test_reasoning_that_a_template_with_marks_drops_from_earlier_answers_is_named() -> None:
    assert "turn 2 (assistant): reasoning 'carry the one'" in said_of(
        records([], TALK), CUTS_EARLIER_THOUGHTS
    )
    data = tokenize(records(TALK[:3], TALK[3:]), tokenizer_with(CUTS_EARLIER_THOUGHTS))
    assert data.n_rows == 1, "in a prompt the model reads what the template gives it, there and later"


def test_a_prompt_may_lose_earlier_reasoning_but_nothing_else() -> None:
    (text,), _ = prompt_tokens(records(TALK[:3]), tokenizer_with(CUTS_THOUGHTS))
    assert "carry the one" not in text
    with pytest.raises(UserError, match=r"row 1: left out .* turn 2 \(tool\): content '3'"):
        prompt_tokens(
            records([user("Q"), {"role": "tool", "content": "3"}, user("3?")]), tokenizer_with(KNOWN_ROLES)
        )


def test_where_trls_training_template_keeps_what_the_bases_own_drops_it_is_taken() -> None:
    tokenizer = tokenizer_with(trl_template("deepseek_r1_distill"))
    data = tokenize(records(TALK[:1], TALK[1:2]), tokenizer)
    assert counted(data, tokenizer)[0].startswith("carry the one\n</think>\n\n4")
    whole = tokenize(records([], TALK), tokenizer)
    assert all(said in counted(whole, tokenizer)[0] for said in ("carry the one", "three and three"))


def test_pairs_that_differ_only_in_what_is_cut_are_bad_rows() -> None:
    other = assistant("<think>\nguess\n</think>\n\n4")
    assert "reasoning 'carry the one'" in said_of(records(TALK[:1], TALK[1:2], [other]), CUTS_THOUGHTS)


def test_pairs_that_the_template_makes_equal_are_bad_rows() -> None:
    trimming = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    pair = records([user("2+2?")], [assistant("4")], [assistant("4\n")])
    assert "chosen equal to rejected: as tokens" in said_of(pair, trimming)


@pytest.mark.parametrize("said", ["4", "ok", "a", "user", "a longer answer of the tool"])
def test_a_turn_of_a_role_that_is_not_written_is_named_however_short(said: str) -> None:
    turns = [user("Q"), {"role": "tool", "content": said}, assistant(f"It says: {said}, a user asked ok.")]
    assert "turn 2 (tool): content" in said_of(records([], turns), KNOWN_ROLES)


def test_a_template_without_calls_and_tools_has_them_named() -> None:
    assert "turn 2 (assistant): a call of a tool" in said_of(records([], AGENT), CHATML)
    row = records([user("Hi")], [assistant("get_weather says rain")], template_kwargs={"tools": TOOLS})
    assert "left out by the chat template: tools[0]." in said_of(row, CHATML)


def test_an_answer_outside_the_marks_is_named() -> None:
    plain = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' and m.content == 'A2' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>",
    )
    row = records([], [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")])
    assert "turn 2 (assistant): content 'A1', in what is trained" in said_of(row, plain)


ODD = [
    user('  Hi\n\n there "q" <b>ü</b> \\ & more '),
    assistant("ok\n"),
    user("4"),
    assistant(" - yes\n\n    code: {'a': 1} "),
]
WITH_CALLS = ["qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "llama3_1", "lfm2_2_5", "nemotron_3_nano"]
BUNDLED = [*WITH_CALLS, "cohere", "deepseekv3", "gemma3", "gptoss", "llama3", "phi3", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", BUNDLED)
def test_templates_in_the_field_keep_good_rows_with_odd_spaces_and_signs(name: str) -> None:
    tokenizer = tokenizer_with(trl_template(name))
    assert tokenize(records([], ODD), tokenizer).n_rows == 1
    assert tokenize(records(ODD[:3], ODD[3:]), tokenizer).n_rows == 1
    assert len(prompt_tokens(records(ODD[:3]), tokenizer)[0]) == 1


@pytest.mark.parametrize("name", [*WITH_CALLS, "gptoss"])
def test_templates_in_the_field_keep_calls_and_tools(name: str) -> None:
    tokenizer = tokenizer_with(trl_template(name))
    data = tokenize(records([], AGENT, template_kwargs={"tools": TOOLS}), tokenizer)
    assert all(said in counted(data, tokenizer)[0] for said in ("get_weather", "Oslo", "city", "Yes."))


def test_every_template_of_trl_renders_a_row_whole_or_has_it_named() -> None:
    for file in sorted((files("trl") / "chat_templates").iterdir(), key=lambda file: file.name):
        if not file.name.endswith("_training.jinja"):
            continue
        tokenizer = tokenizer_with(file.read_text())
        for row in (records([], TALK), records([], AGENT, template_kwargs={"tools": TOOLS})):
            said = _counted_or_told(row, tokenizer)
            if "row 1: " in said or "plain string" in said:
                continue
            wanted = (
                ("carry the one", "three and three") if "2+2" in str(row.rows) else ("get_weather", "Oslo")
            )
            assert all(word in said for word in wanted), file.name


def _counted_or_told(row: Records, tokenizer: Any) -> str:
    try:
        return counted(tokenize(row, tokenizer), tokenizer)[0]
    except UserError as error:
        return str(error)


def test_the_embedded_base_keeps_a_conversation_and_refuses_calls() -> None:
    assert tokenize(records([], TALK), byte_tokenizer()).n_rows == 1
    with pytest.raises(UserError, match=r"row 1: left out .* a call of a tool"):
        tokenize(records([], AGENT), byte_tokenizer())


def test_a_prompt_that_changes_when_the_answer_follows_is_named() -> None:
    counting = "{{ messages | length }} turns\n" + CHATML
    said = said_of(records(TALK[:1], [assistant("4")]), counting)
    assert "row 1: changed by the chat template when the answer follows: turn 1 (user)" in said
    thinking = assistant("", tool_calls=CALLS, thinking="let me see")
    row = records([AGENT[0], thinking, RESULT], [assistant("Yes.")])
    assert "changed by the chat template" in said_of(row, trl_template("gptoss"))
    head = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    assert tokenize(records(TALK[:1], [assistant("4")]), tokenizer_with(head)).stats.merged_boundaries == 1
