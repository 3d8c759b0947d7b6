"""Takes a row apart: contents, reasoning, tool calls, and the tools themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.data.reading.messages import Message
from pipeline.data.tokens.tool_calls import calls_of, parts_of_call

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields in which data sets hold the assistant's reasoning before its answer."""
_TAGS = re.compile(r"</?think>")

Parts = list[tuple[str, str]]
"""(field, text) of a turn, in the order in which templates write them."""


def parts_of(message: Message, turn: int, *, reasoning: bool = True) -> Parts:
    """All parts of a turn; without `reasoning`, those but its reasoning."""
    thoughts = dict.fromkeys(message[f].strip() for f in REASONING if isinstance(message.get(f), str))
    parts = [("reasoning", thought) for thought in thoughts if thought and reasoning]
    content = message["content"] or ""
    if "think>" in content:
        *inside, content = _TAGS.split(content)
        parts += [("reasoning", part.strip()) for part in inside if reasoning and part.strip()]
    if content.strip():
        parts.append(("content", content.strip()))
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            calls = calls_of(message, turn) if key == "tool_calls" else [message[key]]
            for i, call in enumerate(call for call in calls if isinstance(call, dict)):
                parts += [(f"tool_calls[{i}].{field}", part) for field, part in parts_of_call(call) if part]
    return parts


def parts_of_tools(tools: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(field, text): names of tools and of their parameters, and what describes them."""
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            continue
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        for field in ("name", "description"):
            if isinstance(function.get(field), str) and function[field].strip():
                yield f"tools[{i}].{field}", function[field].strip()
        parameters = function.get("parameters")
        named = parameters.get("properties", {}) if isinstance(parameters, dict) else {}
        for name, about in named.items() if isinstance(named, dict) else ():
            yield f"tools[{i}].parameters", name
            described = about.get("description") if isinstance(about, dict) else None
            if isinstance(described, str) and described.strip():
                yield f"tools[{i}].parameters.description", described.strip()


class StandIns:
    """Makes messages of made-up words, each of which occurs once and in no real text."""

    def __init__(self) -> None:
        self._made = 0

    def word(self) -> str:
        self._made += 1
        return f"raylign probe {self._made:04d} word"

    def name(self) -> str:
        return self.word().replace(" ", "_")

    def message(self, message: Message) -> Message:
        """A turn like this one in made-up words: as many calls, reasoning where it has some."""
        made = dict(message)
        made.update(
            {f: self.word() for f in REASONING if isinstance(message.get(f), str) and message[f].strip()}
        )
        content = message["content"] or ""
        if content.strip():
            before, tag, after = content.rpartition("</think>")
            opened = "<think>\n" if "<think>" in before else ""
            thought = f"{opened}{self.word()}\n</think>\n\n" if tag else ""
            made["content"] = thought + (self.word() if after.strip() else "")
        if isinstance(message.get("tool_calls"), list):
            made["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return made

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        arguments: Any = (
            {self.name(): self.word()} if any(f == "arguments" for f, _ in parts_of_call(call)) else {}
        )
        if not isinstance(call.get("function"), dict):
            return {**call, "name": self.name(), "arguments": arguments}
        return {**call, "function": {**call["function"], "name": self.name(), "arguments": arguments}}

    def tool(self) -> dict[str, Any]:
        described = {"type": "string", "description": self.word()}
        parameters = {"type": "object", "properties": {self.name(): described}, "required": []}
        function = {"name": self.name(), "description": self.word(), "parameters": parameters}
        return {"type": "function", "function": function}
