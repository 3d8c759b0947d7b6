"""Finds a chat template's control tokens, and refuses rows that hold them.

The tokenizer reads `<|im_start|>` in a row's text as the token that begins a turn. So text that a
template has rendered already would get turns a second time, and a message that quotes such a token would end
its turn in the middle: both are bad rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from actors.models.turn_ends import special_tokens
from pipeline.data.reading.bad_rows import CONTROL_TOKEN, RENDERED_ALREADY, RowProblem
from pipeline.data.reading.messages import Message
from pipeline.data.tokens.chat_format import ChatFormat

_MARKER = re.compile(r"<[|\uff5c][^<>\n]{1,60}>|</?[a-z]+_[a-z_]+>|\[/?[A-Z][A-Z_]+\]")
"""Markers of turns that a tokenizer does not know as special tokens: `<|user|>`, `<end_of_turn>`,
`[/INST]`. (U+FF5C is DeepSeek's bar.)"""
_BEGINS = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*(<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|"
    r"<\|(?:user|system|human|start_of_role|START_OF_TURN_TOKEN)\|>|<\uff5cUser\uff5c>|<\|start\|>(?:system|user))"
)
"""Beginnings of rendered conversations, by the usual templates, whichever the base's own is."""
_THOUGHT = ("<think>", "</think>")
"""Tokens of an answer's content, though templates may write them too."""
_LEAST = 3
"""A text of no more characters may be in another by chance."""
_FIRST, _ANSWER, _SECOND = (f"raylign probe {which}" for which in ("question", "answer", "next"))


class ControlTokens:
    """Control tokens of one chat template: what it writes around turns."""

    def __init__(self, chat: ChatFormat, tokenizer: Any) -> None:
        frames = _frames(chat)
        found = {token for token in special_tokens(tokenizer) for frame in frames if token in frame}
        found.update(marker for frame in frames for marker in _MARKER.findall(frame))
        found.update(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
        found = {token for token in found if token.strip()}  # RWKV's EOS is an empty line
        self.tokens = tuple(sorted(found.difference(_THOUGHT)))
        self._head = frames[-1].strip() if frames else ""
        """Text right before an answer; words such as `Assistant:` where there are no such tokens."""

    def found(self, text: str) -> str | None:
        """The first of them that a text holds."""
        return next((token for token in self.tokens if token in text), None)

    def begins_turn(self, text: str) -> bool:
        """True for a text that begins as a rendered conversation does, or holds the text before an answer."""
        return bool(_BEGINS.match(text)) or (len(self._head) > _LEAST and self._head in text)

    def check(self, messages: Sequence[Message], plain: tuple[str, ...] | None) -> None:
        """Raise RowProblem for a row that holds them. `plain`: the row as strings, where it came as
        strings."""
        for turn, message in enumerate(messages, 1):
            texts = [value for value in message.values() if isinstance(value, str)]
            token = next((token for text in texts if (token := self.found(text))), None)
            if token is not None and plain is not None:
                raise RowProblem(RENDERED_ALREADY, f"it holds {token}; {_FORMAT_TEXT}")
            if token is not None:
                said = (
                    f"turn {turn} ({message['role']}) holds {token}, which would be read as the token itself"
                )
                raise RowProblem(CONTROL_TOKEN, said)
        if plain is not None and (begins := _BEGINS.match(plain[0])):
            said = f"the prompt begins with {begins[1]}, as turns of another template do"
            raise RowProblem(RENDERED_ALREADY, f"{said}; {_FORMAT_TEXT}")
        if plain is not None and len(self._head) > _LEAST and plain[0].rstrip().endswith(self._head):
            raise RowProblem(RENDERED_ALREADY, f"the prompt ends with {self._head!r}; {_FORMAT_TEXT}")


_FORMAT_TEXT = "`format: text` on its source takes it as it stands"


def _frames(chat: ChatFormat) -> list[str]:
    """The template's text between contents: after a question, after an answer, before the next answer."""
    turns = [("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)]
    try:
        text = chat.render([{"role": role, "content": said} for role, said in turns], {}, for_generation=True)
    except RowProblem:
        return []
    pieces = re.split("|".join(map(re.escape, (_FIRST, _ANSWER, _SECOND))), text)
    return pieces[1:] if len(pieces) == len(turns) + 1 else []
