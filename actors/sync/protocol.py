"""Protocol of a weight sync as pure decisions: what is offered, what is acknowledged, and what follows.

All commit or nobody does: staging that fails anywhere is discarded everywhere, and every engine goes on with
what it had. The states of one engine are in `engine_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from actors.sync.relay_tree import TOP

NO_VERSION = -1
"""Version of the base, which an engine holds before the first sync."""


@dataclass(frozen=True)
class EngineFacts:
    """Facts of an engine that has loaded the base."""

    dtype: str
    """In which it computes."""
    address: str
    """Of its node, as other nodes reach it."""


@dataclass(frozen=True)
class Offer:
    """Facts of what the trainer packed for a version; every engine has to acknowledge the same."""

    version: int
    bytes: int
    tensors: int
    digest: str
    """Of every byte."""
    manifest_digest: str
    """Of names, shapes and dtypes, those of later parts included."""
    algorithm: str = "xxh3"
    """Of all digests of this version: see `actors.sync.digests`."""
    parts_later: int = 0
    """Parts that are not staged: each is sent, loaded and forgotten inside the commit."""
    bytes_later: int = 0
    tensors_later: int = 0


@dataclass(frozen=True)
class StageAck(Offer):
    """Facts of what an engine received, by its own count."""


@dataclass(frozen=True)
class CommitReport:
    """Result of a commit in one engine."""

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
    """Digests of what an engine holds after a commit, read out of the parameters that it computes with."""

    version: int
    digest: str
    """Of all names and their digests: see `digest_of_all`."""
    algorithm: str = "xxh3"
    digests: Mapping[str, str] = field(default_factory=dict)
    """Checkpoint name -> `digests.digest_of` the bound values, cut back to that tensor. Empty where
    `digest` is the one that was asked for: a list of 18,000 takes 1.6 MB and 21 ms an engine."""

    @staticmethod
    def of(version: int, digests: Mapping[str, str], known: str = "") -> Readback:
        """`known`: digest of what whoever asks expects."""
        digest = digest_of_all(digests)
        return Readback(version, digest, digests={} if digest == known else dict(digests))


@dataclass(frozen=True)
class Expected:
    """Digests of what an engine has to hold once a version is loaded."""

    digests: dict[str, str]
    """Checkpoint name -> `digests.digest_of` the merged tensor in the engine's dtype; of a payload `lora`:
    `payload.factor_name` -> that of A or s B."""
    share_unchanged_bf16: float | None
    """Share of the adapted weights that rounding to bfloat16 would give the base's own value; None where all
    weights are trained, or nothing is merged."""
    algorithm: str = "xxh3"

    @cached_property
    def digest(self) -> str:
        """Of all names and their digests."""
        return digest_of_all(self.digests)


def digest_of_all(digests: Mapping[str, str]) -> str:
    """One digest of names and digests, whatever their order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return blake2b(lines.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A version that is ready to be sent."""

    offer: Offer
    seconds: dict[str, float]
    """`gather` and `pack`."""
    expected: Expected | None = None
    """Found on the way for merged weights that are staged whole, and for LoRA slots; else None."""


@dataclass(frozen=True)
class SentParts:
    """Result of sending the parts that belong inside a commit."""

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
    link: bool = False
    """It lives, and the connection failed over which the version should have come."""


@dataclass(frozen=True)
class Decision:
    """Consequence of the answers to a stage."""

    commit: bool
    """Every engine staged exactly what was offered: all commit. Else nobody does."""
    discard: tuple[int, ...]
    """Engines that staged and have to forget it."""
    dead: tuple[int, ...]
    """Engines that have to be replaced before the version is offered again."""
    refusals: tuple[str, ...]
    """Why engines refused: not to be cured by offering it again."""
    not_passed_on: tuple[tuple[int, int], ...] = ()
    """(engine that should have passed the version on, engine that did not get it); the first one had it. It
    passes on no more, and the other gets the version by another way."""


def decide(
    offer: Offer, answers: Mapping[int, StageAck | Failure], parents: Mapping[int, int] | None = None
) -> Decision:
    """All commit or nobody does. `parents`: who sent to each engine (`relay_tree`); None: the trainer to all.

    An engine that the trainer itself can't reach is as good as dead: it has to be brought up again.
    """
    ways = dict.fromkeys(answers, TOP) if parents is None else parents
    wrong = {rank: _mismatch_in_answer(offer, answer) for rank, answer in answers.items()}
    failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
    astray = {rank: ways[rank] for rank, failure in failures.items() if failure.link and not failure.died}
    dead = [rank for rank, failure in failures.items() if failure.died or astray.get(rank) == TOP]
    refusals = [
        f"engine {rank}: {why}{_by_way_of(ways[rank], wrong)}"
        for rank, why in wrong.items()
        if why and rank not in dead and rank not in astray
    ]
    not_passed = [
        (parent, rank) for rank, parent in astray.items() if parent != TOP and parent not in failures
    ]
    staged = tuple(rank for rank, answer in answers.items() if isinstance(answer, StageAck))
    commit = not any(wrong.values())
    return Decision(commit, () if commit else staged, tuple(dead), tuple(refusals), tuple(not_passed))


def decide_links(failures: Mapping[int, Failure], parents: Mapping[int, int]) -> Decision:
    """Consequence of connections that could not be made: nothing was offered yet, and nobody commits."""
    lost = {rank for rank, failure in failures.items() if failure.died or parents[rank] == TOP}
    not_passed = [
        (parents[rank], rank) for rank in failures if rank not in lost and parents[rank] not in failures
    ]
    return Decision(False, (), tuple(sorted(lost)), (), tuple(not_passed))


def _by_way_of(parent: int, wrong: Mapping[int, str | None]) -> str:
    """Name of an engine that passed on something else than it acknowledged."""
    if parent == TOP or wrong.get(parent):
        return ""
    return f"; it came by way of engine {parent}, which had acknowledged what was offered"


def _mismatch_in_answer(offer: Offer, answer: StageAck | Failure) -> str | None:
    """Reason why an answer is not what was offered, or None."""
    if isinstance(answer, Failure):
        return answer.reason
    for what in ("version", "tensors", "algorithm", "manifest_digest", "bytes", "digest"):
        sent, arrived = getattr(offer, what), getattr(answer, what)
        if sent != arrived:
            return f"acknowledged {what} {arrived}, the trainer offered {sent}"
    return None


def mismatch_in_commit(version: int, report: CommitReport) -> str | None:
    """Reason to distrust a commit, or None: every tensor that was handed over has to be bound."""
    if report.version != version:
        return f"committed version {report.version}, not {version}"
    if report.bound != report.expected or not report.bound:
        return f"bound {report.bound} of {report.expected} tensors"
    return None


def mismatch_in_parts(sent: SentParts, report: CommitReport) -> str | None:
    """Reason to distrust what arrived inside a commit, or None."""
    if len(report.part_digests) != len(sent.part_digests):
        return f"loaded {len(report.part_digests)} later parts, the trainer sent {len(sent.part_digests)}"
    for i, (mine, theirs) in enumerate(zip(sent.part_digests, report.part_digests), 2):
        if mine != theirs:
            return f"loaded digest {theirs} as part {i}, the trainer sent {mine}"
    return None


def mismatch_in_version(current: int, offered: int) -> str | None:
    """Reason not to load a version over another, or None: an old one would undo an update."""
    if offered > current:
        return None
    return f"version {offered} is not newer than version {current}"
