"""Proof that engines hold a version: what they are asked, and what becomes of those that hold something else.

The comparisons are in `verify`. Weights that were loaded are proved after the commit, and an engine that
holds others is lost. LoRA in slots is proved while it is staged: where one engine has another, all forget it
and serve on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from actors.batches.batch import Batch
from actors.sync import verify
from actors.sync.asking import Asked, Participants
from actors.sync.engine_state import WeightsEvent
from actors.sync.phases import Phases, violation
from actors.sync.protocol import Expected, Offer, Readback
from actors.sync.spec import SyncSpec
from actors.sync.verify import ProbeReport, Reference

Found = Mapping[int, tuple[Readback, list[np.ndarray]] | str]
"""By rank: digests and log-probabilities of the probes, or why an engine that lives can't say."""


class EngineProof:
    """Compares engines with references."""

    def __init__(self, phases: Phases, spec: SyncSpec, probes: Sequence[Sequence[int]]) -> None:
        """`probes`: token ids, of which the last `spec.probe_tokens` are compared."""
        self._phases, self._spec = phases, spec
        self.probes = [list(map(int, probe)) for probe in probes]
        self.starts = [max(1, len(probe) - spec.probe_tokens) for probe in self.probes]
        self.base: list[np.ndarray] = []
        """The trainer's log-probabilities of the probes without adapter."""
        self.probed: dict[int, ProbeReport] = {}
        """Of each engine, the last."""

    def batch(self) -> Batch:
        """The probes, for the trainer."""
        masks = [np.arange(len(probe)) >= start for probe, start in zip(self.probes, self.starts)]
        return Batch.from_sequences(self.probes, masks)

    def begin_scoring(self, engines: Participants, version: int | None = None) -> Asked:
        """Ask engines for log-probabilities of the probes, by a version (None: what is served)."""
        return self._phases.begin_scoring(engines, self.probes, self.starts, version)

    def read(self, engines: Participants, offer: Offer, expected: Expected, scoring: Asked) -> Found:
        """Digests and probes of a version in engines; one that died over it is lost and left out."""
        return self._phases.read(engines, offer.version, expected.digest, scoring)

    def verify(self, engines: Participants, reference: Reference, scoring: Asked) -> None:
        """Compare what engines have loaded; those that hold the reference serve the version.

        Raises:
            InvariantViolation: an engine holds something else.
        """
        offer = reference.offer
        for rank, found in self.read(engines, offer, reference.expected, scoring).items():
            checked = self._check(reference, found)
            if isinstance(checked, str):
                raise self._phases.lose(rank, engines[rank], offer.version, checked, offer)
            self.probed[rank] = checked
            self._phases.engines.saw(rank, engines[rank], WeightsEvent.VERIFIED, version=offer.version)

    def of_staged(self, engines: Participants, reference: Reference, found: Found) -> dict[int, ProbeReport]:
        """The engines that have staged the reference.

        Raises:
            InvariantViolation: one has something else. All have forgotten it, and serve what they did.
        """
        proved: dict[int, ProbeReport] = {}
        for rank, one in found.items():
            checked = self._check(reference, one)
            if isinstance(checked, str):
                self._phases.discard(engines, reference.offer.version)
                who = self._phases.engines.group.who(rank)
                raise violation(who, reference.offer.version, checked, reference.offer)
            proved[rank] = checked
        return proved

    def switch(self, engines: Participants, proved: Mapping[int, ProbeReport], offer: Offer) -> None:
        """Let engines serve what they have staged, once it was proved; one that fails is lost."""
        switching = {rank: engines[rank] for rank in proved}
        committed, _ = self._phases.end_commit(self._phases.begin_commit(switching, offer))
        for rank, generation in committed.items():
            self.probed[rank] = proved[rank]
            self._phases.engines.saw(rank, generation, WeightsEvent.VERIFIED, version=offer.version)

    def _check(
        self, reference: Reference, found: tuple[Readback, list[np.ndarray]] | str
    ) -> ProbeReport | str:
        """Probes of an engine that holds the reference, or how it differs."""
        if isinstance(found, str):
            return found
        read, scored = found
        wrong = verify.mismatch_in_readback(reference.expected, read, reference.offer.version)
        if wrong is not None:
            return wrong
        report = verify.compare_probes(scored, reference.logps, reference.previous, self.base)
        unchanged = reference.expected.share_unchanged_bf16 or 0.0
        dtype, tolerance = self._phases.dtype, self._spec.tolerance
        return verify.mismatch_in_probes(report, dtype, tolerance, unchanged) or report
