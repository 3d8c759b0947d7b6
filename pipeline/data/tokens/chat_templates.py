"""Chooses the chat template of a row among a tokenizer's, or TRL's training template in place of one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from actors.models.turn_ends import training_template
from pipeline.data.tokens.chat_format import ChatFormat, chat_format, named_template
from pipeline.data.tokens.completeness import Completeness
from pipeline.data.tokens.control_tokens import ControlTokens


class RowFormat:
    """A chat template with what is checked of the rows that go through it."""

    def __init__(self, chat: ChatFormat, tokenizer: Any, replaced: bool) -> None:
        self.chat = chat
        self.control = ControlTokens(chat, tokenizer)
        self.complete = Completeness(chat)
        self._replaced = replaced

    @cached_property
    def masking(self) -> str:
        """Method by which the assistant's turns are found, for the user."""
        return self.chat.masking + (" of TRL's training template" if self._replaced else "")


class Templates:
    """The chat templates of one tokenizer, each read once."""

    def __init__(self, tokenizer: Any, replaced: dict[str, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._replaced = replaced or {}
        self._formats: dict[str, RowFormat] = {}

    def of(self, kwargs: dict[str, Any]) -> RowFormat:
        """The template for a row with these variables: of several, rows with tools take `tool_use`.

        UserError when there is none for it.
        """
        if not self._tokenizer.chat_template:
            chat_format(self._tokenizer)  # says what can be done
        name = named_template(self._tokenizer, tools=bool(kwargs.get("tools")))
        if name not in self._formats:
            other = self._replaced.get(name)
            chat = chat_format(self._tokenizer, other or name)
            self._formats[name] = RowFormat(chat, self._tokenizer, other is not None)
        return self._formats[name]

    def with_training(self, formats: Iterable[ChatFormat]) -> Templates | None:
        """These templates, with TRL's training template in the place of each of `formats`.

        None where TRL has none for one of them, or it was taken already.
        """
        replaced = dict(self._replaced)
        for chat in formats:
            own = next(name for name, found in self._formats.items() if found.chat is chat)
            other = None if own in replaced else training_template(self._tokenizer, own)
            if other is None:
                return None
            replaced[own] = other
        return Templates(self._tokenizer, replaced)
