"""Samples that an engine draws in slices of time, between which some come and others go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from actors.batches.generations import Generations, SamplingSpec


@dataclass(frozen=True)
class Asked:
    """Samples that an engine is given, one request each, in the order in which it shall begin them."""

    numbers: Sequence[int]
    """Names of the samples, within their call."""
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    sampling: SamplingSpec
    """`n` is 1."""
    seeds: Sequence[int]
    max_tokens: Sequence[int] | None = None
    """New tokens of each at most; None: of all of them as `sampling` says."""
    hand_back: bool = False
    """A slice of this call ends as soon as a sample has: an environment waits for it."""
    parsing: Parsing | None = None
    """Calls of tools are looked for in what was drawn; None: nobody asks."""
    tools: Sequence[Sequence[Mapping[str, Any]] | None] | None = None
    """As `Request.tools`, of each."""


class Parsing(NamedTuple):
    """Way in which calls of tools are found in a turn."""

    parser: str | None
    """Name of one of vLLM's tool parsers; None: calls are not looked for."""
    tools: Sequence[Mapping[str, Any]]
    """Schemas of the tools, as templates take them."""
    ends: Sequence[int]
    """Tokens that end a turn: no part of its text."""


class Request(NamedTuple):
    """One turn that is to be drawn, for a sample that converses with an environment."""

    prompt: Sequence[int]
    """Token ids of all that stands before it."""
    seed: int
    max_tokens: int
    key: int
    """Requests with one key are expected to be equally long."""
    after: int | None = None
    """Number of the request of the turn before: the engine that drew it has its keys and values."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Schemas of tools of its own, in place of those of `Conversation.parsing`; without any, calls are not
    looked for."""


class Conversation(Protocol):
    """Samples that are drawn in turns, between which somebody else speaks."""

    @property
    def parsing(self) -> Parsing | None:
        """As `Asked.parsing`."""

    def waits(self) -> bool:
        """True while a turn that was drawn, or a sample's beginning, is being answered."""

    def requests(self, seconds: float) -> list[Request]:
        """Turns that can be drawn now. Waits up to so many seconds for one, where none can be."""

    def drew(self, numbers: Sequence[int], made: Generations, said: Sequence[Said] | None) -> None:
        """Turns were drawn: numbers of their requests, counted from 0 in the order in which `requests`
        returned them, and the samples."""


class Said(NamedTuple):
    """A turn as a message's parts."""

    content: str
    calls: list[tuple[str, str]]
    """Name and arguments (JSON text) of each call of a tool."""


@dataclass(frozen=True)
class Work:
    """Decoding steps of an engine, of all that was in it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Result of a slice, for the samples of one call."""

    ended: list[int]
    made: Generations | None
    """The samples that ended, in this order; None for none."""
    so_far: dict[int, int]
    """Tokens of those that have not ended. 0: it waits, or its prompt was computed and no more."""
    returned: list[int]
    """Samples that were asked back, and have not ended: the engine has forgotten them."""
    seconds: float
    """Time since the slice before, or since the engine was given the first of these samples."""
    work: Work
    said: list[Said] | None = None
    """The samples that ended as messages, where calls of tools were looked for."""
