"""An environment made ready: what it is, its tools in the prompts, the chat template's turns, the parser."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.batches import Parsing, SamplingSpec
from actors.errors import UserError
from pipeline.data.reading.records import Records
from pipeline.data.tokens.environment_turns import EnvironmentTurns, environment_turns
from pipeline.data.tokens.prompts import PromptData, read_prompts
from pipeline.environments.processes import kept_environment
from pipeline.environments.spec import TurnSettings

PROBE_TOOL = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object"}}}
"""A tool by which a template is tried."""


@dataclass(frozen=True)
class Conversing:
    """All that conversations of a stage share."""

    spec: TurnSettings
    kind: dict[str, Any]
    """As `objects.described`."""
    turns: dict[bool, EnvironmentTurns]
    """The chat template's turns, of rows with tools (True) and of those without."""
    parsing: Parsing | None
    room: int
    """Tokens of a prompt at most."""

    def turns_of(self, kwargs: dict[str, Any]) -> EnvironmentTurns:
        """Turns of rows with these variables."""
        return self.turns[bool(kwargs.get("tools"))]


def describe(spec: TurnSettings, where: str) -> dict[str, Any]:
    """Facts of a stage's environment and tools, from their process.

    Raises:
        UserError: it can't be used, with the reason.
    """
    known = parser_names() if spec.tool_parser is not None else []
    if known and spec.tool_parser not in known:
        raise UserError(
            f"{where}.tool_parser: {spec.tool_parser!r} is none of vLLM's parsers: {', '.join(known)}"
        )
    found = kept_environment(spec.env, spec.tools, spec.env_timeout_s, spec.agent).described()
    if isinstance(found, str):
        raise UserError(f"{where}.{spec.env_key}: {', '.join(spec.user_code)}: {found}")
    problems = []
    if spec.tool_parser is None and not found["steps"]:
        problems.append(
            f"{where}.tool_parser: the policy calls tools, so name the parser of vLLM that finds the calls "
            f"({', '.join(parser_names()) or 'hermes'})"
        )
    if found["steps"] and spec.tools:
        problems.append(
            f"{where}.tools: {spec.env} has `step`, which answers the calls itself; leave `tools` out, or "
            "make them methods of an environment without `step`"
        )
    if problems:
        raise UserError(problems)
    return found


def conversing_prompts(
    spec: TurnSettings,
    where: str,
    records: Records,
    tokenizer: Any,
    sampling: SamplingSpec,
    *,
    key: str,
    longest: int | None = None,
    known: int | None = None,
) -> tuple[PromptData, Conversing]:
    """The rows of `key` as beginnings of conversations with the environment or tools of the stage `where`.

    Args:
        longest: tokens of a prompt at most, before what the environment says at its reset; None: any number.
        known: rows of the base's embedding.

    Raises:
        UserError: environment, template or rows can't be conversed with, with the reason.
    """
    plain = [row for row in records.rows if row.plain is not None]
    texts = any(records.sources[row.source].spec.format == "text" for row in plain)
    if plain and (texts or not tokenizer.chat_template):
        raise UserError(
            f"{key}: the turns of {where}.{spec.env_key} are written by the base's chat "
            "template, and these prompts are plain text: take `format: chat`, and a base with a template"
        )
    kind = describe(spec, where)
    data = read_prompts(with_tools(records, kind), tokenizer, max_prompt_tokens=longest, vocab_size=known)
    room = max(spec.room or 0, *map(len, data.token_ids))
    talks = conversing(spec, kind, tokenizer, data.template_kwargs, sampling.stop_token_ids, room)
    return data, talks


def with_tools(records: Records, kind: dict[str, Any]) -> Records:
    """Rows whose prompts name the tools as well."""
    if not kind["tools"]:
        return records
    rows = [
        replace(
            row,
            template_kwargs={
                **row.template_kwargs,
                "tools": [*(row.template_kwargs.get("tools") or []), *kind["tools"]],
            },
        )
        for row in records.rows
    ]
    return replace(records, rows=rows)


def conversing(
    spec: TurnSettings,
    kind: dict[str, Any],
    tokenizer: Any,
    kwargs: Iterable[dict[str, Any]],
    ends: Sequence[int],
    room: int,
) -> Conversing:
    """A stage's conversations. `kwargs`: the template's variables of each row; `ends`: what ends a turn.
    An agent names its tools as it goes, so both ways of writing are tried.

    Raises:
        UserError: the chat template's turns are not exact.
    """
    called = spec.tool_parser is not None
    turns = {}
    for one in [*kwargs, *([{"tools": [PROBE_TOOL]}, {}] if spec.agent and called else [])]:
        has_tools = bool(one.get("tools"))
        if has_tools not in turns:
            speaks = "tool" if called and (has_tools or not spec.agent) else "user"
            turns[has_tools] = environment_turns(tokenizer, one, [speaks])
    parsing = None if spec.tool_parser is None else Parsing(spec.tool_parser, kind["tools"], list(ends))
    return Conversing(spec, kind, turns, parsing, room)


def parser_names() -> list[str]:
    """Names of vLLM's tool parsers, read from its source: to import them takes 8 CPU seconds. Empty where
    they can't be read there; an engine is asked as well, before the first sample."""
    from importlib.util import find_spec

    try:
        spec = find_spec("vllm")
        place = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
        tree = ast.parse((place / "tool_parsers" / "__init__.py").read_text())
    except (OSError, ValueError, SyntaxError):
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            return sorted(key for key in keys if isinstance(key, str))
    return []
