"""Trainer and engine of the sync tests: the real ones, and the same with a fault planted on request."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.models.lora.adapters import adapter_parameters
from actors.models.lora.low_rank import Factors
from actors.models.spec import LoraSpec, ModelSpec
from actors.rollout.engine import EngineSpec, RolloutEngine
from actors.rollout.remote import rollout_group
from actors.rollout.slot_updater import SlotUpdater
from actors.rollout.weight_updater import WeightUpdater
from actors.sync.engine_set import EngineSet
from actors.sync.payload import Payload, PayloadEntry, pack_adapter, pack_merged
from actors.sync.protocol import CommitReport, Prepared, Readback, StageAck
from actors.sync.spec import SlotSpec, SyncSpec
from actors.sync.weight_sync import WeightSync
from actors.trainer.model_host import ModelHost
from actors.trainer.remote import host_group
from actors.trainer.spec import HostSpec
from actors.trainer.weight_source import WeightSource

PROBES = [[(7 * i + 3 * p) % 200 + 20 for i in range(40)] for p in range(4)]
Q, K, O = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qko")  # noqa: E741

PARTS, PART_BYTES = "parts", 2**20

Tamper = Callable[[Payload], Payload]


def started(
    base: Path, logs: Path, engines: int, lora: LoraSpec | None = None
) -> tuple[WorkerGroup, WorkerGroup]:
    """A trainer with an adapter `policy`, and engines that are built and still empty."""
    limits = LimitsSpec(start=120, load=120, sync=30, stop=5)
    policy = host_group("policy", RoleSpec(), limits, logs).start()
    rollout = rollout_group(RoleSpec(workers=engines), limits, logs).start()
    spec = HostSpec(model=ModelSpec(base=str(base), lora=lora or LoraSpec(r=4)))
    here = "tests.actors.sync.sync_faults"
    building = [
        policy.build(f"{here}:FaultyHost", spec, distributed=True),
        rollout.build(f"{here}:FaultyEngine", EngineSpec(max_num_seqs=16, max_model_len=256)),
    ]
    for each in building:
        each.result()
    policy.call("add_adapter", "policy", phase="load")
    return policy, rollout


def connected(
    base: Path,
    policy: WorkerGroup,
    rollout: WorkerGroup,
    payload: str = "adapter",
    slots: SlotSpec | None = None,
) -> WeightSync:
    """A sync whose engines hold the base, after a first, faultless version 0. `PARTS`: `merged`, in parts."""
    size = PART_BYTES if payload == PARTS else SyncSpec().packed_buffer_size_bytes
    kind = "merged" if payload == PARTS else payload
    spec = SyncSpec(payload=kind, packed_buffer_size_bytes=size)  # type: ignore[arg-type]
    sync = WeightSync(policy, EngineSet(rollout), spec, str(base), "policy", PROBES, slots=slots)
    sync.connect()
    policy.call("nudge", 0)
    sync.push(0)
    policy.call("nudge", 1)
    return sync


# --- Trainer --------------------------------------------------------------------------------------


class FaultyHost(ModelHost):
    """A host whose weights change on request and whose weight source can be spoilt."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.weight_source = FaultySource(self.state)

    def nudge(self, seed: int) -> None:
        """Move every A and B of the policy a little, as a step of training would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(self.state.model, "policy").values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


class FaultySource(WeightSource):
    """Spoils what it packs (in good faith: the offer describes what was packed) or what it sends."""

    packed: Tamper | None = None
    sent: Tamper | None = None
    later: Tamper | None = None
    earlier: Payload | None = None

    def plant(self, fault: str, where: str) -> None:
        """The next version is spoilt by this fault of `FAULTS`."""
        setattr(self, where, lambda payload: FAULTS[fault](self, payload))

    def prepare(self, *args: object) -> Prepared:  # type: ignore[override]
        self.earlier = self._payload
        prepared = super().prepare(*args)  # type: ignore[arg-type]
        assert self._payload is not None
        tamper, self.packed = self.packed, None
        if tamper is not None:
            self._payload = tamper(self._payload)
        return dataclasses.replace(prepared, offer=self._offer(self._payload))

    def send(self, engines: Sequence[int]) -> dict[int, str]:
        right, tamper = self._payload, self.sent
        assert right is not None
        self.sent = None
        self._payload = right if tamper is None else tamper(right)
        try:
            return super().send(engines)
        finally:
            self._payload = right

    def _send_each(self, payload: Payload, engines: Sequence[int]) -> dict[int, str]:
        if not payload.manifest.later and self._later is not None:
            tamper, self.later = self.later, None
            payload = payload if tamper is None else tamper(payload)
        return super()._send_each(payload, engines)


def _without(payload: Payload, *gone: str) -> Payload:
    return _packed(payload, {name: f for name, f in _weights(payload).items() if name not in gone})


def _weights(payload: Payload) -> dict[str, Factors] | dict[str, torch.Tensor]:
    if payload.manifest.payload != "merged":
        return payload.factors()
    return {name: tensor for (name, _), tensor in payload.tensors().items()}


def _packed(like: Payload, weights: dict) -> Payload:
    version, dtype, kind = like.manifest.version, like.manifest.base_dtype, like.manifest.payload
    if kind == "merged":
        return pack_merged(version, dtype, weights)
    return pack_adapter(version, dtype, weights, kind=kind)


def _swapped(payload: Payload) -> Payload:
    """The q projections of two layers, of one shape, in each other's place."""
    weights = dict(_weights(payload))
    other = Q.replace("layers.1", "layers.0")
    weights[Q], weights[other] = weights[other], weights[Q]
    return _packed(payload, weights)


def _flipped(payload: Payload) -> Payload:
    entry: PayloadEntry = payload.manifest.entries[0]
    buffer = payload.buffer.clone()
    buffer[entry.offset] ^= 1
    return Payload(payload.manifest, buffer)


def _relabelled(source: FaultySource, payload: Payload) -> Payload:
    assert source.earlier is not None
    manifest = dataclasses.replace(source.earlier.manifest, version=payload.manifest.version)
    return Payload(manifest, source.earlier.buffer)


def _earlier(source: FaultySource, payload: Payload) -> Payload:
    assert source.earlier is not None
    return source.earlier


def _renamed(payload: Payload) -> Payload:
    weights = dict(_weights(payload))
    weights["model.layers.9.self_attn.o_proj.weight"] = weights.pop(O)
    return _packed(payload, weights)


def _base(payload: Payload) -> Payload:
    zero = {n: dataclasses.replace(f, b=torch.zeros_like(f.b)) for n, f in payload.factors().items()}
    return _packed(payload, zero)


FAULTS: dict[str, Callable[[FaultySource, Payload], Payload]] = {
    "tensor dropped": lambda source, payload: _without(payload, O),
    "tensors swapped": lambda source, payload: _swapped(payload),
    "byte flipped": lambda source, payload: _flipped(payload),
    "old version": _earlier,
    "old weights under the new version": _relabelled,
    "half a group": lambda source, payload: _without(payload, Q),
    "bound to no module": lambda source, payload: _renamed(payload),
    "base instead of policy": lambda source, payload: _base(payload),
}


# --- Engine ---------------------------------------------------------------------------------------


class FaultyEngine(RolloutEngine):
    """An engine that can be told to die or to leave something out, once."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.fault = ""
        self.calls: list[str] = []

    def plant(self, fault: str) -> None:
        self.fault = fault

    def log(self) -> list[str]:
        """Parts of syncs that this engine was asked for."""
        return self.calls

    def forget_log(self) -> None:
        self.calls = []

    def make_updater(self, llm: Any, base: str) -> WeightUpdater:
        return FaultyUpdater(self, llm, base)

    def make_slot_updater(self, llm: Any, base: str) -> WeightUpdater:
        return FaultySlots(self, llm, base)


class FaultySlots(SlotUpdater):
    """Versions in the slots of a `FaultyEngine`."""

    def __init__(self, engine: FaultyEngine, llm: Any, base: str) -> None:
        super().__init__(llm, base, engine.spec.dtype)
        self._engine = engine

    def stage(self, version: int, pass_on_to: Sequence[int] = ()) -> StageAck:
        self._engine.calls.append(f"stage {version}")
        return super().stage(version, pass_on_to)

    def readback(self, version: int, known: str = "") -> Readback:
        self._engine.calls.append(f"readback {version}")
        if self._engine.fault == "other LoRA in the slot":
            self._engine.fault = ""
            worker = self._llm.llm_engine.model_executor.driver_worker.worker  # type: ignore[attr-defined]
            manager = worker._versions._manager
            index = manager.lora_index_to_id.index(worker._versions.staged.number)
            manager.modules["model.layers.1.self_attn.o_proj"].lora_b_stacked[0][index, 0, 0, 0] += 1e-7
        return super().readback(version, known)

    def discard(self, version: int) -> None:
        self._engine.calls.append(f"discard {version}")
        super().discard(version)

    def commit(self, version: int, keep: bool = False) -> CommitReport:
        self._engine.calls.append(f"commit {version}")
        if self._engine.fault == "dies before it switches":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().commit(version, keep)


class FaultyUpdater(WeightUpdater):
    """Versions of the weights of a `FaultyEngine`."""

    def __init__(self, engine: FaultyEngine, llm: Any, base: str) -> None:
        super().__init__(llm, base, engine.spec.dtype)
        self._engine = engine

    def stage(self, version: int, pass_on_to: Sequence[int] = ()) -> StageAck:
        self._engine.calls.append(f"stage {version}")
        self._die_if("dies while staging")
        return super().stage(version, pass_on_to)

    def discard(self, version: int) -> None:
        self._engine.calls.append(f"discard {version}")
        super().discard(version)

    def commit(self, version: int, keep: bool = False) -> CommitReport:
        from actors.rollout.vllm import weight_transfer as vllm_side

        self._engine.calls.append(f"commit {version}")
        fault, self._engine.fault = self._engine.fault, ""
        if fault == "dies between two parts":
            self._engine.fault = fault
            with mock.patch.object(self, "_receive_part", side_effect=lambda: self._die_if(fault)):
                return super().commit(version, keep)
        if fault == "repack left out":
            with mock.patch.object(vllm_side, "repack_experts"):
                return super().commit(version, keep)
        if fault:
            # From inside: the old weights are gone, the new ones are not there.
            with mock.patch.object(vllm_side, "repack_experts", side_effect=lambda *_: self._break(fault)):
                return super().commit(version, keep)
        return super().commit(version, keep)

    def connect(self, address: str, timeout_s: float) -> None:
        self._die_if("dies on its way to the trainer")
        super().connect(address, timeout_s)

    def _break(self, fault: str) -> None:
        self._engine.fault = fault
        self._die_if("dies inside commit")
        raise MemoryError("no room for the experts")

    def _die_if(self, fault: str) -> None:
        if self._engine.fault == fault:
            os.kill(os.getpid(), signal.SIGKILL)
