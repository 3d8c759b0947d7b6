"""The trainer's side of a weight sync, on rank 0 of the policy's host: gather, pack, send, and say what an
engine has to hold afterwards.

Invariants: the host is never touched (merging is out of place); what is expected is computed from the
host's own weights, not from what was packed, so a wrong payload can't agree with itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from actors.errors import RunFailure, UserError
from actors.models.low_rank import Factors, low_rank_delta
from actors.models.merge import adapter_factors, base_tensors
from actors.models.sharding import whole
from actors.sync.channel import Channel, Listener, own_address
from actors.sync.payload import Kind, Payload, closure, digest_of, pack_adapter, pack_merged
from actors.sync.protocol import Expected, Offer, Prepared
from actors.sync.spec import Backend


class Holder(Protocol):
    """What a `ModelHost` has to offer here."""

    base: Any
    model: Any


class WeightSource:
    """Weights of a host, by adapter, for engines that are connected by number.

    With `sharded` weights `prepare` and `expected` are collective: ranks that do not lead hand over their
    slices and answer None. Without, they have nothing to do.
    """

    def __init__(self, host: Holder, leads: bool = True, sharded: bool = False) -> None:
        """`leads`: this rank talks to the engines."""
        self._host, self._leads, self._sharded = host, leads, sharded
        self._listeners: dict[int, Listener] = {}
        self._channels: dict[int, Channel] = {}
        self._payload: Payload | None = None

    def listen(self, engine: int, timeout_s: float) -> str:
        """Open a port for an engine, in place of an earlier connection to it; its address.

        Every wait on this connection ends after `timeout_s`.
        """
        self.disconnect(engine)
        self._listeners[engine] = Listener(own_address(), timeout_s)
        return self._listeners[engine].address

    def accept(self, engine: int, backend: Backend = "gloo") -> None:
        """Wait for the engine that was told the address of `listen`.

        Raises:
            RunFailure: it did not come within the deadline.
        """
        self._channels[engine] = self._listeners.pop(engine).accept(f"engine {engine}", backend)

    def prepare(self, version: int, role: str | None, payload: Kind, dtype: str) -> Prepared | None:
        """Gather the weights of adapter `role` and pack them; kept until the next version.

        `dtype`: of the engines, in which merged weights travel. `role` None: all weights of a host without
        adapters.

        Raises:
            UserError: there is no adapter to send.
        """
        began = time.perf_counter()
        if payload == "adapter" and role is None:
            raise UserError("sync.payload: adapter needs LoRA; with model.lora: null set it to merged")
        if not self._leads and not self._sharded:
            return None
        factors = self._factors(role)
        tensors = {} if payload == "adapter" else self._merged(factors, role, dtype)
        if not self._leads:
            return None
        gathered = time.perf_counter()
        if payload == "adapter":
            self._payload = pack_adapter(version, self._base_dtype(), factors)
        else:
            self._payload = pack_merged(version, self._base_dtype(), tensors)
        offer = self._offer(self._payload)
        return Prepared(offer, {"gather": gathered - began, "pack": time.perf_counter() - gathered})

    def send(self, engines: Sequence[int]) -> dict[int, str]:
        """Hand the prepared version to engines that wait for it; the reason of each that could not be
        reached."""
        if self._payload is None:
            raise RunFailure("weight source", "sync", "nothing was prepared")
        failed = {}
        for engine in engines:
            try:
                self._channel(engine).send(self._payload)
            except RunFailure as error:
                failed[engine] = error.reason
        return failed

    def expected(self, role: str | None, dtype: str) -> Expected | None:
        """What an engine with the current weights of `role` merged in `dtype` holds, by checkpoint name."""
        if not self._leads and not self._sharded:
            return None
        factors = self._factors(role)
        merged = self._merged(factors, role, dtype)
        unchanged = self._share_unchanged(factors)
        if not self._leads:
            return None
        return Expected({name: digest_of(merged[name]) for name in sorted(merged)}, unchanged)

    def disconnect(self, engine: int) -> None:
        """Forget an engine."""
        self._listeners.pop(engine, None)
        channel = self._channels.pop(engine, None)
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Forget all engines and the last payload."""
        for engine in {*self._listeners, *self._channels}:
            self.disconnect(engine)
        self._payload = None

    def _channel(self, engine: int) -> Channel:
        if engine not in self._channels:
            raise RunFailure(f"channel to engine {engine}", "sync", "it is not connected")
        return self._channels[engine]

    def _factors(self, role: str | None) -> dict[str, Factors]:
        if role is None:
            return {}
        factors = adapter_factors(self._host.model, role)
        if not factors:
            raise UserError(f"sync: the host has no adapter '{role}'")
        return factors

    def _merged(
        self, factors: Mapping[str, Factors], role: str | None, dtype: str
    ) -> dict[str, torch.Tensor]:
        """Every tensor of every group that an adapter touches, merged, under its checkpoint name."""
        from transformers.core_model_loading import revert_weight_conversion

        base, target = base_tensors(self._host.base), getattr(torch, dtype)
        names = closure(base if role is None else factors, base)
        with torch.no_grad():
            state = {}
            for name in names:
                tensor = whole(base[name])
                if self._leads:
                    state[name] = _merge(tensor, factors.get(name), target)
        return revert_weight_conversion(self._host.base, state) if state else {}

    def _share_unchanged(self, factors: Mapping[str, Factors]) -> float:
        base, same, total = base_tensors(self._host.base), 0, 0
        for name, factor in factors.items():
            tensor = whole(base[name])
            merged = _merge(tensor, factor, torch.bfloat16)
            same += int((merged == tensor.bfloat16()).sum())
            total += merged.numel()
        return same / max(total, 1)

    def _base_dtype(self) -> str:
        return str(next(self._host.base.parameters()).dtype).removeprefix("torch.")

    def _offer(self, payload: Payload) -> Offer:
        manifest = payload.manifest
        if not manifest.entries:
            raise UserError("sync: there is nothing to send")
        return Offer(
            manifest.version, manifest.nbytes, len(manifest.entries), payload.digest, manifest.digest
        )


def _merge(base: torch.Tensor, factors: Factors | None, dtype: torch.dtype) -> torch.Tensor:
    """W0 + s B A in float32, rounded once."""
    if not base.is_floating_point():
        return base
    return base.to(dtype) if factors is None else (base.float() + low_rank_delta(factors)).to(dtype)
