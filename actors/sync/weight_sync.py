"""One weight sync from the driver: stage everywhere, commit everywhere, prove it everywhere.

Invariants: an engine serves a version only after that was verified on it; nobody commits unless all
staged what the trainer offered; whatever goes wrong, an engine holds one whole version or is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.batch import Batch
from actors.errors import InvariantViolation, RunFailure, UserError
from actors.group import ActorGroup
from actors.pending import Pending, PendingOne
from actors.sync import protocol, verify
from actors.sync.protocol import NO_VERSION, Engine, Event, Expected, Failure, Offer, Prepared, State
from actors.sync.report import Stopwatch, SyncReport
from actors.sync.spec import Backend, SyncSpec
from actors.sync.verify import ProbeReport

STAGE_ROUNDS = 3
"""Offers of one version, if engines die while staging and are replaced in between."""
CHANNEL_SHARE = 0.8
"""Of `limits.sync`: deadline inside a channel, so that who waits in vain for a peer says so itself."""


@dataclass(frozen=True)
class Truth:
    """What a version is, by the trainer. Engines that are replaced later are held against it too."""

    offer: Offer
    expected: Expected
    logps: list[np.ndarray]
    """float64, of each probe's tokens."""
    previous: list[np.ndarray] | None
    """The same of the version before."""


def load_base(rollout: ActorGroup, base_dir: str) -> Pending:
    """Let the engines load the bare base, ready for updates; returns at once."""
    return rollout.submit("load", base_dir, updatable=True, phase="load")


class WeightSync:
    """The policy's weights in all engines of a group, version by version."""

    def __init__(
        self,
        policy: ActorGroup,
        rollout: ActorGroup,
        spec: SyncSpec,
        base_dir: str,
        role: str | None,
        probes: Sequence[Sequence[int]],
        backend: Backend = "gloo",
        loading: Pending | None = None,
    ) -> None:
        """`base_dir`: the bare base, as engines load it; `role`: the adapter that is sent; `probes`: token
        ids, at least two each, of which the last `spec.probe_tokens` are compared; `loading`: of `load_base`,
        where it was called already."""
        self.policy, self.rollout, self.spec = policy, rollout, spec
        self.base_dir, self.role, self.backend = base_dir, role, backend
        self.engines = {rank: Engine() for rank in range(rollout.size)}
        self._probes = [list(map(int, probe)) for probe in probes]
        self._starts = [max(1, len(probe) - spec.probe_tokens) for probe in self._probes]
        self._loading = loading
        self._dtype = ""
        self._base: list[np.ndarray] = []
        self._truth: Truth | None = None

    @property
    def version(self) -> int:
        """The version that the engines serve; `NO_VERSION` before the first push."""
        return NO_VERSION if self._truth is None else self._truth.offer.version

    def connect(self) -> None:
        """Bring every engine up with the base, connected to the trainer.

        Raises:
            RunFailure: an engine did not load, or did not reach the trainer.
        """
        (self._loading or load_base(self.rollout, self.base_dir)).result()
        for rank in self.engines:
            self._open_channel(rank)
        # An engine's first pass over tokens is slow; this one delays no step.
        warming = self.rollout.submit("score_tokens", self._probes, self._starts, phase="sync")
        self._base = self._trainer_logps(None)()
        warming.result()

    def push(self, version: int) -> SyncReport:
        """Bring all engines to the policy's present weights, under a new version.

        Raises:
            InvariantViolation: the version is not newer, an engine refused what it got, or after loading it
                holds something else than the trainer; with the facts.
            RunFailure: the trainer failed, or engines died again and again.
        """
        old = protocol.objection_to_version(self.version, version)
        if old is not None:
            raise self._violation("trainer", version, old)
        replaced = self._replace_lost()
        prepared: Prepared = self.policy.call_rank(
            0, "weight_source.prepare", version, self.role, self.spec.payload, self._dtype, phase="sync"
        )
        watch = Stopwatch(dict(prepared.seconds))
        replaced += self._stage_everywhere(prepared.offer)
        watch.part("wire")
        asked = self._ask_truth(prepared.offer)
        committed = self._commit(list(self.engines), version)
        watch.part("load")
        truth = asked()
        reports = self._verify(committed, truth)
        lost = [rank for rank in self.engines if rank not in reports]
        for rank in lost:
            self._replace(rank)
            reports[rank] = self._bring_up(rank, truth)
        watch.part("verify")
        self._truth = truth
        return self._report(truth, watch.seconds, list(reports.values()), {*replaced, *lost})

    def restore(self, rank: int) -> None:
        """Bring an engine whose process was replaced and built again to the current version, verified.

        Raises:
            InvariantViolation, RunFailure: as `push`.
        """
        self._mark(rank, Event.FAILED, "its process was replaced")
        self._load_again(rank)
        if self._truth is not None:
            self._bring_up(rank, self._truth)

    def close(self) -> None:
        """Drop the connections; a trainer that is gone has none. The engines keep what they serve."""
        # Often on the way out of a failure, which is the one to report.
        with contextlib.suppress(RunFailure):
            self.policy.call_rank(0, "weight_source.close", phase="sync")

    # --- The phases of a sync -------------------------------------------------------------------

    def _stage_everywhere(self, offer: Offer) -> list[int]:
        """All engines stage what is offered, or this raises; engines that were replaced on the way."""
        replaced: list[int] = []
        for _ in range(STAGE_ROUNDS):
            decision = self._stage(list(self.engines), offer)
            if decision.commit:
                return replaced
            if decision.refusals:
                raise self._violation("rollout", offer.version, "; ".join(decision.refusals), offer)
            for rank in decision.dead:
                self._mark(rank, Event.FAILED, "it died while it staged")
            replaced += self._replace_lost()
        reason = f"engines {replaced} died while they staged version {offer.version}, replaced each time"
        raise RunFailure("rollout", "sync", reason, self.rollout.next_step)

    def _stage(self, ranks: list[int], offer: Offer) -> protocol.Decision:
        """Send to these engines; where not all staged, those that did forget it again."""
        asked = {rank: self._submit(rank, "stage", offer.version) for rank in ranks}
        unreached = self.policy.call_rank(0, "weight_source.send", ranks, phase="sync")
        answers = self._answers(asked)
        for rank, reason in unreached.items():
            # Whatever it says itself: without a connection it has to be brought up again.
            answers[rank] = Failure(reason, died=True)
        decision = protocol.decide(offer, answers)
        for rank in ranks:
            if decision.commit:
                self._mark(rank, Event.ACKNOWLEDGED)
        self._answers({rank: self._submit(rank, "discard", offer.version) for rank in decision.discard})
        return decision

    def _commit(self, ranks: list[int], version: int) -> list[int]:
        """Let engines load what they staged; those that did. The others are lost.

        Raises:
            InvariantViolation: not all that was handed over found its place in the engine.
        """
        answers = self._answers({rank: self._submit(rank, "commit", version) for rank in ranks})
        for rank, answer in answers.items():
            if isinstance(answer, Failure):
                self._mark(rank, Event.FAILED, answer.reason)
                continue
            self._mark(rank, Event.COMMITTED)
            wrong = protocol.objection_to_commit(version, answer)
            if wrong is not None:
                raise self._lose(rank, version, wrong)
        return [rank for rank in ranks if self.engines[rank].state is State.COMMITTED]

    def _ask_truth(self, offer: Offer) -> Callable[[], Truth]:
        """What the trainer says that this version is; computed while the engines load it."""
        expected = self.policy.submit_rank(0, "weight_source.expected", self.role, self._dtype, phase="sync")
        logps = self._trainer_logps(self.role)
        previous = None if self._truth is None else self._truth.logps
        return lambda: Truth(offer, expected.result(), logps(), previous)

    def _trainer_logps(self, role: str | None) -> Callable[[], list[np.ndarray]]:
        """The trainer's log-probabilities of each probe's tokens; asked for at once."""
        batch = _probe_batch(self._probes, self._starts)
        logps = self.policy.submit("token_logprobs", batch, role, phase="sync")
        cuts = np.cumsum(batch.label_counts)[:-1]
        return lambda: np.split(logps.result()[0], cuts)

    def _verify(self, ranks: list[int], truth: Truth) -> dict[int, ProbeReport]:
        """Hold engines against the truth; one that died over it is lost, and not in the answer.

        Raises:
            InvariantViolation: an engine holds something else.
        """
        version = truth.offer.version
        reading = {rank: self._submit(rank, "readback", version) for rank in ranks}
        scoring = {rank: self._submit(rank, "score_tokens", self._probes, self._starts) for rank in ranks}
        read, scored = self._answers(reading), self._answers(scoring)
        reports = {}
        for rank in ranks:
            failure = next((a for a in (read[rank], scored[rank]) if isinstance(a, Failure)), None)
            if failure is None:
                reports[rank] = self._judge(rank, truth, read[rank], scored[rank])
                self._mark(rank, Event.VERIFIED, version=version)
            elif failure.died:
                self._mark(rank, Event.FAILED, failure.reason)
            else:
                raise self._lose(rank, version, failure.reason)
        return reports

    def _judge(
        self, rank: int, truth: Truth, read: protocol.Readback, scored: list[np.ndarray]
    ) -> ProbeReport:
        wrong = verify.objection_to_readback(truth.expected.digests, read, truth.offer.version)
        if wrong is not None:
            raise self._lose(rank, truth.offer.version, wrong, truth.offer)
        report = verify.compare_probes(scored, truth.logps, truth.previous, self._base)
        unchanged = truth.expected.share_unchanged_bf16
        wrong = verify.objection_to_probes(report, self._dtype, self.spec.tolerance, unchanged)
        if wrong is not None:
            raise self._lose(rank, truth.offer.version, wrong, truth.offer)
        return report

    # --- Engines that come and go ---------------------------------------------------------------

    def _replace_lost(self) -> list[int]:
        """Fresh engines in place of those that are lost, also where another call has seen them die."""
        serving = self.rollout.fleet.serving
        lost = [rank for rank, one in self.engines.items() if not one.whole or rank not in serving]
        for rank in lost:
            self._replace(rank)
        return lost

    def _replace(self, rank: int) -> None:
        """A fresh engine in place of a lost one, with the base, connected."""
        self._mark(rank, Event.FAILED, self.engines[rank].reason)
        if rank not in self.rollout.fleet.serving:
            self.rollout.restart(rank)
        self.rollout.rebuild(rank)
        self._load_again(rank)

    def _load_again(self, rank: int) -> None:
        self._mark(rank, Event.RESTARTED)
        self.rollout.call_rank(rank, "load", self.base_dir, updatable=True, phase="load")
        self._open_channel(rank)

    def _bring_up(self, rank: int, truth: Truth) -> ProbeReport:
        """One fresh engine to a version that was sent before, verified."""
        offer = truth.offer
        decision = self._stage([rank], offer)
        if decision.refusals:
            raise self._violation(self.rollout.who(rank), offer.version, "; ".join(decision.refusals), offer)
        committed = self._commit([rank], offer.version) if decision.commit else []
        reports = self._verify(committed, truth)
        if rank not in reports:
            again = self.engines[rank].reason or "its process died while it staged"
            reason = f"it was replaced, and lost again on its way to version {offer.version}: {again}"
            raise RunFailure(self.rollout.who(rank), "sync", reason, self.rollout.next_of(rank))
        return reports[rank]

    def _open_channel(self, rank: int) -> None:
        timeout_s = CHANNEL_SHARE * self.rollout.limits.of("sync")
        address = self.policy.call_rank(0, "weight_source.listen", rank, timeout_s, phase="sync")
        joining = self._submit(rank, "open_channel", address, timeout_s, self.backend)
        accepting = self.policy.submit_rank(0, "weight_source.accept", rank, self.backend, phase="sync")
        self._dtype = joining.result()
        accepting.result()

    # --- Calls ----------------------------------------------------------------------------------

    def _submit(self, rank: int, method: str, *args: Any) -> PendingOne:
        return self.rollout.submit_rank(rank, method, *args, phase="sync")

    def _answers(self, asked: Mapping[int, PendingOne]) -> dict[int, Any]:
        """Each engine's answer, or why there is none: one that fails doesn't hide what the others did."""
        answers: dict[int, Any] = {}
        for rank, call in asked.items():
            try:
                answers[rank] = call.result()
            except (RunFailure, UserError) as error:
                reason = error.reason if isinstance(error, RunFailure) else str(error)
                answers[rank] = Failure(reason, died=rank not in self.rollout.fleet.serving)
        return answers

    def _mark(self, rank: int, event: Event, reason: str = "", version: int = NO_VERSION) -> None:
        self.engines[rank] = self.engines[rank].after(event, version, reason)

    def _lose(self, rank: int, version: int, reason: str, offer: Offer | None = None) -> InvariantViolation:
        """An engine that is not what it should be serves nobody any more."""
        self._mark(rank, Event.FAILED, reason)
        return self._violation(self.rollout.who(rank), version, reason, offer)

    def _violation(
        self, who: str, version: int, reason: str, offer: Offer | None = None
    ) -> InvariantViolation:
        digest = f" ({offer.tensors} tensors, {offer.bytes} bytes, digest {offer.digest})" if offer else ""
        return InvariantViolation(
            who,
            "sync",
            f"version {version}{digest}: {reason}",
            "generations of these weights can't be trusted: keep the logs, and report the architecture",
        )

    def _report(
        self, truth: Truth, seconds: dict[str, float], probes: list[ProbeReport], replaced: set[int]
    ) -> SyncReport:
        offer = truth.offer
        return SyncReport(
            version=offer.version,
            payload=self.spec.payload,
            bytes=offer.bytes,
            tensors=offer.tensors,
            digest=offer.digest,
            seconds=seconds,
            probe=max(probes, key=lambda probe: probe.mean),
            share_unchanged_bf16=truth.expected.share_unchanged_bf16,
            replaced=tuple(sorted(replaced)),
        )


def _probe_batch(probes: Sequence[Sequence[int]], starts: Sequence[int]) -> Batch:
    masks = [np.arange(len(probe)) >= start for probe, start in zip(probes, starts)]
    return Batch.from_sequences(probes, masks)
