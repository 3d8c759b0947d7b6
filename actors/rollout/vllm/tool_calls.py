"""Calls of tools in a turn, found by vLLM's own parsers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from actors.batches.slices import Parsing, Said


def said(tokenizer: Any, token_ids: Sequence[int], parsing: Parsing) -> Said:
    """A drawn turn as content and calls. What the parser can't read is content: the policy is still learning
    how calls are written."""
    ids = list(token_ids)
    if ids and ids[-1] in set(parsing.ends):
        ids = ids[:-1]
    # Special tokens may be how a call begins; vLLM's server keeps them for its parsers too.
    text = tokenizer.decode(ids, skip_special_tokens=False)
    found: Any = None
    with suppress(Exception):  # a parser of somebody's own, on text that nobody wrote with it in mind
        if parsing.parser is not None:
            found = _parser(tokenizer, parsing).extract_tool_calls(text, _request(parsing))
    if found is None or not found.tools_called:
        return Said(tokenizer.decode(ids, skip_special_tokens=True), [])
    calls = [(call.function.name, call.function.arguments) for call in found.tool_calls]
    return Said(found.content or "", calls)


def parser_problem(tokenizer: Any, parsing: Parsing) -> str:
    """Reason for which vLLM's parser of this name can't be used with this tokenizer; empty: it can."""
    from vllm.tool_parsers import ToolParserManager

    known = sorted(ToolParserManager.list_registered())
    if parsing.parser not in known:
        return f"{parsing.parser!r} is none of vLLM's tool parsers: {', '.join(known)}"
    try:
        _parser(tokenizer, parsing).extract_tool_calls("probe", _request(parsing))
    except Exception as error:  # each parser says in its own way what it lacks
        return f"vLLM's {parsing.parser} parser doesn't fit this base: {type(error).__name__}: {error}"
    return ""


def _parser(tokenizer: Any, parsing: Parsing) -> Any:
    """A parser for one turn: parsers keep state."""
    from vllm.tool_parsers import ToolParserManager

    return ToolParserManager.get_tool_parser(parsing.parser)(tokenizer, _request(parsing).tools)


def _request(parsing: Parsing) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    tools = [dict(tool) for tool in parsing.tools] or None
    return ChatCompletionRequest(messages=[{"role": "user", "content": ""}], tools=tools)
