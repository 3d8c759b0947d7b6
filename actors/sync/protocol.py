"""The protocol of a weight sync as pure decisions: no Ray, no clock, no tensors.

    fresh ----acknowledged----> staged --committed--> committed --verified--> serving --acknowledged--> ...
    (base)                        |discarded            |mismatched
                                  v                     v
                            what it was before         lost --restarted--> fresh

Versions are integers and only grow. An engine serves a version once that was verified on it. Staging that
fails anywhere is discarded everywhere, and every engine goes on with what it had; a failure while
committing loses that engine, because its weights are then half of two versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

NO_VERSION = -1
"""What an engine holds before the first sync: the base."""


@dataclass(frozen=True)
class Offer:
    """What the trainer packed for a version: what every engine has to acknowledge."""

    version: int
    bytes: int
    tensors: int
    digest: str
    """Of every byte."""
    manifest_digest: str
    """Of names, shapes and dtypes, those of later parts included."""
    parts_later: int = 0
    """Parts that are not staged: each is sent, loaded and forgotten inside the commit."""
    bytes_later: int = 0
    tensors_later: int = 0


@dataclass(frozen=True)
class StageAck(Offer):
    """What an engine received, by its own count."""


@dataclass(frozen=True)
class CommitReport:
    """What an engine loaded."""

    version: int
    bound: int
    """Checkpoint tensors that found their place in the engine."""
    expected: int
    """Checkpoint tensors that were handed to it."""
    seconds: dict[str, float]
    """By part: `merge`, `load`, ..."""
    part_digests: tuple[str, ...] = ()
    """Of every byte of each part that arrived inside the commit."""


@dataclass(frozen=True)
class Readback:
    """What an engine holds after a commit, read out of the parameters that it computes with."""

    version: int
    digests: dict[str, str]
    """Checkpoint name -> `payload.digest_of` of the bound values, cut back to that tensor."""
    unread: tuple[str, ...] = ()
    """Names that were handed over and can't be read back."""


@dataclass(frozen=True)
class Expected:
    """What an engine has to hold once a version is loaded."""

    digests: dict[str, str]
    """Checkpoint name -> `payload.digest_of` the merged tensor in the engine's dtype."""
    share_unchanged_bf16: float | None
    """Share of the adapted weights that rounding to bfloat16 would give the base's own value; None where all
    weights are trained."""


@dataclass(frozen=True)
class Prepared:
    """A version that is ready to be sent."""

    offer: Offer
    seconds: dict[str, float]
    """`gather` and `pack`."""
    expected: Expected | None = None
    """Where it was found on the way: of merged weights that are staged whole."""


@dataclass(frozen=True)
class SentParts:
    """What was sent inside a commit."""

    part_digests: tuple[str, ...]
    """Of every byte of each part."""
    unreached: dict[int, str]
    """Engines that did not take all of it, and why."""
    expected: Expected | None
    """Of the whole version; None when it is sent again."""


@dataclass(frozen=True)
class Failure:
    """An engine that did not do what was asked."""

    reason: str
    died: bool
    """Its process is gone or does not answer; else it refused, and can be asked again."""


class WeightsState(StrEnum):
    """What is known about the weights of one engine."""

    FRESH = "fresh"
    """Holds the base; serves nobody."""
    SERVING = "serving"
    """Holds a verified version."""
    STAGED = "staged"
    """Has the next version in a buffer beside the weights that it holds."""
    COMMITTED = "committed"
    """Loaded the next version; nothing is proved yet."""
    LOST = "lost"
    """Has to be replaced."""


class WeightsEvent(StrEnum):
    """What was observed about one engine."""

    ACKNOWLEDGED = "acknowledged"
    DISCARDED = "discarded"
    COMMITTED = "committed"
    VERIFIED = "verified"
    FAILED = "failed"
    """Failed to commit, was not what it should be after it, or died."""
    RESTARTED = "restarted"


_NEXT: dict[tuple[WeightsState, WeightsEvent], WeightsState] = {
    (WeightsState.FRESH, WeightsEvent.ACKNOWLEDGED): WeightsState.STAGED,
    (WeightsState.SERVING, WeightsEvent.ACKNOWLEDGED): WeightsState.STAGED,
    (WeightsState.STAGED, WeightsEvent.COMMITTED): WeightsState.COMMITTED,
    (WeightsState.COMMITTED, WeightsEvent.VERIFIED): WeightsState.SERVING,
}
"""Every way forward. Besides, any engine can fail, and only a lost one is restarted."""


@dataclass(frozen=True)
class Engine:
    """The weights of one engine."""

    state: WeightsState = WeightsState.FRESH
    version: int = NO_VERSION
    """The version that it serves, or would go on serving."""
    generation: int = 0
    """Restarts so far; channels are numbered by it."""
    reason: str = ""
    """Why it is lost."""

    @property
    def whole(self) -> bool:
        """It holds one version, or the base, and nothing is going on."""
        return self.state in (WeightsState.FRESH, WeightsState.SERVING)

    def after(self, event: WeightsEvent, version: int = NO_VERSION, reason: str = "") -> Engine:
        """The engine once `event` was seen.

        Raises:
            ValueError: the event can't happen in this state.
        """
        if event is WeightsEvent.FAILED:
            return replace(self, state=WeightsState.LOST, version=NO_VERSION, reason=reason)
        if event is WeightsEvent.RESTARTED and self.state is WeightsState.LOST:
            return Engine(generation=self.generation + 1)
        if event is WeightsEvent.DISCARDED and self.state is not WeightsState.COMMITTED:
            return replace(self, state=self._before_staging())
        state = _NEXT.get((self.state, event))
        if state is None:
            raise ValueError(f"a {self.state} engine can't be {event}")
        return replace(self, state=state, version=version if event is WeightsEvent.VERIFIED else self.version)

    def _before_staging(self) -> WeightsState:
        if self.state is not WeightsState.STAGED:
            return self.state
        return WeightsState.FRESH if self.version == NO_VERSION else WeightsState.SERVING


@dataclass(frozen=True)
class Decision:
    """What follows from the answers to a stage."""

    commit: bool
    """Every engine staged exactly what was offered: all commit. Else nobody does."""
    discard: tuple[int, ...]
    """Engines that staged and have to forget it."""
    dead: tuple[int, ...]
    """Engines that have to be replaced before the version is offered again."""
    refusals: tuple[str, ...]
    """Why engines refused: not to be cured by offering it again."""


def decide(offer: Offer, answers: Mapping[int, StageAck | Failure]) -> Decision:
    """All commit or nobody does."""
    wrong = {rank: _objection(offer, answer) for rank, answer in answers.items()}
    dead = tuple(rank for rank, answer in answers.items() if isinstance(answer, Failure) and answer.died)
    refusals = tuple(f"engine {rank}: {why}" for rank, why in wrong.items() if why and rank not in dead)
    staged = tuple(rank for rank, answer in answers.items() if isinstance(answer, StageAck))
    commit = not any(wrong.values())
    return Decision(commit, () if commit else staged, dead, refusals)


def _objection(offer: Offer, answer: StageAck | Failure) -> str | None:
    """What is wrong with an answer, or None."""
    if isinstance(answer, Failure):
        return answer.reason
    for what in ("version", "tensors", "manifest_digest", "bytes", "digest"):
        sent, arrived = getattr(offer, what), getattr(answer, what)
        if sent != arrived:
            return f"acknowledged {what} {arrived}, the trainer offered {sent}"
    return None


def mismatch_in_commit(version: int, report: CommitReport) -> str | None:
    """What is wrong with a commit, or None: every tensor that was handed over has to be bound."""
    if report.version != version:
        return f"committed version {report.version}, not {version}"
    if report.bound != report.expected or not report.bound:
        return f"bound {report.bound} of {report.expected} tensors"
    return None


def mismatch_in_parts(sent: SentParts, report: CommitReport) -> str | None:
    """What is wrong with what arrived inside a commit, or None."""
    if len(report.part_digests) != len(sent.part_digests):
        return f"loaded {len(report.part_digests)} later parts, the trainer sent {len(sent.part_digests)}"
    for i, (mine, theirs) in enumerate(zip(sent.part_digests, report.part_digests), 2):
        if mine != theirs:
            return f"loaded digest {theirs} as part {i}, the trainer sent {mine}"
    return None


def mismatch_in_version(current: int, offered: int) -> str | None:
    """Why a version must not be loaded over another, or None: an old one would undo an update."""
    if offered > current:
        return None
    return f"version {offered} is not newer than version {current}"
