"""The trainer's side of a weight sync, on rank 0 of the policy: gather, pack, send, and say what an engine
has to hold afterwards.

Invariant: what is expected is computed from the model's own weights, not from what was packed, so a wrong
payload can't agree with itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from actors.errors import RunFailure, UserError
from actors.models.lora.low_rank import Factors
from actors.models.lora.merge import adapter_factors
from actors.models.lora.pieces import Pieces
from actors.sync.channel import own_address
from actors.sync.digests import Algorithm, Digests, algorithm_for
from actors.sync.outlets import Outlets
from actors.sync.payload import Kind, Payload, factor_name, pack_adapter, pack_merged
from actors.sync.protocol import Expected, Offer, Prepared, SentParts
from actors.sync.spec import Backend
from actors.trainer.merged_weights import HostMerge, Tally


class Holder(Protocol):
    """The model whose weights are sent, as `actors.trainer.host_state.HostState` has it."""

    @property
    def base(self) -> PreTrainedModel:
        """Raises: InvariantViolation: it is parked."""

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """Raises: InvariantViolation: it is parked."""


@dataclass
class Later:
    """Parts of a version that are merged and sent inside the commit. Merged again they are the same: of the
    adapter this has a copy, and the base is frozen."""

    version: int
    merge: HostMerge
    parts: list[list[str]]
    algorithm: Algorithm
    tally: Tally | None
    """So far; None once all was sent."""
    digests: tuple[str, ...] = ()
    """Of each part as it was sent first."""


class WeightSource:
    """Weights of a model worker, by adapter, for engines that are connected by number.

    With `sharded` weights `prepare`, `send_later` and `expected` are collective: ranks that do not lead hand
    over their slices and answer None. Without, they have nothing to do.
    """

    def __init__(self, host: Holder, leads: bool = True, sharded: bool = False) -> None:
        """`leads`: this rank talks to the engines."""
        self._host, self._leads, self._sharded = host, leads, sharded
        self._outlets = Outlets()
        self._pieces: Pieces | None = None
        self._device = next(host.base.parameters()).device.type
        """Known also while weights are parked, when engines that are replaced connect."""
        self._payload: Payload | None = None
        self._later: Later | None = None

    def listen(self, engines: Sequence[int], timeout_s: float) -> dict[int, str]:
        """Addresses at which engines are waited for: see `Outlets.listen`."""
        return self._outlets.listen(engines, own_address(), timeout_s)

    def accept(self, engines: Sequence[int], backend: Backend = "gloo") -> dict[int, str]:
        """Reasons of engines that were told addresses of `listen` and did not come: see `Outlets.accept`."""
        return self._outlets.accept(engines, backend, self._device)

    def prepare(
        self, version: int, role: str | None, payload: Kind, dtype: str, buffer_bytes: int | None = None
    ) -> Prepared | None:
        """Gather the weights of adapter `role` and pack them; kept until the next version.

        `dtype`: of the engines, in which merged weights travel. `role` None: all weights of a model without
        adapters. `buffer_bytes`: merged weights that are larger are packed in parts, here the first.

        Raises:
            UserError: there is no adapter to send.
        """
        began = time.perf_counter()
        if payload != "merged" and role is None:
            raise UserError(f"sync.payload: {payload} needs LoRA; with model.lora: null set it to merged")
        if not self._leads and not self._sharded:
            return None
        factors = self._factors(role)
        # What is gone need not stay until its successor is made.
        self._payload = self._later = None
        if payload == "merged":
            return self._prepare_merged(version, factors, dtype, buffer_bytes, began)
        if not self._leads:
            return None
        gathered = time.perf_counter()
        if payload == "lora":
            return self._prepare_slots(version, factors, dtype, began, gathered)
        packed = pack_adapter(version, self._base_dtype(), factors, self._algorithm())
        return self._prepared(packed, began, gathered)

    def _prepare_merged(
        self, version: int, factors: Mapping[str, Factors], dtype: str, limit: int | None, began: float
    ) -> Prepared | None:
        algorithm = self._algorithm()
        merge, tally = self._merge(factors, dtype), Tally(algorithm)
        first, *later = merge.parts(limit)
        tensors = merge.merged(first, tally)
        if later:
            own = {n: replace(f, a=f.a.clone(), b=f.b.clone()) for n, f in factors.items()}
            self._later = Later(version, self._merge(own, dtype), later, algorithm, tally)
        if not self._leads:
            return None
        gathered = time.perf_counter()
        outlines = [merge.outline(part) for part in later]
        packed = pack_merged(version, self._base_dtype(), tensors, outlines, algorithm)
        return self._prepared(packed, began, gathered, None if later else tally.expected())

    def _prepare_slots(
        self, version: int, factors: Mapping[str, Factors], dtype: str, began: float, gathered: float
    ) -> Prepared:
        """A and s B as a slot has to hold them. Their digests are taken before anything packs them."""
        scaled = {name: f.scaled(getattr(torch, dtype)) for name, f in factors.items()}
        digests = Digests(self._algorithm())
        for name, f in scaled.items():
            digests.take(factor_name(name, "A"), f.a)
            digests.take(factor_name(name, "B"), f.b)
        packed = pack_adapter(version, self._base_dtype(), scaled, digests.algorithm, "lora")
        return self._prepared(packed, began, gathered, Expected(digests.read(), None, digests.algorithm))

    def _prepared(
        self, payload: Payload, began: float, gathered: float, expected: Expected | None = None
    ) -> Prepared:
        self._payload = payload
        offer = self._offer(payload)
        seconds = {"gather": gathered - began, "pack": time.perf_counter() - gathered}
        return Prepared(offer, seconds, expected)

    def send(self, engines: Sequence[int]) -> dict[int, str]:
        """Hand the prepared version to engines that wait for it; the reason of each that could not be
        reached."""
        if self._payload is None:
            raise RunFailure("weight source", "sync", "nothing was prepared")
        return self._send_each(self._payload, engines)

    def send_later(self, engines: Sequence[int]) -> SentParts | None:
        """Merge, pack and send the parts that were not staged, one after the other, to engines that are
        committing the prepared version. Collective where weights are sharded.

        Raises:
            RunFailure: of weights without adapter a version is sent again that is no longer there.
        """
        later = self._later
        if later is None or not (self._leads or self._sharded):
            return None
        digests: list[str] = []
        unreached: dict[int, str] = {}
        for number, names in enumerate(later.parts):
            tensors = later.merge.merged(names, later.tally)
            if not self._leads:
                continue
            part = pack_merged(later.version, self._base_dtype(), tensors, algorithm=later.algorithm)
            del tensors
            digests.append(self._offer(part).digest)
            if later.digests and later.digests[number] != digests[-1]:
                # Not before the end: other ranks take part in every merge.
                unreached = dict.fromkeys(engines, "the trainer's weights went on")
            unreached |= self._send_each(part, [engine for engine in engines if engine not in unreached])
            # Not held while the next one is merged.
            del part
        if not self._leads:
            return None
        if later.digests and later.digests != tuple(digests):
            for engine in engines:
                self.disconnect(engine)
            raise RunFailure(
                "weight source",
                "sync",
                f"version {later.version} can't be sent again: all weights are trained and have gone on",
                "raise sync.packed_buffer_size_bytes above the size of the weights: the trainer then keeps "
                "each version whole",
            )
        expected = None if later.tally is None else later.tally.expected()
        later.tally, later.digests = None, tuple(digests)
        return SentParts(tuple(digests), unreached, expected)

    def expected(self, role: str | None, dtype: str) -> Expected | None:
        """Digests of the current weights of `role`, merged in `dtype`: an engine has to hold the same."""
        if not self._leads and not self._sharded:
            return None
        algorithm = self._algorithm() if self._payload is None else self._payload.manifest.algorithm
        tally = self._merge(self._factors(role), dtype).tally(algorithm)
        return tally.expected() if self._leads else None

    def disconnect(self, engine: int) -> None:
        """Forget an engine."""
        self._outlets.disconnect(engine)

    def close(self) -> None:
        """Forget all engines and the last payload."""
        self._outlets.close()
        self._payload = self._later = None

    def _send_each(self, payload: Payload, engines: Sequence[int]) -> dict[int, str]:
        return self._outlets.send(payload, engines)

    def _factors(self, role: str | None) -> dict[str, Factors]:
        if role is None:
            return {}
        factors = adapter_factors(self._host.model, role)
        if not factors:
            raise UserError(f"sync: the trainer has no adapter '{role}'")
        return factors

    def _algorithm(self) -> Algorithm:
        return algorithm_for([self._device, *self._outlets.devices])

    def _merge(self, factors: Mapping[str, Factors], dtype: str) -> HostMerge:
        if self._pieces is None:
            self._pieces = Pieces(self._host.base)
        return HostMerge(self._host.base, factors, dtype, self._leads, self._pieces)

    def _base_dtype(self) -> str:
        return str(next(self._host.base.parameters()).dtype).removeprefix("torch.")

    def _offer(self, payload: Payload) -> Offer:
        manifest = payload.manifest
        if not manifest.entries:
            raise UserError("sync: there is nothing to send")
        return Offer(
            version=manifest.version,
            bytes=manifest.nbytes,
            tensors=len(manifest.entries),
            digest=payload.digest,
            manifest_digest=manifest.digest,
            algorithm=manifest.algorithm,
            parts_later=len(manifest.later),
            bytes_later=manifest.nbytes_later,
            tensors_later=sum(map(len, manifest.later)),
        )
