"""Of several named templates a row goes through the one that transformers takes for it."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import UserError
from pipeline.cli.chat_loop import question
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import (
    CHATML,
    assistant,
    prompt_tokens,
    records,
    tokenizer_with,
    trl_template,
    user,
)

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Says the weather"}}]
TOOL_USE = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CHATML
ROW: dict[str, Any] = {"prompt": [user("Rain?")], "answer": [assistant("Yes.")]}


def test_rows_with_tools_take_tool_use_and_the_others_default() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_USE}
    for tools in (None, TOOLS):
        kwargs = {"tools": tools} if tools else {}
        row = records([user("Rain?")], [assistant("Yes.")], template_kwargs=kwargs)
        turns = [user("Rain?"), assistant("Yes.")]
        expected = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
        assert tokenize(row, tokenizer).sequences.token_ids.tolist() == expected
        asked = tokenizer.apply_chat_template(
            turns[:1], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert prompt_tokens(records(turns[:1], template_kwargs=kwargs), tokenizer)[1][0] == asked


def test_templates_without_the_needed_name_are_refused_with_their_names() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": TOOL_USE}
    with pytest.raises(UserError, match=r"named rag, tool_use, and rows without tools take `default`"):
        tokenize(records([user("Rain?")], [assistant("Yes.")]), tokenizer)
    row = records([user("Rain?")], [assistant("Yes.")], template_kwargs={"tools": TOOLS})
    assert tokenize(row, tokenizer).n_rows == 1


def test_a_named_template_that_cannot_be_masked_is_replaced_by_trls() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": trl_template("qwen3")}
    turns = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]
    data = tokenize(records([], turns, template_kwargs={"tools": TOOLS}), tokenizer)
    assert data.stats.masking == "template marks of TRL's training template"


def test_chat_reads_what_training_reads_and_says_what_the_template_refuses() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_USE}
    assert question(tokenizer, [user("Rain?")]) == prompt_tokens(records([user("Rain?")]), tokenizer)[1][0]
    gemma = tokenizer_with(trl_template("gemma"))
    with pytest.raises(UserError, match="refused by the chat template: System role not supported"):
        question(gemma, [{"role": "system", "content": "Be brief."}, user("Rain?")])
