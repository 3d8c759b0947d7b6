"""Renders conversations by a tokenizer's chat template, with the spans of the assistant's turns.

Spans come from the template's own `{% generation %}` marks. A template without them is masked by
prefixes: a turn is what its rendering adds to the rendering of the messages before it with the
generation prompt. That holds only while earlier text stays as it was when a message is added, which is
checked for every turn of every row. Templates that break it (Qwen3 drops the reasoning of earlier
turns) are replaced by TRL's training template of the same model, where there is one, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from actors.errors import UserError
from actors.models.turn_ends import PROBE, after_probe, bounded, training_template
from pipeline.data.reading.bad_rows import TEMPLATE_REFUSED, RowProblem
from pipeline.data.reading.messages import Message
from pipeline.data.tokens.template_date import strftime_of
from pipeline.data.tokens.tool_calls import CallForm, find_form

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of templates, where a tokenizer has several (transformers' own)."""

Span = tuple[int, int]
"""First and end character (exclusive) of an assistant's turn, its end-of-turn token included."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

WHAT_TO_DO = (
    "put {% generation %} and {% endgeneration %} around the assistant's turn, end-of-turn token included, "
    "in the base's chat_template.jinja; or give the rows as prompt + completion"
)


class Unmaskable(Exception):
    """Raised with the `ChatFormat` whose template doesn't show where the assistant's turns begin and end."""


class ChatFormat:
    """One tokenizer's chat template: renders conversations and finds the assistant's turns."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template if template is not None else named_template(tokenizer, tools=False)
        self._variables = tokenizer.special_tokens_map | {"strftime_now": strftime_of(tokenizer)}
        self.marked = bool(_MARKS.search(self._template))
        self.end_of_turn = self._find_end_of_turn()
        """Text that the template writes after an answer, up to its last visible character."""

    @cached_property
    def calls(self) -> CallForm:
        """The form in which the template takes tool calls."""
        return find_form(lambda messages: self._render(messages, {}, False, spans=False, fit=False)[0])

    @property
    def template(self) -> str:
        """Its source, in Jinja."""
        return self._template

    @property
    def masking(self) -> str:
        """Method by which answers are found: `template marks` or `prefixes`."""
        return "template marks" if self.marked else "prefixes"

    def render(
        self, messages: Sequence[Message], kwargs: dict[str, Any], *, for_generation: bool = False
    ) -> str:
        """The conversation as text; with `for_generation`, followed by the head of the next answer."""
        return self._render(messages, kwargs, for_generation, spans=False)[0]

    def render_with_answers(
        self, messages: Sequence[Message], turns: Sequence[int], kwargs: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of the assistant's turns `turns`, in their order."""
        return (
            self._by_marks(messages, turns, kwargs)
            if self.marked
            else self._by_prefixes(messages, turns, kwargs)
        )

    def _render(
        self,
        messages: Sequence[Message],
        kwargs: dict[str, Any],
        for_generation: bool,
        spans: bool,
        fit: bool = True,
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = self.calls.fitted(messages) if fit else messages
        try:
            with bounded(self._tokenizer):
                texts, found = render_jinja_template(
                    conversations=[list(messages)],
                    chat_template=self._template,
                    return_assistant_tokens_mask=spans,
                    add_generation_prompt=for_generation,
                    **{**self._variables, **kwargs},
                )
        except UserError:
            raise
        except Exception as error:  # a template may raise anything: its code belongs to the base
            raise RowProblem(TEMPLATE_REFUSED, _first_line(error)) from error
        return texts[0], [tuple(span) for span in found[0]] if spans else []

    def _by_marks(
        self, messages: Sequence[Message], turns: Sequence[int], kwargs: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        text, spans = self._render(messages, kwargs, False, spans=True)
        speaks = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if list(turns) != speaks:
            if len(spans) == len(speaks):
                spans = [span for span, turn in zip(spans, speaks, strict=True) if turn in turns]
            else:  # A template may mark several pieces of one turn.
                places = [self._place(messages, turn, text, kwargs) for turn in turns]
                spans = [span for span in spans if any(a <= span[0] < b for a, b in places)]
        return text, [self._with_end(text, span) for span in spans if span[1] > span[0]]

    def _place(self, messages: Sequence[Message], turn: int, text: str, kwargs: dict[str, Any]) -> Span:
        """Span of a turn in the text of the whole conversation."""
        before = self.render(messages[:turn], kwargs).rstrip() if turn else ""
        whole = text if turn == len(messages) - 1 else self.render(messages[: turn + 1], kwargs).rstrip()
        if not (text.startswith(before) and text.startswith(whole)):
            raise Unmaskable(self)
        return len(before), len(whole)

    def _with_end(self, text: str, span: Span) -> Span:
        """The span stretched over an end-of-turn token that the template writes after its mark."""
        end = self._unmarked_end
        return (span[0], span[1] + len(end)) if end and text.startswith(end, span[1]) else span

    def _by_prefixes(
        self, messages: Sequence[Message], turns: Sequence[int], kwargs: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        text = self.render(messages, kwargs)
        spans = []
        for turn in turns:
            if turn == 0:
                raise RowProblem(TEMPLATE_REFUSED, "the conversation begins with the assistant's turn")
            head = self.render(messages[:turn], kwargs, for_generation=True)
            whole = text if turn == len(messages) - 1 else self.render(messages[: turn + 1], kwargs)
            if not (text.startswith(whole) and whole.startswith(head)):
                raise Unmaskable(self)
            spans.append((len(head), len(whole)))
        return text, spans

    def _find_end_of_turn(self) -> str | None:
        """End of turn, from a probe conversation; None where the template doesn't take one."""
        self._unmarked_end = ""
        try:
            text, spans = self._render(PROBE, {}, False, spans=self.marked)
        except RowProblem:
            return None
        end = after_probe(text)
        if end is None:
            raise UserError(
                "the base's chat template leaves out an answer that is a plain string (does it expect "
                "parts of text and images?): correct chat_template.jinja"
            )
        if self.marked and spans:
            self._unmarked_end = text[spans[-1][1] :].rstrip()
        return end


def named_template(tokenizer: Any, *, tools: bool) -> str:
    """The tokenizer's template; of several with names, the one for rows with or without tools.

    UserError when there is none of that name.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return str(templates)
    wanted = TOOL_USE if tools and TOOL_USE in templates else DEFAULT
    if wanted not in templates:
        raise UserError(
            f"the base's tokenizer has chat templates named {', '.join(sorted(templates))}, and rows "
            f"{'with tools take `tool_use` or' if tools else 'without tools take'} `default`, which is "
            "missing: give one of them that name, or put the one to use in chat_template.jinja"
        )
    return str(templates[wanted])


def chat_format(tokenizer: Any, template: str | None = None) -> ChatFormat:
    """The tokenizer's chat template, or `template`, one of several that it has or one in its place.

    UserError when there is none, or when it ends an answer with nothing: a model never learns to stop.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the rows need a chat template, and the base has none: use the instruct version of the base, or "
            "put a chat_template.jinja beside its tokenizer; rows of plain strings (prompt + completion, "
            "text) need none"
        )
    chat = ChatFormat(tokenizer, template)
    if chat.end_of_turn == "" and (other := training_template(tokenizer, chat.template)) is not None:
        # GLM-4.5 ends an answer with the head of the next turn, which only TRL's template writes at the end.
        chat = ChatFormat(tokenizer, other)
    if chat.end_of_turn == "":
        raise UserError(
            "the base's chat template writes no end-of-turn token after an answer: a model trained on it "
            "never stops. Add the end-of-text token to the assistant's turn in chat_template.jinja"
        )
    return chat


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
