"""Converters of the layouts: from a row to its messages, one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pipeline.data.reading.bad_rows import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    NO_ANSWER,
    OTHER_PROMPT,
    PROMPTS_DIFFER,
    WRONG_TYPE,
    RowProblem,
)
from pipeline.data.reading.field_values import check_encodable
from pipeline.data.reading.message_roles import calls_in
from pipeline.data.reading.messages import Message, assistant, is_json_messages, text_of, user
from pipeline.data.reading.row_view import RowView, check_text_or_messages
from pipeline.data.reading.transcripts import glaive_turns, hh_answer, hh_prompt, is_hh_prompt


class Converted(NamedTuple):
    """A row in canonical form.

    `answers` holds one message list for SFT, (chosen, rejected) for preferences, none for prompts.
    `plain` is (prompt, *answers) as strings where the row came as strings, else None. `untrained` holds
    indices in `[*prompt, *answers[0]]`: answers that the row itself leaves out of the loss.
    """

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    plain: tuple[str, ...] | None
    untrained: frozenset[int] = frozenset()


def _plain_text(row: RowView) -> Converted:
    text = row.text("text", EMPTY_ANSWER)
    return Converted([], ([assistant(text)],), ("", text))


def _conversation(column: str) -> Callable[[RowView], Converted]:
    def converter(row: RowView) -> Converted:
        messages = row.messages(column)
        return Converted([], (messages,), None)

    return converter


def _prompt_completion(row: RowView) -> Converted:
    prompt, text = prompt_of(row, "prompt")
    completion = row.answer("completion")
    if completion[0]["role"] in ("user", "system") and any(m["role"] == "user" for m in prompt):
        return _whole(prompt, completion, row.name("completion"))
    return Converted(prompt, (completion,), plain_of(text, row, "completion"))


def _whole(prompt: list[Message], conversation: list[Message], where: str) -> Converted:
    """UltraFeedback's form: the prompt, and once more inside the answer."""
    first = next((i for i, m in enumerate(conversation) if m["role"] == "assistant"), len(conversation))
    inside = [m["content"].strip() for m in conversation[:first]]
    if not all(m["content"].strip() in inside for m in prompt):
        raise RowProblem(OTHER_PROMPT, f"{where} begins with a question that is not the prompt's")
    return Converted(conversation[:first], (conversation[first:],), None)


def _question_answer(row: RowView) -> Converted:
    question, answer = row.text("question", EMPTY_PROMPT), row.text("answer", EMPTY_ANSWER)
    return Converted([user(question)], ([assistant(answer)],), (f"{question}\n", answer))


def _problem_solution(row: RowView) -> Converted:
    problem, solution = row.text("problem", EMPTY_PROMPT), row.text("solution", EMPTY_ANSWER)
    return Converted([user(problem)], ([assistant(solution)],), (f"{problem}\n", solution))


def _query_calls(row: RowView) -> Converted:
    """xLAM's form: a question, and the tool calls that answer it."""
    query, where = row.text("query", EMPTY_PROMPT), row.name("answers")
    calls = calls_in(row.need("answers"), where)
    check_encodable(calls, where)
    return Converted([user(query)], ([{**assistant(""), "tool_calls": calls}],), None)


def _transcript(row: RowView) -> Converted:
    return Converted([], (glaive_turns(row.text("chat", EMPTY_PROMPT), row.name("chat")),), None)


def _labelled_messages(row: RowView) -> Converted:
    prompt, answer = last_turn(row)
    return Converted(prompt, (answer,), None)


def _instruction(row: RowView) -> Converted:
    prompt, output = instruction_prompt(row), row.text("output", EMPTY_ANSWER)
    return Converted([user(prompt)], ([assistant(output)],), (f"{prompt}\n", output))


def _prompt_only(column: str) -> Callable[[RowView], Converted]:
    def converter(row: RowView) -> Converted:
        prompt, text = prompt_of(row, column)
        plain = None if text is None else (f"{text}\n" if column == "question" else text,)
        return Converted(prompt, (), plain)

    return converter


def instruction_prompt(row: RowView) -> str:
    """Instruction and input, as Alpaca has them, as one prompt."""
    instruction, extra = row.text("instruction", EMPTY_PROMPT), row.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return instruction
    return f"{instruction}\n\n{text_of(extra, 'input', EMPTY_PROMPT)}"


def prompt_of(row: RowView, column: str) -> tuple[list[Message], str | None]:
    """The prompt in `column` as messages, and as a string where it is one."""
    value = row.need(column)
    if isinstance(value, str) and not is_json_messages(value):
        text = row.text(column, EMPTY_PROMPT)
        if is_hh_prompt(text):
            return hh_prompt(text, row.name(column)), text
        return [user(text)], text
    check_text_or_messages(value, row.name(column))
    messages = row.messages(column)
    if messages[-1]["role"] == "assistant":
        raise RowProblem(WRONG_TYPE, f"{row.name(column)} ends with the assistant's turn")
    return messages, None


def plain_of(prompt: str | None, row: RowView, *answers: str) -> tuple[str, ...] | None:
    """Prompt and the columns `answers` as strings; None where one of them is a list of messages."""
    values = [row.need(a) for a in answers]
    if prompt is None or not all(isinstance(v, str) and not is_json_messages(v) for v in values):
        return None
    return (prompt, *values)


def last_turn(row: RowView) -> tuple[list[Message], list[Message]]:
    """The column `messages`, split before the assistant's last turn."""
    messages = row.messages("messages")
    if messages[-1]["role"] != "assistant":
        raise RowProblem(NO_ANSWER, f"{row.name('messages')} does not end with the assistant's turn")
    if len(messages) == 1:
        raise RowProblem(EMPTY_PROMPT, f"{row.name('messages')} holds the answer only")
    return messages[:-1], messages[-1:]


def _preference(row: RowView) -> Converted:
    prompt, text = prompt_of(row, "prompt")
    chosen, rejected = row.answer("chosen"), row.answer("rejected")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        # UltraFeedback's form: the prompt as a string, and once more inside both answers.
        inside, chosen, rejected = _split_pair(chosen, rejected)
        turns = [m["content"].strip() for m in inside]
        if not all(m["content"].strip() in turns for m in prompt):
            raise RowProblem(PROMPTS_DIFFER, "the prompt column is not the one inside chosen")
        return Converted(inside, (chosen, rejected), None)
    return Converted(prompt, (chosen, rejected), plain_of(text, row, "chosen", "rejected"))


def _question_preference(row: RowView) -> Converted:
    question = row.text("question", EMPTY_PROMPT)
    chosen, rejected = row.answer("chosen"), row.answer("rejected")
    return Converted(
        [user(question)], (chosen, rejected), plain_of(f"{question}\n", row, "chosen", "rejected")
    )


def _instruction_preference(row: RowView) -> Converted:
    prompt = instruction_prompt(row)
    answers = row.answer("chosen_response"), row.answer("rejected_response")
    return Converted(
        [user(prompt)], answers, plain_of(f"{prompt}\n", row, "chosen_response", "rejected_response")
    )


def _rejected_response(row: RowView) -> Converted:
    prompt, chosen = last_turn(row)
    return Converted(prompt, (chosen, row.answer("rejected_response")), None)


def _messages_preference(row: RowView) -> Converted:
    """The conversation up to its answers; sets that give whole conversations too repeat one of them here."""
    messages, chosen, rejected = row.messages("messages"), row.answer("chosen"), row.answer("rejected")
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        prompt = messages[: -len(chosen)] if messages[-len(chosen) :] == chosen else messages
    else:
        prompt, chosen, rejected = _split_pair(chosen, rejected)
        if messages not in (prompt, [*prompt, *chosen]):
            raise RowProblem(PROMPTS_DIFFER, f"{row.name('messages')} is not the one inside chosen")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise RowProblem(WRONG_TYPE, f"{row.name('messages')} ends with another answer than the chosen one")
    return Converted(prompt, (chosen, rejected), None)


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
    (text, chosen), (other_text, rejected) = (
        hh_answer(row.text(column, EMPTY_ANSWER), row.name(column)) for column in ("chosen", "rejected")
    )
    if text != other_text:
        raise RowProblem(PROMPTS_DIFFER)
    prompt = hh_prompt(text, row.name("chosen"))
    answers = ([assistant(chosen)], [assistant(rejected)])
    return Converted(prompt, answers, (text, f" {chosen}", f" {rejected}"))


BY_LAYOUT: dict[str, Callable[[RowView], Converted]] = {
    "text": _plain_text,
    "messages": _conversation("messages"),
    "conversations": _conversation("conversations"),
    "prompt_completion": _prompt_completion,
    "prompt_completion_label": _prompt_completion,
    "messages_label": _labelled_messages,
    "question_answer_label": _question_answer,
    "instruction": _instruction,
    "instruction_label": _instruction,
    "transcript": _transcript,
    "question_answer": _question_answer,
    "problem_solution": _problem_solution,
    "query_calls": _query_calls,
    "prompt": _prompt_only("prompt"),
    "question": _prompt_only("question"),
    "preference": _preference,
    "question_preference": _question_preference,
    "instruction_preference": _instruction_preference,
    "messages_preference": _messages_preference,
    "rejected_response": _rejected_response,
    "preference_conversations": _preference_conversations,
    "preference_transcripts": _preference_transcripts,
}
"""Converter of each layout, by its name in `pipeline.data.reading.layouts`."""
