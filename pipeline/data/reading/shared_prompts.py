"""Finds prompts that training and held-out data share: an evaluation on them measures memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.data.reading.records import Record, Records
from pipeline.data.reading.row_view import Message


class Place(NamedTuple):
    """File and number of a row."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


class Shared(NamedTuple):
    """Number of held-out rows whose prompt is trained too, of how many, and the first of them."""

    rows: int
    of: int
    held_out: Place
    train: Place

    def __str__(self) -> str:
        return f"{self.rows:,} of {self.of:,} rows, such as {self.held_out}, which is {self.train}"


def trained_prompts(train: Records) -> dict[int, Place]:
    """Every prompt of training data, with the first row that has it: in a conversation, what comes before
    each turn of the assistant. System messages and blanks at either end don't count."""
    places: dict[int, Place] = {}
    for record in train.rows:
        for key in _prompts(record):
            places.setdefault(key, Place(record.file, record.row))
    return places


def shared_prompts(train: dict[int, Place], held_out: Records) -> Shared | None:
    """Held-out rows whose last prompt is one of `train`; None without any."""
    found: dict[Place, Place] = {}
    rows = set()
    for record in held_out.rows:
        place = Place(record.file, record.row)
        rows.add(place)
        *_, last = [0, *_prompts(record)]
        if last in train:
            found.setdefault(place, train[last])
    if not found:
        return None
    first = next(iter(found))
    return Shared(len(found), len(rows), first, found[first])


def _prompts(record: Record) -> Iterator[int]:
    """Hashes of a row's prompts, from the shortest."""
    if record.is_text and record.plain is not None:
        yield hash(record.plain[-1].strip())
        return
    key, counted = 0, 0
    for message in record.prompt:
        key, counted = _after(key, message), counted + (message["role"] != "system")
    if counted:
        yield key
    for message in record.answers[0] if record.answers else ():
        if message["role"] == "assistant" and not record.prompt and counted:
            yield key
        key, counted = _after(key, message), counted + (message["role"] != "system")


def _after(key: int, message: Message) -> int:
    if message["role"] == "system":
        return key
    return hash((key, message["role"], message["content"].strip()))
