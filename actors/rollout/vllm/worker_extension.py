"""Calls into a vLLM worker besides vLLM's own: versions of its weights or of LoRA beside them, and what its
routers chose.

vLLM imports this module in every worker, because `EXTENSION` is named in `worker_extension_cls`, and makes
the class below a base of the worker. Arguments and answers are plain values, see `worker_calls`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from actors.errors import RunFailure
from actors.rollout.vllm import base_loader as base_loader
from actors.rollout.vllm.adapter_slots import AdapterSlots, slots_of_worker
from actors.rollout.vllm.intake import Intake
from actors.rollout.vllm.router_capture import RouteCounter, moe_layers
from actors.rollout.vllm.sleeping import drop_pages
from actors.rollout.vllm.weight_transfer import refusal
from actors.rollout.vllm.worker_calls import answers, packed
from actors.sync.channel import Backend
from actors.sync.payload import Manifest, Payload
from actors.sync.protocol import StageAck, digest_of_all, mismatch_in_version

if TYPE_CHECKING:
    from actors.rollout.vllm.weight_transfer import SyncTransferEngine

EXTENSION = f"{__name__}.SyncWorkerExtension"


class SyncWorkerExtension:
    """Base of every worker; most of it is for one that a trainer keeps up to date."""

    weight_transfer_engine: SyncTransferEngine
    model_runner: Any
    vllm_config: Any
    _intake: Intake
    _routes: RouteCounter
    _versions: SyncTransferEngine | AdapterSlots
    """Keeps what is staged."""

    @answers
    def open_intake(self) -> dict[str, list[int]]:
        """Get ready for versions.

        Returns:
            Checkpoint tensor -> how many of its elements this process holds, and how many it has.
        """
        from vllm.distributed import get_tp_group

        self._intake = Intake(get_tp_group(), self.model_runner.device)
        self._versions = self.weight_transfer_engine
        self._routes = RouteCounter(self.weight_transfer_engine.model)
        return self.weight_transfer_engine.held

    @answers
    def open_slots(self, base: str) -> None:
        """Get ready for versions in LoRA slots beside the base in this directory."""
        from vllm.distributed import get_tp_group

        self._intake = Intake(get_tp_group(), self.model_runner.device)
        self._routes = RouteCounter(self.model_runner.model)
        self._versions = slots_of_worker(self.model_runner, base)

    @answers
    def refuse_names(self, names: list[str]) -> None:
        """Refuse payloads that change these checkpoint tensors: no module of any worker holds all of one."""
        self.weight_transfer_engine.unbound = frozenset(names)

    @answers
    def listen_for(self, engines: list[int], host: str, timeout_s: float) -> list[list[Any]]:
        """See `Intake.listen`; as pairs."""
        return [[*pair] for pair in self._intake.listen(engines, host, timeout_s).items()]

    @answers
    def accept_engines(self, engines: list[int], backend: Backend) -> list[list[Any]]:
        """See `Intake.accept`; as pairs."""
        return [[*pair] for pair in self._intake.accept(engines, backend).items()]

    @answers
    def connect_sender(self, address: str, timeout_s: float) -> None:
        """See `Intake.connect`."""
        self._intake.connect(address, timeout_s)

    @answers
    def open_channel(self, backend: Backend) -> None:
        """See `Intake.open`."""
        self._intake.open(backend)

    @answers
    def close_channel(self) -> None:
        """See `Intake.close`."""
        self._intake.close()

    @answers
    def stage_version(self, served: int, version: int, pass_on_to: list[int]) -> dict[str, Any]:
        """Receive `version`, to be kept next to the served one, and pass it on: a `StageAck`, and how many
        parts follow."""
        with self._intake.passing_on(pass_on_to) as payload:
            if payload.manifest.version != version:
                raise RunFailure("rollout", "stage", f"got version {payload.manifest.version}, not {version}")
            return self._stage(payload, served)

    @answers
    def stage_bytes(self, served: int, manifest: bytes, buffer: bytes) -> dict[str, Any]:
        """`stage_version`, for a payload that is here already."""
        received = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)
        payload = Payload(Manifest.decode(manifest), received)
        return self._stage(payload.to(self.model_runner.device), served)

    @answers
    def receive_part(self) -> str:
        """Receive the next part of the version that is being loaded; digest of its bytes."""
        payload = self._intake.receive()
        self.weight_transfer_engine.stage_later(payload)
        return payload.digest

    @answers
    def discard_weights(self) -> None:
        """Forget what is staged."""
        self._versions.discard()

    @answers
    def slots_in_use(self, names: list[str]) -> None:
        """See `AdapterSlots.in_use`."""
        self._slots.in_use = names

    @answers
    def staged_slot(self) -> dict[str, Any]:
        """The staged version in its slot: `number`, `bound`, `expected`, `partial` and `seconds`, see
        `AdapterSlots`."""
        slots = self._slots
        bound, expected = slots.bound()
        assert slots.staged is not None
        number, seconds = slots.staged.number, slots.staged.seconds
        partial = slots.partial()
        return {
            "number": number, "seconds": seconds, "bound": bound, "expected": expected, "partial": partial
        }  # fmt: skip

    @answers
    def read_slot(self, version: int) -> list[str]:
        """The digest of all digests of `AdapterSlots.read`, and their algorithm."""
        algorithm, digests = self._slots.read(version)
        return [digest_of_all(digests), algorithm]

    @answers
    def slot_digests(self, version: int) -> dict[str, str]:
        """See `AdapterSlots.read`."""
        return self._slots.read(version)[1]

    @answers
    def switch_slot(self, version: int) -> None:
        """See `AdapterSlots.switch`."""
        self._slots.switch(version)

    @answers
    def loaded_weights(self) -> dict[str, Any]:
        """Result of the last update in this process: `weight_transfer.Loaded`, its digests as one."""
        loaded = asdict(self.weight_transfer_engine.loaded)
        return loaded | {"digest": digest_of_all(loaded.pop("digests"))}

    @answers
    def bound_digests(self) -> dict[str, str]:
        """Checkpoint name -> digest of what the last update bound."""
        return self.weight_transfer_engine.loaded.digests

    @answers
    def expert_load(self) -> list[Any] | None:
        """See `RouteCounter.take`; packed."""
        load = self._routes.take()
        return None if load is None else packed(load)

    @answers
    def keep_routes(self) -> None:
        """See `RouteCounter.keep`."""
        self._routes.keep(self.model_runner)

    @answers
    def take_routes(self, requests: list[str]) -> list[list[Any]]:
        """See `RouteKeeper.take`; packed, and empty but in the first worker: all of them chose the same."""
        keeper = self._routes.keeper
        assert keeper is not None
        taken = keeper.take(requests)
        return [packed(one) for one in taken] if self._intake.is_first else []

    @answers
    def forget_routes(self, requests: list[str]) -> None:
        """See `RouteKeeper.forget`."""
        keeper = self._routes.keeper
        assert keeper is not None
        keeper.forget(requests)

    @answers
    def moe_layers(self) -> list[int]:
        """See `actors.rollout.vllm.router_capture.moe_layers`."""
        return moe_layers(self.model_runner.model)

    @property
    def _slots(self) -> AdapterSlots:
        assert isinstance(self._versions, AdapterSlots)
        return self._versions

    @answers
    def drop_cache(self) -> int:
        """Give the memory of keys and values on the CPU back to the machine; bytes."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return drop_pages(getattr(layer, "kv_cache", None) for layer in layers)

    def _stage(self, payload: Payload, served: int) -> dict[str, Any]:
        self._versions.discard()
        manifest = payload.manifest
        wrong = mismatch_in_version(served, manifest.version)
        if wrong is not None:
            raise refusal(wrong)
        self._versions.stage(payload)
        ack = StageAck(
            version=manifest.version,
            bytes=payload.buffer.numel(),
            tensors=len(manifest.entries),
            digest=payload.digest,
            manifest_digest=manifest.digest,
            algorithm=manifest.algorithm,
        )
        return {"ack": asdict(ack), "parts_later": len(manifest.later)}
