"""One weight sync from the driver: stage everywhere, commit everywhere, prove it everywhere.

Invariants: an engine serves a version only after that was verified on it; nobody commits unless all
staged what the trainer offered; whatever goes wrong, an engine holds one whole version or is replaced.

Where samples stay in flight (`in_flight: keep`), engines may die under a sync while others draw. Then the
pool alone replaces processes: a sync goes on with those that are left, and ends when the pool has brought
back the others, which get the version that the sync has sent.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.batches.batch import Batch
from actors.cluster.futures import POLL_S, GroupFuture, WorkerFuture
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure
from actors.sync import protocol, verify
from actors.sync.engines import Engines, load_base
from actors.sync.protocol import (
    NO_VERSION,
    Expected,
    Failure,
    Offer,
    Prepared,
    SentParts,
    WeightsEvent,
    WeightsState,
)
from actors.sync.report import Stopwatch, SyncReport
from actors.sync.spec import Backend, SyncSpec
from actors.sync.verify import ProbeReport

STAGE_ROUNDS = 3
"""Offers of one version, if engines die while staging and are replaced in between."""


@dataclass(frozen=True)
class Reference:
    """What a version is, by the trainer. Engines that are replaced later are held against it too."""

    offer: Offer
    expected: Expected
    logps: list[np.ndarray]
    """float64, of each probe's tokens."""
    previous: list[np.ndarray] | None
    """The same of the version before."""


@dataclass(frozen=True)
class Loading:
    """A commit that was begun."""

    version: int
    asked: dict[int, WorkerFuture | Failure]
    later: GroupFuture | None
    """What the trainer sends meanwhile."""


class Phases(Engines):
    """What is asked of engines in a sync, and what follows from their answers."""

    def __init__(
        self, policy: WorkerGroup, rollout: WorkerGroup, base_dir: str, backend: Backend, keeps: bool
    ) -> None:
        """`keeps`: samples stay in flight over a sync."""
        super().__init__(policy, rollout, base_dir, backend)
        self._keeps = keeps

    def _stage(self, ranks: list[int], offer: Offer) -> protocol.Decision:
        """Send to these engines; where not all staged, those that did forget it again."""
        asked = {rank: self._ask(rank, "stage", offer.version) for rank in ranks}
        unreached = self.policy.call_rank(0, "weight_source.send", ranks, phase="sync")
        answers = self._answers(asked)
        for rank, reason in unreached.items():
            # Whatever it says itself: without a connection it has to be brought up again.
            answers[rank] = Failure(reason, died=True)
        decision = protocol.decide(offer, answers)
        for rank in ranks:
            if decision.commit:
                self._mark(rank, WeightsEvent.ACKNOWLEDGED)
        self._answers({rank: self._ask(rank, "discard", offer.version) for rank in decision.discard})
        return decision

    def _begin_commit(self, ranks: list[int], offer: Offer) -> Loading:
        """Let engines load what they staged, while the trainer sends them what was not staged."""
        how = (offer.version, True) if self._keeps else (offer.version,)
        asked = {rank: self._ask(rank, "commit", *how) for rank in ranks}
        later = None
        if offer.parts_later:
            # Every rank, as for `prepare`.
            later = self.policy.submit("weight_source.send_later", ranks, phase="sync")
        return Loading(offer.version, asked, later)

    def _end_commit(self, loading: Loading) -> tuple[list[int], SentParts | None]:
        """The engines that did, and what they were sent meanwhile. The others are lost.

        Raises:
            InvariantViolation: not all that was handed over found its place in the engine.
        """
        version = loading.version
        answers = self._answers(loading.asked)
        sent: SentParts | None = None if loading.later is None else loading.later.result()[0]
        for rank, answer in answers.items():
            if isinstance(answer, Failure):
                self._mark(rank, WeightsEvent.FAILED, answer.reason)
                if self._keeps and not answer.died:
                    raise RunFailure(
                        self.rollout.who(rank), "sync", answer.reason, self.rollout.next_of(rank)
                    )
                continue
            self._mark(rank, WeightsEvent.COMMITTED)
            wrong = protocol.mismatch_in_commit(version, answer)
            if wrong is None and sent is not None:
                wrong = protocol.mismatch_in_parts(sent, answer)
            if wrong is not None:
                raise self._lose(rank, version, wrong)
        return [rank for rank in answers if self.engines[rank].state is WeightsState.COMMITTED], sent


class WeightSync(Phases):
    """The policy's weights in all engines of a group, version by version."""

    def __init__(
        self,
        policy: WorkerGroup,
        rollout: WorkerGroup,
        spec: SyncSpec,
        base_dir: str,
        role: str | None,
        probes: Sequence[Sequence[int]],
        backend: Backend = "gloo",
        loading: dict[int, WorkerFuture] | None = None,
    ) -> None:
        """`base_dir`: the bare base, as engines load it; `role`: the adapter that is sent; `probes`: token
        ids, at least two each, of which the last `spec.probe_tokens` are compared; `loading`: of `load_base`,
        where it was called already."""
        super().__init__(policy, rollout, base_dir, backend, keeps=spec.in_flight == "keep")
        self.spec, self.role = spec, role
        self._probes = [list(map(int, probe)) for probe in probes]
        self._starts = [max(1, len(probe) - spec.probe_tokens) for probe in self._probes]
        self._loading = loading
        self.bring_back: Callable[[int], None] | None = None
        """Has a lost engine replaced and restored, and waits for it; set where samples stay in flight."""
        self._one_at_a_time = threading.RLock()
        self._probed: dict[int, ProbeReport] = {}
        self._base: list[np.ndarray] = []
        self._truth: Reference | None = None

    @property
    def version(self) -> int:
        """The version that the engines serve; `NO_VERSION` before the first push."""
        return NO_VERSION if self._truth is None else self._truth.offer.version

    def connect(self) -> None:
        """Bring every engine up with the base, connected to the trainer; one that dies over it is replaced.

        Raises:
            RunFailure: an engine did not load, or did not reach the trainer.
            UserError: it can't load this base.
        """
        for rank, loading in (self._loading or load_base(self.rollout, self.base_dir)).items():
            try:
                loading.result()
                self._open_channel(rank)
            except RunFailure as failure:
                if rank in self.rollout.fleet.serving:
                    raise
                self._mark(rank, WeightsEvent.FAILED, failure.reason)
                self._replace(rank)
        # An engine's first pass over tokens is slow; this one delays no step.
        warming = {rank: self._ask(rank, "score_tokens", self._probes, self._starts) for rank in self.engines}
        self._base = self._trainer_logps(None)()
        self._answers(warming)

    def push(self, version: int) -> SyncReport:
        """Bring all engines to the policy's present weights, under a new version.

        Raises:
            InvariantViolation: the version is not newer, an engine refused what it got, or after loading it
                holds something else than the trainer; with the facts.
            RunFailure: the trainer failed, or engines died again and again.
        """
        with self._one_at_a_time:
            report, lost = self._push(version)
        for rank in lost:
            assert self.bring_back is not None
            self.bring_back(rank)
        return report if report is not None else self._report({}, list(self._probed.values()), {*lost})

    def _push(self, version: int) -> tuple[SyncReport | None, list[int]]:
        """What was done, unless nobody was left to do it with; and who the pool has to bring back."""
        old = protocol.mismatch_in_version(self.version, version)
        if old is not None:
            raise self._violation("trainer", version, old)
        replaced = self._replace_lost()
        # Every rank: a sharded policy's weights are gathered from all; the first one answers.
        prepared: Prepared = self.policy.call(
            "weight_source.prepare",
            version,
            self.role,
            self.spec.payload,
            self._dtype,
            self.spec.packed_buffer_size_bytes,
            phase="sync",
        )[0]
        watch = Stopwatch(dict(prepared.seconds))
        replaced += self._stage_everywhere(prepared.offer)
        watch.part("wire")
        loading = self._begin_commit(self._taking_part(), prepared.offer)
        asked = self._ask_truth(prepared)
        committed, sent = self._end_commit(loading)
        watch.part("load")
        truth = asked(sent)
        self._verify(committed, truth)
        lost = [rank for rank in self.engines if self.engines[rank].version != version]
        if not self._keeps:
            for rank in lost:
                self._replace(rank)
                self._bring_up(rank, truth)
        watch.part("verify")
        self._truth = truth
        probes = [self._probed[rank] for rank, one in self.engines.items() if one.version == version]
        report = self._report(watch.seconds, probes, {*replaced, *lost}) if probes else None
        return report, lost if self._keeps else []

    def restore(self, rank: int) -> None:
        """Bring an engine whose process was replaced and built again to the current version, verified.

        Raises:
            InvariantViolation, RunFailure: as `push`.
        """
        # The trainer may be in the middle of its updates: no deadline runs while it gets to this.
        free = self.policy.submit_rank(0, "weight_source.disconnect", rank, phase="sync")
        while not free.done():
            time.sleep(POLL_S)
        free.result()
        with self._one_at_a_time:
            self._mark(rank, WeightsEvent.FAILED, "its process was replaced")
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
            decision = self._stage(self._taking_part(), offer)
            if decision.commit:
                return replaced
            if decision.refusals:
                raise self._violation("rollout", offer.version, "; ".join(decision.refusals), offer)
            for rank in decision.dead:
                self._mark(rank, WeightsEvent.FAILED, "it died while it staged")
            replaced += self._replace_lost()
        reason = f"engines {replaced} died while they staged version {offer.version}, replaced each time"
        raise RunFailure("rollout", "sync", reason, self.rollout.next_step)

    def _ask_truth(self, prepared: Prepared) -> Callable[[SentParts | None], Reference]:
        """What the trainer says that this version is; what it did not find out while it merged and sent is
        computed while the engines load."""
        asked = None
        if prepared.expected is None and not prepared.offer.parts_later:
            asked = self.policy.submit("weight_source.expected", self.role, self._dtype, phase="sync")
        logps = self._trainer_logps(self.role)
        previous = None if self._truth is None else self._truth.logps

        def truth(sent: SentParts | None) -> Reference:
            known = prepared.expected if sent is None else sent.expected
            expected: Expected = known if asked is None else asked.result()[0]  # type: ignore[assignment]
            return Reference(prepared.offer, expected, logps(), previous)

        return truth

    def _trainer_logps(self, role: str | None) -> Callable[[], list[np.ndarray]]:
        """The trainer's log-probabilities of each probe's tokens; asked for at once."""
        batch = _probe_batch(self._probes, self._starts)
        logps = self.policy.submit("scores.token_logprobs", batch, role, phase="sync")
        cuts = np.cumsum(batch.label_counts)[:-1]
        return lambda: np.split(logps.result()[0], cuts)

    def _verify(self, ranks: list[int], truth: Reference) -> None:
        """Hold engines against the truth; one that died over it is lost, the others serve it.

        Raises:
            InvariantViolation: an engine holds something else.
        """
        version = truth.offer.version
        reading = {rank: self._ask(rank, "readback", version) for rank in ranks}
        scoring = {rank: self._ask(rank, "score_tokens", self._probes, self._starts) for rank in ranks}
        read, scored = self._answers(reading), self._answers(scoring)
        for rank in ranks:
            failure = next((a for a in (read[rank], scored[rank]) if isinstance(a, Failure)), None)
            if failure is None:
                self._probed[rank] = self._judge(rank, truth, read[rank], scored[rank])
                self._mark(rank, WeightsEvent.VERIFIED, version=version)
            elif failure.died:
                self._mark(rank, WeightsEvent.FAILED, failure.reason)
            else:
                raise self._lose(rank, version, failure.reason)

    def _judge(
        self, rank: int, truth: Reference, read: protocol.Readback, scored: list[np.ndarray]
    ) -> ProbeReport:
        wrong = verify.mismatch_in_readback(truth.expected.digests, read, truth.offer.version)
        if wrong is not None:
            raise self._lose(rank, truth.offer.version, wrong, truth.offer)
        report = verify.compare_probes(scored, truth.logps, truth.previous, self._base)
        unchanged = truth.expected.share_unchanged_bf16 or 0.0
        wrong = verify.mismatch_in_probes(report, self._dtype, self.spec.tolerance, unchanged)
        if wrong is not None:
            raise self._lose(rank, truth.offer.version, wrong, truth.offer)
        return report

    # --- Engines that come and go ---------------------------------------------------------------

    def _taking_part(self) -> list[int]:
        """All engines; where the pool replaces lost ones, those that are whole."""
        return [
            rank
            for rank, one in self.engines.items()
            if one.state is not WeightsState.LOST or not self._keeps
        ]

    def _replace_lost(self) -> list[int]:
        """Fresh engines in place of those that are lost, also where another call has seen them die."""
        lost = [rank for rank, one in self.engines.items() if not one.whole or self._is_gone(rank)]
        for rank in lost:
            if self._keeps:
                self._mark(rank, WeightsEvent.FAILED, "its process was lost")
            else:
                self._replace(rank)
        return lost

    def _bring_up(self, rank: int, truth: Reference) -> None:
        """One fresh engine to a version that was sent before, verified."""
        offer = truth.offer
        decision = self._stage([rank], offer)
        if decision.refusals:
            raise self._violation(self.rollout.who(rank), offer.version, "; ".join(decision.refusals), offer)
        if decision.commit:
            self._verify(self._end_commit(self._begin_commit([rank], offer))[0], truth)
        if self.engines[rank].version != offer.version:
            again = self.engines[rank].reason or "its process died while it staged"
            reason = f"it was replaced, and lost again on its way to version {offer.version}: {again}"
            raise RunFailure(self.rollout.who(rank), "sync", reason, self.rollout.next_of(rank))

    def _report(self, seconds: dict[str, float], probes: list[ProbeReport], replaced: set[int]) -> SyncReport:
        assert self._truth is not None
        offer = self._truth.offer
        return SyncReport(
            version=offer.version,
            payload=self.spec.payload,
            bytes=offer.bytes + offer.bytes_later,
            tensors=offer.tensors + offer.tensors_later,
            digest=offer.digest,
            seconds=seconds,
            probe=max(probes, key=lambda probe: probe.mean),
            share_unchanged_bf16=self._truth.expected.share_unchanged_bf16,
            replaced=tuple(sorted(replaced)),
        )


def _probe_batch(probes: Sequence[Sequence[int]], starts: Sequence[int]) -> Batch:
    masks = [np.arange(len(probe)) >= start for probe, start in zip(probes, starts)]
    return Batch.from_sequences(probes, masks)
