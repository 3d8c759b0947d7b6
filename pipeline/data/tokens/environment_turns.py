"""Tokens of what an environment says between two turns of the policy, by the chat template's difference.

A conversation of several turns is trained in the tokens that the engine drew: they are never decoded and
encoded again. Only the rest is rendered: what the template writes from the end of the assistant's turn on,
once the environment's messages and the head of the next answer follow. It is

    render(conversation + messages, with the head of an answer) - render(conversation)

and exists only where the template leaves all that stands before it as it was. The policy's own turns stand in
these renderings as stand-ins, so that no text that it drew can change, break or imitate the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import UserError
from actors.models.turn_ends import special_tokens, training_template
from pipeline.data.reading.bad_rows import RowProblem
from pipeline.data.reading.messages import Message
from pipeline.data.tokens.chat_format import ChatFormat
from pipeline.data.tokens.chat_templates import RowFormat, Templates

STAND_IN = "Raylign stand-in"
"""Content of the policy's turns in renderings, and the argument of their calls."""
_THOUGHT = "Raylign thought"
_THINK, _THOUGHT_ENDS = "<think>", "</think>"
_SHORT = 60
"""Characters of a rendering that a message shows."""


class NotExact(Exception):
    """Raised where the template's difference doesn't exist; its text is the reason."""


@dataclass(frozen=True)
class Suffix:
    """Text that follows a turn, cut where its end-of-turn token ends."""

    end: str
    """The end-of-turn token."""
    text: str
    """Everything behind it, up to where the next answer begins."""


class EnvironmentTurns:
    """Renders and tokenises what stands between two turns of the policy, for one chat template."""

    def __init__(self, chat: ChatFormat, way: RowFormat, tokenizer: Any) -> None:
        """`way`: checks of the tokenizer's own template, in whose place `chat` may be TRL's training one."""
        self.chat, self._way, self._tokenizer = chat, way, tokenizer
        self._special = special_tokens(tokenizer)

    def tokens(
        self,
        conversation: Sequence[Message],
        first: int,
        said: Sequence[Message],
        kwargs: dict[str, Any],
        last: int,
    ) -> list[int]:
        """Token ids that stand between a turn of the policy and its next one.

        Args:
            conversation: all messages up to the policy's last turn; from index `first` on it answers.
            said: the environment's messages.
            kwargs: variables of the template.
            last: the last token that the engine drew. Where that is not the template's end of turn (a stop
                string, the end-of-text token), the end of turn comes first among the ids.

        Raises:
            NotExact: the difference doesn't exist.
            RowProblem: a message that the template refuses.
        """
        said = [self._apart(message) for message in said]
        suffix = self.suffix(_with_stand_ins(conversation, first), said, kwargs)
        for message in said:
            _check_written(message, suffix.text)
        end, *rest = self._ids(suffix.end + suffix.text)
        return rest if last == end else [end, *rest]

    def beginning(self, conversation: Sequence[Message], kwargs: dict[str, Any]) -> tuple[str, list[int]]:
        """A conversation up to where the first answer begins, as text and token ids. Raises RowProblem where
        the template refuses it."""
        text = self.chat.render(
            [self._apart(message) for message in conversation], kwargs, for_generation=True
        )
        return text, self._ids(text)

    def suffix(
        self, conversation: Sequence[Message], said: Sequence[Message], kwargs: dict[str, Any]
    ) -> Suffix:
        """The template's difference after the last turn of `conversation`, which is a stand-in.

        Raises: as `tokens`.
        """
        asked = self.chat.render(conversation[:-1], kwargs, for_generation=True)
        before = self.chat.render(conversation, kwargs)
        whole = self.chat.render([*conversation, *said], kwargs, for_generation=True)
        start, stop = self._end_of_turn(before)
        kept = before[:stop]
        if not before.startswith(asked):
            raise NotExact(
                f"it changes what stands before an answer once that is there: {_differ(asked, before)}"
            )
        if not whole.startswith(kept):
            raise NotExact(f"it changes earlier turns when a message is added: {_differ(kept, whole)}")
        return Suffix(before[start:stop], whole[stop:])

    def problem(self, roles: Iterable[str]) -> str:
        """Reason for which this template can't be used where an environment speaks in these roles, or an
        empty text: every difference of a probe conversation is tried, in text and in tokens."""
        try:
            for role in roles:
                self._probe(role)
        except NotExact as error:
            return str(error)
        except RowProblem as error:
            return f"it refuses a turn of role {role}: {error.detail}"
        return ""

    # --- Inside -----------------------------------------------------------------------------------

    def _end_of_turn(self, before: str) -> tuple[int, int]:
        """Place of the token that ends the last turn of a rendering."""
        place = before.rfind(STAND_IN)
        if place < 0:
            raise NotExact("it leaves out a turn of the assistant")
        ends = [(before.find(token, place), token) for token in self._special if token]
        ends = [(at, token) for at, token in ends if at >= 0]
        if not ends:
            raise NotExact("it ends a turn with no special token, so that text and turn can't be told apart")
        at, token = min(ends, key=lambda found: (found[0], -len(found[1])))
        return at, at + len(token)

    def _apart(self, message: Message) -> Message:
        """A message whose control tokens are text: what tools say often quotes what they were asked."""
        made = dict(message)
        for key, value in message.items():
            if isinstance(value, str):
                for token in self._way.control.tokens:
                    made[key] = made[key].replace(token, f"{token[0]} {token[1:]}")
        return made

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _probe(self, role: str) -> None:
        question: Message = {"role": "user", "content": "probe question"}
        called = role == "tool"
        seen: set[tuple[Suffix, Suffix]] = set()
        for thinks in (False, True) if _THOUGHT_ENDS in self.chat.template else (False,):
            answer = stand_in(calls=[("probe", "probe0001")] if called else ())
            if thinks:
                answer["content"] = self._thought(question) + (answer["content"] or "")
            said = [said_by(role, "probe result", "probe", "probe0001")]
            first = self._exact([question, answer], said)
            second = self._exact([question, answer, *said, answer], said)
            if thinks and _THOUGHT not in self.chat.render([question, answer, *said, answer], {}):
                raise NotExact("it leaves out the reasoning of a turn, which the engine drew")
            seen.add((first, second))
        if len(seen) > 1:
            raise NotExact("what it writes after a turn depends on that turn's text")

    def _thought(self, question: Message) -> str:
        """A thought as the engine draws it: the template may have written its beginning already."""
        begun = self.chat.render([question], {}, for_generation=True).rstrip().endswith(_THINK)
        return f"{'' if begun else f'{_THINK}{chr(10)}'}{_THOUGHT}\n{_THOUGHT_ENDS}\n\n"

    def _exact(self, conversation: list[Message], said: list[Message]) -> Suffix:
        """A suffix of which text and tokens are the tail of the whole's."""
        found = self.suffix(conversation, said, {})
        whole = self.chat.render([*conversation, *said], {}, for_generation=True)
        head = whole[: len(whole) - len(found.text)]
        _, *rest = self._ids(found.end + found.text)
        if self._ids(whole) != self._ids(head) + rest:
            raise NotExact("its text after a turn has other tokens by itself than behind that turn")
        return found


def stand_in(calls: Sequence[tuple[str, str]] = ()) -> Message:
    """A turn of the policy for renderings; `calls`: name and id of each tool that it calls."""
    if not calls:
        return {"role": "assistant", "content": STAND_IN}
    made = [
        {"id": key, "type": "function", "function": {"name": name, "arguments": {"text": STAND_IN}}}
        for name, key in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def said_by(role: str, content: str, name: str = "", key: str = "") -> Message:
    """A message of an environment; a tool's has its name and the id of the call."""
    more = {"name": name, "tool_call_id": key} if role == "tool" else {}
    return {"role": role, "content": content, **more}


def environment_turns(tokenizer: Any, kwargs: dict[str, Any], roles: Sequence[str]) -> EnvironmentTurns:
    """The turns of the template for rows with these variables, where an environment speaks in `roles`.

    Where the tokenizer's own template can't be used, TRL's training template of the same model is, if that
    writes prompts as the own one does.

    Raises:
        UserError: no template has exact differences, with the reason.
    """
    way = Templates(tokenizer).of(kwargs)
    own = EnvironmentTurns(way.chat, way, tokenizer)
    problem = own.problem(roles)
    if not problem:
        return own
    other = training_template(tokenizer, way.chat.template)
    if other is not None:
        chat = ChatFormat(tokenizer, other)
        found = EnvironmentTurns(chat, way, tokenizer)
        if _same_prompts(way.chat, chat) and not found.problem(roles):
            return found
    raise UserError(
        f"the base's chat template can't take an environment's turns ({' and '.join(roles)}): {problem}; "
        "correct chat_template.jinja, so that it only ever adds to what stands there, or take another base"
    )


def _same_prompts(own: ChatFormat, other: ChatFormat) -> bool:
    conversation: list[Message] = [
        {"role": "system", "content": "probe system"},
        {"role": "user", "content": "probe question"},
    ]
    for messages in (conversation, conversation[1:]):
        try:
            wanted = own.render(messages, {}, for_generation=True)
        except RowProblem:  # Some know no system turn.
            continue
        if other.render(messages, {}, for_generation=True) != wanted:
            return False
    return True


def _with_stand_ins(conversation: Sequence[Message], first: int) -> list[Message]:
    """The conversation with stand-ins for what the policy said from index `first` on."""
    made = list(conversation[:first])
    for message in conversation[first:]:
        if message["role"] == "assistant":
            calls = message.get("tool_calls") or []
            message = stand_in([(call["function"]["name"], call["id"]) for call in calls])
        made.append(message)
    return made


def _check_written(message: Message, text: str) -> None:
    content = (message.get("content") or "").strip()
    if content not in text and json.dumps(content)[1:-1] not in text:
        if json.dumps(content, ensure_ascii=False)[1:-1] in text:
            return
        raise NotExact(f"it leaves out a message of role {message['role']}: {content[:_SHORT]!r}")


def _differ(wanted: str, found: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    return f"{wanted[at : at + _SHORT]!r} becomes {found[at : at + _SHORT]!r}"
