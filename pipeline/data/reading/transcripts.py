"""Reads conversations written as one text: HH-RLHF's `Human: ... Assistant: ...` and glaive's `USER: ...`."""

from __future__ import annotations

import re

from pipeline.data.reading.bad_rows import EMPTY_ANSWER, EMPTY_PROMPT, NO_ANSWER, WRONG_TYPE, RowProblem
from pipeline.data.reading.message_roles import calls_in
from pipeline.data.reading.messages import Message, assistant, text_of, user

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_GLAIVE_TURN = re.compile(r"(?:^|\n)[ \t]*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_END, _GLAIVE_CALL = "<|endoftext|>", "<functioncall>"


def is_hh_prompt(text: str) -> bool:
    """True for a prompt that is a transcript up to the assistant's turn."""
    return text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:")


def hh_prompt(text: str, where: str) -> list[Message]:
    """Turns of a transcript up to its last mark, which the answer follows."""
    pieces = _HH_TURN.split(text)[1:-2]
    turns: list[Message] = []
    for who, said in zip(pieces[::2], pieces[1::2], strict=True):
        if not (said := said.strip()):
            reason = EMPTY_PROMPT if who == "Human" else EMPTY_ANSWER
            raise RowProblem(reason, f"{where}: the {who}'s turn {len(turns) + 1}")
        turns.append(user(said) if who == "Human" else assistant(said))
    return turns


def hh_answer(text: str, where: str) -> tuple[str, str]:
    """A transcript up to the last `Assistant:`, and the answer after it."""
    marks = list(_HH_TURN.finditer(text))
    if not marks or marks[0].start() != 0 or marks[0][1] != "Human":
        raise RowProblem(
            WRONG_TYPE,
            f"{where} does not begin with '\\n\\nHuman:'; with answers alone, a prompt column is needed",
        )
    if marks[-1][1] != "Assistant":
        raise RowProblem(NO_ANSWER, f"{where} ends with the human's turn")
    answer = text[marks[-1].end() :].strip()
    if not answer:
        raise RowProblem(EMPTY_ANSWER, where)
    return text[: marks[-1].end()], answer


def glaive_turns(text: str, where: str) -> list[Message]:
    """All turns of a glaive transcript; `<functioncall>` becomes `tool_calls`."""
    pieces = _GLAIVE_TURN.split(text.strip())
    if pieces[0].strip() or len(pieces) < 3:
        raise RowProblem(WRONG_TYPE, f"{where} does not begin with 'USER:'")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [_glaive_turn(who, said, f"{where}, turn {n}") for n, (who, said) in enumerate(turns, 1)]


def _glaive_turn(who: str, said: str, where: str) -> Message:
    said = said.strip().removesuffix(_GLAIVE_END).strip()
    if who == "USER":
        return user(text_of(said, where, EMPTY_PROMPT))
    if who == "FUNCTION RESPONSE":
        return {"role": "tool", "content": said}
    before, call, _ = said.partition(_GLAIVE_CALL)
    if call:
        return {**assistant(before.strip()), "tool_calls": calls_in(said[len(before) :], where)}
    return assistant(text_of(said, where, EMPTY_ANSWER))
