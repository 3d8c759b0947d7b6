"""Calls of tools as vLLM's own parsers find them in drawn tokens."""

from __future__ import annotations

from typing import Any

import pytest

from actors.batches import Parsing, Said
from actors.models.tiny import byte_tokenizer
from actors.rollout.vllm.tool_calls import parser_problem, said

pytestmark = pytest.mark.vllm

END = 258
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}},
}


def drawn(text: str) -> Said:
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
    return said(tokenizer, ids, Parsing("hermes", [TOOL], [END]))


def test_a_call_is_taken_apart_and_anything_else_is_content() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert drawn(f"So: {call}") == Said("So: ", [("add", '{"a": 1}')])
    assert [name for name, _ in drawn(call + call).calls] == ["add", "add"]
    for text in ("42", "<tool_call>{half", "<tool_call>[]</tool_call>"):
        assert drawn(text) == Said(text, [])


def test_a_parser_that_does_not_fit_is_told_with_the_reason() -> None:
    tokenizer = byte_tokenizer()
    assert parser_problem(tokenizer, Parsing("hermes", [TOOL], [END])) == ""
    assert "none of vLLM's tool parsers: " in parser_problem(tokenizer, Parsing("hermez", [], [END]))
    assert "doesn't fit this base" in parser_problem(tokenizer, Parsing("openai", [TOOL], [END]))
