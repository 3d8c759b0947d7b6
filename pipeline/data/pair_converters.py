"""Converters of layouts with a chosen and a rejected answer: a row in, prompt and both answers out."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.data.reading.bad_rows import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    NO_ANSWER,
    PROMPTS_DIFFER,
    WRONG_TYPE,
    RowProblem,
)
from pipeline.data.reading.converters import Converted, instruction_prompt, last_turn, plain_of, prompt_of
from pipeline.data.reading.messages import Message, assistant, user
from pipeline.data.reading.row_view import RowView
from pipeline.data.reading.transcripts import hh_answer, hh_prompt


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
    "preference": _preference,
    "question_preference": _question_preference,
    "instruction_preference": _instruction_preference,
    "messages_preference": _messages_preference,
    "rejected_response": _rejected_response,
    "preference_conversations": _preference_conversations,
    "preference_transcripts": _preference_transcripts,
}
"""Converter of each layout, by its name in `pipeline.data.reading.layouts`."""
