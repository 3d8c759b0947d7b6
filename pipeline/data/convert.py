"""One raw row -> messages: a converter for each layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.data.bad_rows import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    MISSING_COLUMN,
    NO_ANSWER,
    NOT_UTF8,
    PROMPTS_DIFFER,
    SAME_ANSWERS,
    WRONG_TYPE,
    RowProblem,
)
from pipeline.data.layouts import Resolved

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Converted(NamedTuple):
    """A row in canonical form.

    `answers` holds one message list for SFT, (chosen, rejected) for preferences, none for prompts.
    `plain` is (prompt, *answers) as strings where the row came as strings, else None.
    """

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    plain: tuple[str, ...] | None


class RowView:
    """A raw row seen through its layout's columns; access raises RowProblem."""

    def __init__(self, values: dict[str, Any], columns: dict[str, str]) -> None:
        self._values, self._columns = values, columns

    def get(self, canonical: str) -> Any:
        """The value, None where the column or its value is missing."""
        column = self._columns.get(canonical)
        return None if column is None else self._values.get(column)

    def need(self, canonical: str) -> Any:
        """The value of a needed column."""
        value = self.get(canonical)
        if value is None:
            column = self._columns.get(canonical, canonical)
            raise RowProblem(MISSING_COLUMN, f"{column} is null" if column in self._values else column)
        return value

    def text(self, canonical: str, empty: str) -> str:
        """A needed string that is not blank; `empty` is the reason given when it is."""
        return _text(self.need(canonical), self._columns.get(canonical, canonical), empty)

    def messages(self, canonical: str) -> list[Message]:
        """A needed message list, in (role, content) form."""
        return _messages(self.need(canonical), self._columns.get(canonical, canonical))

    def answer(self, canonical: str) -> list[Message]:
        """A needed answer: a string becomes one assistant message."""
        value = self.need(canonical)
        if isinstance(value, str) and not _is_json_messages(value):
            return [_assistant(_text(value, self._columns[canonical], EMPTY_ANSWER))]
        _check_text_or_messages(value, self._columns[canonical])
        return _messages(value, self._columns[canonical])


def convert(values: dict[str, Any], resolved: Resolved) -> Converted:
    """Messages of one row. RowProblem when the row can't be used."""
    row = RowView(values, resolved.columns)
    converted = _CONVERTERS[resolved.layout.name](row)
    converted = _with_system(converted, row.get("system"))
    for answer in converted.answers:
        _check_answer(answer)
    if len(converted.answers) == 2 and _same(*converted.answers):
        raise RowProblem(SAME_ANSWERS)
    return converted


def _check_text_or_messages(value: Any, column: str) -> None:
    if not isinstance(value, str | list | dict):
        raise RowProblem(WRONG_TYPE, f"{column} is {_type(value)}, not a string or a list of messages")


def _text(value: Any, column: str, empty: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(WRONG_TYPE, f"{column} is {_type(value)}, not a string")
    if not value.strip():
        raise RowProblem(empty, column)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowProblem(NOT_UTF8, f"{column} at character {error.start}") from error
    return value


def _type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        int: "a number",
        float: "a number",
        bool: "true/false",
        bytes: "bytes",
    }
    return names.get(type(value), type(value).__name__)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _is_json_messages(value: str) -> bool:
    return value.startswith("[{") and value.rstrip().endswith("}]")


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str) and _is_json_messages(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowProblem(WRONG_TYPE, f"{column} is a string, not a list of messages") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem(WRONG_TYPE, f"{column} is {_type(value)}, not a list of messages")
    if not value:
        raise RowProblem(EMPTY_PROMPT, f"{column} is an empty list")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(WRONG_TYPE, f"{where} is {_type(item)}, not a message")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str):
        raise RowProblem(WRONG_TYPE, f"{where} has no role")
    rest = {
        k: v
        for k, v in item.items()
        if k not in ("role", "from", "content", "value", "weight") and v is not None
    }
    if isinstance(content, list):
        content = _joined_parts(content, where)
    if content is None and rest.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowProblem(WRONG_TYPE, f"{where}.content is {_type(content)}, not a string")
    if content.strip():
        _text(content, f"{where}.content", EMPTY_PROMPT)
    return {"role": _ROLES.get(role, role), "content": content, **rest}


def _joined_parts(parts: list[Any], where: str) -> str:
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        raise RowProblem(WRONG_TYPE, f"{where}.content has parts that are not text")
    return "".join(p["text"] for p in parts)


def _check_answer(answer: list[Message]) -> None:
    turns = [m for m in answer if m["role"] == "assistant"]
    if not turns:
        raise RowProblem(NO_ANSWER)
    if not any(m["content"].strip() or m.get("tool_calls") for m in turns[-1:]):
        raise RowProblem(EMPTY_ANSWER)


def _same(chosen: list[Message], rejected: list[Message]) -> bool:
    def stripped(messages: list[Message]) -> list[Message]:
        return [{**m, "content": m["content"].strip()} for m in messages]

    return stripped(chosen) == stripped(rejected)


def _with_system(converted: Converted, system: Any) -> Converted:
    if system is None or system == "":
        return converted
    text = _text(system, "system", EMPTY_PROMPT)
    message = {"role": "system", "content": text}
    plain = converted.plain and (f"{text}\n\n{converted.plain[0]}", *converted.plain[1:])
    if converted.prompt:
        return Converted([message, *converted.prompt], converted.answers, plain)
    return Converted([], tuple([message, *answer] for answer in converted.answers), plain)


# --- one answer ---------------------------------------------------------------------------------


def _plain_text(row: RowView) -> Converted:
    text = row.text("text", EMPTY_ANSWER)
    return Converted([], ([_assistant(text)],), ("", text))


def _conversation(column: str) -> Callable[[RowView], Converted]:
    def converter(row: RowView) -> Converted:
        messages = row.messages(column)
        return Converted([], (messages,), None)

    return converter


def _prompt_completion(row: RowView) -> Converted:
    prompt, text = _prompt(row, "prompt")
    completion = row.answer("completion")
    return Converted(prompt, (completion,), _plain(text, row, "completion"))


def _question_answer(row: RowView) -> Converted:
    question, answer = row.text("question", EMPTY_PROMPT), row.text("answer", EMPTY_ANSWER)
    return Converted([_user(question)], ([_assistant(answer)],), (f"{question}\n", answer))


def _last_turn(row: RowView) -> Converted:
    """A conversation whose last turn is what the label is of."""
    messages = row.messages("messages")
    if messages[-1]["role"] != "assistant":
        raise RowProblem(NO_ANSWER, "messages does not end with the assistant's turn")
    if len(messages) == 1:
        raise RowProblem(EMPTY_PROMPT, "messages holds the answer only")
    return Converted(messages[:-1], (messages[-1:],), None)


def _instruction(row: RowView) -> Converted:
    prompt, output = _instruction_prompt(row), row.text("output", EMPTY_ANSWER)
    return Converted([_user(prompt)], ([_assistant(output)],), (f"{prompt}\n", output))


def _prompt_only(column: str) -> Callable[[RowView], Converted]:
    def converter(row: RowView) -> Converted:
        prompt, text = _prompt(row, column)
        plain = None if text is None else (f"{text}\n" if column == "question" else text,)
        return Converted(prompt, (), plain)

    return converter


def _instruction_prompt(row: RowView) -> str:
    instruction, extra = row.text("instruction", EMPTY_PROMPT), row.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return instruction
    return f"{instruction}\n\n{_text(extra, 'input', EMPTY_PROMPT)}"


def _prompt(row: RowView, column: str) -> tuple[list[Message], str | None]:
    """Prompt as messages, and as a string where it is one."""
    value = row.need(column)
    if isinstance(value, str) and not _is_json_messages(value):
        text = row.text(column, EMPTY_PROMPT)
        return [_user(text)], text
    _check_text_or_messages(value, column)
    messages = row.messages(column)
    if messages[-1]["role"] == "assistant":
        raise RowProblem(WRONG_TYPE, f"{column} ends with the assistant's turn")
    if not any(m["content"].strip() for m in messages):
        raise RowProblem(EMPTY_PROMPT, column)
    return messages, None


def _plain(prompt: str | None, row: RowView, *answers: str) -> tuple[str, ...] | None:
    values = [row.need(a) for a in answers]
    if prompt is None or not all(isinstance(v, str) and not _is_json_messages(v) for v in values):
        return None
    return (prompt, *values)


# --- preferences --------------------------------------------------------------------------------


def _preference(row: RowView) -> Converted:
    prompt, text = _prompt(row, "prompt")
    chosen, rejected = row.answer("chosen"), row.answer("rejected")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        # UltraFeedback's form: the prompt as a string, and once more inside both answers.
        inside, chosen, rejected = _split_pair(chosen, rejected)
        turns = [m["content"].strip() for m in inside]
        if not all(m["content"].strip() in turns for m in prompt):
            raise RowProblem(PROMPTS_DIFFER, "the prompt column is not the one inside chosen")
        return Converted(inside, (chosen, rejected), None)
    return Converted(prompt, (chosen, rejected), _plain(text, row, "chosen", "rejected"))


def _question_preference(row: RowView) -> Converted:
    question = row.text("question", EMPTY_PROMPT)
    chosen, rejected = row.answer("chosen"), row.answer("rejected")
    return Converted(
        [_user(question)], (chosen, rejected), _plain(f"{question}\n", row, "chosen", "rejected")
    )


def _instruction_preference(row: RowView) -> Converted:
    prompt = _instruction_prompt(row)
    answers = row.answer("chosen_response"), row.answer("rejected_response")
    return Converted(
        [_user(prompt)], answers, _plain(f"{prompt}\n", row, "chosen_response", "rejected_response")
    )


def _rejected_response(row: RowView) -> Converted:
    messages, rejected = row.messages("messages"), row.answer("rejected_response")
    if messages[-1]["role"] != "assistant":
        raise RowProblem(NO_ANSWER, "messages does not end with the assistant's turn")
    if len(messages) == 1:
        raise RowProblem(EMPTY_PROMPT, "messages holds the answer only")
    return Converted(messages[:-1], (messages[-1:], rejected), None)


def _preference_conversations(row: RowView) -> Converted:
    prompt, chosen, rejected = _split_pair(row.messages("chosen"), row.messages("rejected"))
    return Converted(prompt, (chosen, rejected), None)


def _split_pair(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Shared prompt and the two last turns of whole conversations."""
    for messages in (chosen, rejected):
        if messages[-1]["role"] != "assistant":
            raise RowProblem(NO_ANSWER, "a conversation does not end with the assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise RowProblem(PROMPTS_DIFFER)
    if len(chosen) == 1:
        raise RowProblem(EMPTY_PROMPT, "the conversations hold the answer only")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _preference_transcripts(row: RowView) -> Converted:
    (text, chosen), (other_text, rejected) = (_transcript(row, column) for column in ("chosen", "rejected"))
    if text != other_text:
        raise RowProblem(PROMPTS_DIFFER)
    prompt = _turns(text)[:-1]
    answers = ([_assistant(chosen)], [_assistant(rejected)])
    return Converted(prompt, answers, (text, f" {chosen}", f" {rejected}"))


def _transcript(row: RowView, column: str) -> tuple[str, str]:
    """A transcript up to the last `Assistant:`, and the answer after it."""
    text = row.text(column, EMPTY_ANSWER)
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0 or marks[0][1] != "Human":
        raise RowProblem(
            WRONG_TYPE,
            f"{column} does not begin with '\\n\\nHuman:'; with answers alone, a prompt column is needed",
        )
    if marks[-1][1] != "Assistant":
        raise RowProblem(NO_ANSWER, f"{column} ends with the human's turn")
    answer = text[marks[-1].end() :].strip()
    if not answer:
        raise RowProblem(EMPTY_ANSWER, column)
    return text[: marks[-1].end()], answer


def _turns(transcript: str) -> list[Message]:
    pieces = _TURN.split(transcript)[1:]
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": speakers[who], "content": text.strip()}
        for who, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]


_CONVERTERS: dict[str, Callable[[RowView], Converted]] = {
    "text": _plain_text,
    "messages": _conversation("messages"),
    "conversations": _conversation("conversations"),
    "prompt_completion": _prompt_completion,
    "prompt_completion_label": _prompt_completion,
    "messages_label": _last_turn,
    "question_answer_label": _question_answer,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "prompt": _prompt_only("prompt"),
    "question": _prompt_only("question"),
    "preference": _preference,
    "question_preference": _question_preference,
    "instruction_preference": _instruction_preference,
    "rejected_response": _rejected_response,
    "preference_conversations": _preference_conversations,
    "preference_transcripts": _preference_transcripts,
}
