"""Weight sync from the driver: stage everywhere, commit everywhere, verify everywhere; with LoRA slots, which
can be read while another version is served, verify before the commit.

Invariants: an engine serves a version only after that was verified on it; nobody commits unless all staged
what the trainer offered; whatever goes wrong, an engine holds one whole version or is replaced.

Where samples stay in flight (`in_flight: keep`), engines may die under a sync while others generate. Then
they are replaced in the background alone: a sync goes on with those that are left, and ends when the others
are back, which get the version that the sync has sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from actors.cluster.futures import POLL_S, WorkerFuture
from actors.cluster.patient_clock import patient
from actors.cluster.turns import Turns
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, RunFailure
from actors.sync import protocol
from actors.sync.asking import Participants
from actors.sync.engine_set import EngineSet
from actors.sync.engine_state import WeightsEvent, WeightsState
from actors.sync.phases import Phases, violation
from actors.sync.proof import EngineProof
from actors.sync.protocol import NO_VERSION, Prepared, SentParts
from actors.sync.remote import UpdatableEngines
from actors.sync.report import Stopwatch
from actors.sync.report import SyncReport as SyncReport
from actors.sync.rounds import Rounds
from actors.sync.spec import OVER_GLOO, Backends, SlotSpec, SyncSpec
from actors.sync.verify import ProbeReport, Reference

T = TypeVar("T")


def load_base(
    rollout: WorkerGroup, base_dir: str, slots: SlotSpec | None = None
) -> dict[int, WorkerFuture[dict[str, float]]]:
    """Let all engines load the bare base, ready for updates; returns at once. By rank. `slots`: for updates
    by LoRA beside it."""
    engines = UpdatableEngines(rollout)
    return {rank: engines.load(rank, base_dir, updatable=True, slots=slots) for rank in range(rollout.size)}


class WeightSync:
    """The policy's weights in all engines of a group, version by version."""

    def __init__(
        self,
        policy: WorkerGroup,
        engines: EngineSet,
        spec: SyncSpec,
        base_dir: str,
        role: str | None,
        probes: Sequence[Sequence[int]],
        backends: Backends = OVER_GLOO,
        loading: dict[int, WorkerFuture[dict[str, float]]] | None = None,
        turns: Turns | None = None,
        slots: SlotSpec | None = None,
    ) -> None:
        """`base_dir`: the bare base, as engines load it; `role`: the adapter that is sent; `probes`: token
        ids, at least two each, of which the last `spec.probe_tokens` are compared; `loading`: of `load_base`,
        where it was called already; `turns`: where policy and engines share a device; `slots`: of
        engines, for a payload `lora`."""
        self.policy, self.engines, self.rollout = policy, engines, engines.group
        self.spec, self.role, self.base_dir = spec, role, base_dir
        self._keeps = spec.in_flight == "keep"
        self._turns, self._slots = turns or Turns(), slots
        self._phases = Phases(policy, engines, base_dir, backends, spec.fan_out, self._keeps, slots)
        self._rounds = Rounds(self._phases, engines)
        self._source = self._phases.source
        self._loading = loading
        self._proof = EngineProof(self._phases, self.spec, probes)
        self._reference: Reference | None = None
        engines.load_with(self._restore)

    @property
    def version(self) -> int:
        """The version that the engines serve; `NO_VERSION` before the first push."""
        return NO_VERSION if self._reference is None else self._reference.offer.version

    def connect(self) -> None:
        """Bring every engine up with the base, connected to the trainer; one that dies over it is replaced.

        Raises:
            RunFailure: an engine did not load, or did not reach the trainer.
            UserError: it can't load this base.
        """
        with self.engines.turn:
            self._turns.to_engines()
            self._welcome(self._loading or load_base(self.rollout, self.base_dir, self._slots))
            self._with_trainer(lambda: self._rounds.connect(self._replace_here))
            # An engine's first pass over tokens is slow; this one delays no step.
            everyone = {rank: self.engines[rank].generation for rank in self.engines}
            warming = self._proof.begin_scoring(everyone)
            if self._turns.alternate:
                self._phases.wait(everyone, warming)
                self._turns.to_policy()
            self._proof.base = self._trainer_logps(None)()
            self._phases.wait(everyone, warming)

    def push(self, version: int) -> SyncReport:
        """Bring all engines to the policy's present weights, under a new version.

        Raises:
            InvariantViolation: the version is not newer, an engine refused what it got, or after loading it
                holds something else than the trainer; with the facts.
            RunFailure: the trainer failed, or engines died again and again.
        """
        with self.engines.turn:
            report, absent = self._with_trainer(lambda: self._push(version), version)
        for rank in absent:
            self.engines.bring_back(rank)
        return (
            report if report is not None else self._report({}, list(self._proof.probed.values()), {*absent})
        )

    # --- Engines that come and go ---------------------------------------------------------------

    def make(self, rank: int) -> None:
        """Make an engine in a process that was asked for in addition, let it load the base, and make its
        first pass over tokens, which is slow. It is in nobody's way: it is not in the set yet.

        Raises: as `WorkerGroup.rebuild`, and a RunFailure of an engine that is lost or fails.
        """
        calls = UpdatableEngines(self.rollout)
        self.rollout.rebuild(rank)
        calls.load(rank, self.base_dir, updatable=True, slots=self._slots).result()
        calls.score_tokens(rank, self._proof.probes, self._proof.starts).result()

    def admit(self, ranks: Sequence[int]) -> None:
        """Take engines that were made into the set, where nobody generates: the next push brings them its
        version, proved as ever, and they serve nobody before it.

        Raises:
            RunFailure: one can't say what has to be known of it. None is admitted then.
        """
        size = len(self.engines)
        with self.engines.turn:
            failed = self._phases.welcome(self.engines.add(ranks))
            if failed:
                self.engines.remove_from(size)
        for rank, failure in failed.items():
            raise RunFailure(self.rollout.who(rank), "sync", failure.reason, self.rollout.next_of(rank))

    def dismiss(self, size: int) -> None:
        """Let all engines but the first `size` go, where nobody generates: their processes end kindly."""
        with self.engines.turn:
            self._phases.drop(range(size, len(self.engines)))
            self.engines.remove_from(size)
        self.rollout.resize(size)

    def close(self) -> None:
        """Drop the connections; a trainer that is gone has none. The engines keep what they serve."""
        # Often on the way out of a failure, which is the one to report.
        with contextlib.suppress(RunFailure):
            self._source.close().result()

    def _with_trainer(self, work: Callable[[], T], version: int | None = None) -> T:
        """Result of `work`, which begins anew whenever the trainer's ranks were replaced meanwhile: what they
        had connected went with them. Engines then forget what they staged of `version`, so that they hold
        one whole version again, or are replaced."""
        while True:
            lives = self.policy.lives
            try:
                return work()
            except InvariantViolation:
                raise
            except RunFailure:
                if self.policy.lives == lives:
                    raise
            engines = {rank: self.engines[rank] for rank in self.engines}
            staged = {r: one.generation for r, one in engines.items() if one.state is WeightsState.STAGED}
            if staged and version is not None:
                self._phases.discard(staged, version)

    def _welcome(self, loading: dict[int, WorkerFuture[dict[str, float]]]) -> None:
        """Wait for engines that load the base, all under one deadline; replace those that die over it."""
        began = patient()
        loaded = {}
        for rank, call in loading.items():
            generation = self.engines[rank].generation
            try:
                call.result(began)
                loaded[rank] = generation
            except RunFailure as failure:
                if self.engines.is_alive(rank, generation):
                    raise
                self.engines.saw(rank, generation, WeightsEvent.FAILED, failure.reason)
        for rank, failed in self._phases.welcome(loaded).items():
            if not failed.died:
                raise RunFailure(self.rollout.who(rank), "sync", failed.reason, self.rollout.next_of(rank))
            self.engines.saw(rank, loaded[rank], WeightsEvent.FAILED, failed.reason)
        self._replace_here()

    # --- The phases of a push -------------------------------------------------------------------

    def _push(self, version: int) -> tuple[SyncReport | None, list[int]]:
        """A report, unless nobody was left to push to; and the engines that others have to bring back."""
        old = protocol.mismatch_in_version(self.version, version)
        if old is not None:
            raise violation("trainer", version, old)
        self._turns.to_policy()
        known, prepared = None, self._prepare(version)
        watch = Stopwatch(dict(prepared.seconds))
        if self._turns.alternate:
            # All that the trainer has to say of this version, while its weights are there.
            known = self._ask_reference(prepared)(None)
            watch.part("pack")
            self._turns.to_engines()
            watch.part("turn")
        # One that hangs is better found now than by the trainer, which would wait for it on the channel.
        self.rollout.look_after(rank for rank in self.engines if self.engines[rank].whole)
        replaced = self._replace_lost()
        watch.skip()
        engines, more, withheld = self._rounds.stage(prepared.offer, self._replace_lost)
        watch.part("wire")
        bring = self._load_and_verify if self._slots is None else self._verify_and_switch
        reference = bring(engines, prepared, known, watch)
        absent = [rank for rank in self.engines if self.engines[rank].version != version]
        replaced += more + absent
        if not self._keeps:
            absent = [rank for rank in absent if not self._replace_with(rank, reference)]
        watch.part("verify")
        self._reference = reference
        probes = [self._proof.probed[rank] for rank in self.engines if self.engines[rank].version == version]
        return self._report(watch.seconds, probes, {*replaced}, withheld) if probes else None, absent

    def _load_and_verify(
        self, engines: Participants, prepared: Prepared, known: Reference | None, watch: Stopwatch
    ) -> Reference:
        """`known`: the reference, where the trainer can't be asked while engines compute."""
        loading = self._phases.begin_commit(engines, prepared.offer)
        asked = self._ask_reference(prepared) if known is None else None
        committed, sent = self._phases.end_commit(loading)
        watch.part("load")
        # Not only when the trainer has its own scores: both compute at the same time.
        scoring = self._proof.begin_scoring(committed)
        reference = asked(sent) if asked is not None else known
        assert reference is not None
        self._proof.verify(committed, reference, scoring)
        return reference

    def _verify_and_switch(
        self, engines: Participants, prepared: Prepared, known: Reference | None, watch: Stopwatch
    ) -> Reference:
        """As `_load_and_verify`, of LoRA in slots."""
        scoring = self._proof.begin_scoring(engines, prepared.offer.version)
        asked = self._ask_reference(prepared) if known is None else None
        assert prepared.expected is not None
        found = self._proof.read(engines, prepared.offer, prepared.expected, scoring)
        reference = asked(None) if asked is not None else known
        assert reference is not None
        proved = self._proof.of_staged(engines, reference, found)
        watch.part("verify")
        self._proof.switch(engines, proved, reference.offer)
        watch.part("load")
        return reference

    def _prepare(self, version: int) -> Prepared:
        # Every rank: a sharded policy's weights are gathered from all; the first one answers.
        spec, dtype = self.spec, self._phases.dtype
        # In its own turn the trainer can't merge parts inside a commit: a version is then sent whole.
        limit = None if self._turns.alternate else spec.packed_buffer_size_bytes
        prepared = self._source.prepare(version, self.role, spec.payload, dtype, limit).result()[0]
        assert prepared is not None
        return prepared

    def _ask_reference(self, prepared: Prepared) -> Callable[[SentParts | None], Reference]:
        """The trainer's account of this version; what it did not find out while it merged and sent is
        computed while the engines load."""
        asked = None
        if prepared.expected is None and not prepared.offer.parts_later:
            asked = self._source.expected(self.role, self._phases.dtype)
        logps = self._trainer_logps(self.role)
        previous = None if self._reference is None else self._reference.logps

        def reference(sent: SentParts | None) -> Reference:
            known = prepared.expected if sent is None else sent.expected
            expected = known if asked is None else asked.result()[0]
            assert expected is not None
            return Reference(prepared.offer, expected, logps(), previous)

        return reference

    def _trainer_logps(self, role: str | None) -> Callable[[], list[np.ndarray]]:
        """The trainer's log-probabilities of each probe's tokens; asked for at once."""
        batch = self._proof.batch()
        logps = self._source.token_logprobs(batch, role)
        cuts = np.cumsum(batch.label_counts)[:-1]
        return lambda: np.split(logps.result(), cuts)

    # --- Engines that are replaced --------------------------------------------------------------

    def _replace_here(self) -> list[int]:
        """Fresh engines in place of those that are lost, before there is any version."""
        lost = self.engines.lost()
        for rank in lost:
            engine = self.engines[rank]
            self.engines.replace_here(rank, engine.generation, engine.reason, self._phases.load)
        return lost

    def _replace_lost(self) -> list[int]:
        """Fresh engines in place of those that are lost, also where another call has seen them die."""
        lost = [rank for rank in self.engines if not self.engines[rank].whole]
        for rank in lost:
            engine = self.engines[rank]
            if self._keeps or self.engines.running(rank) is not None:
                continue
            # One that an earlier push left in the middle holds no whole version.
            reason = engine.reason or f"it was left {engine.state}"
            self.engines.replace_here(rank, engine.generation, reason, self._phases.load)
        return lost

    def _replace_with(self, rank: int, reference: Reference) -> bool:
        """A fresh engine with this version in place of a lost one; False where that is another's to do."""
        if self.engines.running(rank) is not None:
            return False
        engine = self.engines[rank]

        def load(rank: int, generation: int) -> None:
            self._phases.load(rank, generation)
            self._bring_up(rank, generation, reference)

        self.engines.replace_here(rank, engine.generation, engine.reason, load)
        return True

    def _restore(self, rank: int, generation: int) -> None:
        """Bring an engine that was just made in the background to the current version, verified.

        Raises:
            InvariantViolation, RunFailure: as `push`.
        """
        self._with_trainer(lambda: self._free(rank))
        with self.engines.turn:
            self._phases.load(rank, generation)
            reference = self._reference
            if reference is not None:
                version = reference.offer.version
                self._with_trainer(lambda: self._bring_up(rank, generation, reference), version)

    def _free(self, rank: int) -> None:
        """Let the trainer forget an engine."""
        # It may be in the middle of its updates: no deadline runs while it gets to this.
        free = self._source.disconnect(rank)
        while not free.done():
            time.sleep(POLL_S)
        free.result()

    def _bring_up(self, rank: int, generation: int, reference: Reference) -> None:
        """One fresh engine to a version that was sent before, verified."""
        offer, engines = reference.offer, {rank: generation}
        decision = self._phases.stage(engines, offer)
        if decision.refusals:
            raise violation(self.rollout.who(rank), offer.version, "; ".join(decision.refusals), offer)
        if decision.commit and self._slots is not None:
            scoring = self._proof.begin_scoring(engines, offer.version)
            found = self._proof.read(engines, offer, reference.expected, scoring)
            self._proof.switch(engines, self._proof.of_staged(engines, reference, found), offer)
        elif decision.commit:
            committed, _ = self._phases.end_commit(self._phases.begin_commit(engines, offer))
            self._proof.verify(committed, reference, self._proof.begin_scoring(committed))
        engine = self.engines[rank]
        if (engine.generation, engine.version) != (generation, offer.version):
            again = engine.reason or "its process died while it staged"
            reason = f"it was replaced, and lost again on its way to version {offer.version}: {again}"
            raise RunFailure(self.rollout.who(rank), "sync", reason, self.rollout.next_of(rank))

    def _report(
        self,
        seconds: dict[str, float],
        probes: list[ProbeReport],
        replaced: set[int],
        withheld: Sequence[int] = (),
    ) -> SyncReport:
        assert self._reference is not None
        offer = self._reference.offer
        return SyncReport(
            version=offer.version,
            payload=self.spec.payload,
            bytes=offer.bytes + offer.bytes_later,
            tensors=offer.tensors + offer.tensors_later,
            digest=offer.digest,
            seconds=seconds,
            probe=max(probes, key=lambda probe: probe.mean),
            share_unchanged_bf16=self._reference.expected.share_unchanged_bf16,
            replaced=tuple(sorted(replaced)),
            withheld=tuple(withheld),
        )
