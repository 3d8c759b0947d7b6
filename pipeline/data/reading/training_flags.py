"""Flags of single messages that say whether they are trained: `weight` (OpenAI), `train` (axolotl), `loss`
(ms-swift)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.data.reading.bad_rows import NOT_TRAINED, WRONG_TYPE, RowProblem
from pipeline.data.reading.field_values import true_or_false

FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale", "loss_mask")
"""Fields of a message: 1 or true trains it, 0 or false does not."""
_PARTS = ("train_detail", "training_detail")
"""axolotl's lists of the parts of a turn that are trained; these are refused."""
NAMES = frozenset(FLAGS + _PARTS)


class Flag(NamedTuple):
    """One message's flag, unchecked: its value matters only where the message may be trained."""

    message: dict[str, Any]
    where: str
    """The field, for messages: `messages[1].weight`."""
    name: str
    value: Any

    def trains(self) -> bool:
        """True where the message is to be trained. RowProblem for a value that is neither."""
        if self.name in _PARTS:
            raise RowProblem(WRONG_TYPE, f"{self.where}: a part of a turn can't be left out")
        try:
            return true_or_false(self.value, self.where)
        except RowProblem:
            raise RowProblem(
                WRONG_TYPE, f"{self.where} is {self.value!r}, not 0 or 1 (false or true)"
            ) from None


def untrained_turns(
    flags: Sequence[Flag], prompt: list[dict[str, Any]], completion: list[dict[str, Any]]
) -> frozenset[int]:
    """Indices in `[*prompt, *completion]` of the assistant's turns in `completion` that are not trained.

    RowProblem: a turn of somebody else is to be trained, or no answer is left that is.
    """
    if not flags:
        return frozenset()
    places = {id(message): index for index, message in enumerate(completion, len(prompt))}
    found = set()
    for flag in flags:
        place = places.get(id(flag.message))
        if place is None:
            continue
        trains = flag.trains()
        if flag.message["role"] == "assistant":
            if not trains:
                found.add(place)
        elif trains:
            raise RowProblem(
                WRONG_TYPE, f"{flag.where} is {flag.value!r}, but only the assistant's turns are trained"
            )
    if all(i in found for i, m in enumerate(completion, len(prompt)) if m["role"] == "assistant"):
        raise RowProblem(NOT_TRAINED, f"{flags[-1].name} leaves every answer out")
    return frozenset(found)


def check_whole(flags: Sequence[Flag], answers: Sequence[list[dict[str, Any]]]) -> None:
    """Refuse answers of pairs and labels that are not to be trained: there the whole answer counts."""
    if not flags:
        return
    among = {id(message) for answer in answers for message in answer}
    for flag in flags:
        if id(flag.message) in among and flag.message["role"] == "assistant" and not flag.trains():
            raise RowProblem(
                NOT_TRAINED, f"{flag.where} is {flag.value!r}, and an answer that is compared counts whole"
            )
