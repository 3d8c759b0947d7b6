"""Versions of one engine's weights: stage, commit, read back. Runs in the engine's process, outside of vLLM.

Invariants: versions only grow; staging leaves the served weights alone; after a failure inside a commit the
engine is lost and serves nobody.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from actors.errors import InvariantViolation, RunFailure
from actors.sync.channel import Backend, Channel, Connector
from actors.sync.payload import Payload
from actors.sync.protocol import NO_VERSION, CommitReport, Readback, StageAck, mismatch_in_version

if TYPE_CHECKING:
    from vllm import LLM

    from actors.rollout.vllm.weight_transfer import Loaded


def engine_settings() -> dict[str, Any]:
    """Arguments of vLLM's `LLM` without which an engine can't be updated."""
    from vllm.config import WeightTransferConfig

    from actors.rollout.vllm.weight_transfer import BACKEND, EXTENSION

    return {
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": EXTENSION,
    }


class WeightUpdater:
    """Versions of the weights of one vLLM engine, which was started with `engine_settings`."""

    def __init__(self, llm: LLM, base: str, dtype: str) -> None:
        """`base`: directory of the checkpoint that the engine has loaded; `dtype`: in which it computes."""
        self._dtype = dtype
        self._llm = llm
        self._connector: Connector | None = None
        self._channel: Channel | None = None
        self._staged: Payload | None = None
        self._digests: dict[str, str] = {}
        self.version = NO_VERSION
        self.lost = ""
        """Why this engine can't be used any more."""
        llm.init_weight_transfer_engine({"init_info": {"base": base}})
        self._elements: Counter[str] = Counter()
        for found in self._rpc("bound_elements"):
            self._elements.update(found)

    def connect(self, address: str, timeout_s: float) -> str:
        """Reach the trainer that listens at `address`; returns the engine's dtype. An earlier connection is
        dropped.

        Raises:
            RunFailure: nobody listens there.
        """
        self.close()
        self._connector = Connector(address, timeout_s)
        return self._dtype

    def open_channel(self, backend: Backend = "gloo") -> None:
        """Connect to the trainer that was reached.

        Raises:
            RunFailure: none was, or it does not accept.
        """
        if self._connector is None:
            raise RunFailure("rollout", "sync", "no trainer was reached", "call connect first")
        connector, self._connector = self._connector, None
        self._channel = connector.join(backend)

    def stage(self, version: int) -> StageAck:
        """Receive a version and keep it next to the served weights.

        Raises:
            RunFailure: the trainer is gone, or this can't be loaded; the engine serves on.
        """
        payload = self._received()
        if payload.manifest.version != version:
            raise RunFailure("rollout", "stage", f"got version {payload.manifest.version}, not {version}")
        return self.stage_payload(payload)

    def stage_payload(self, payload: Payload) -> StageAck:
        """`stage`, for a payload that is here already."""
        self.refuse_lost("stage")
        self._forget()
        wrong = mismatch_in_version(self.version, payload.manifest.version)
        if wrong is not None:
            raise RunFailure("rollout", "stage", wrong)
        for changed in self._rpc("stage_weights", payload):
            self._refuse_unbound(changed)
        self._staged = payload
        manifest = payload.manifest
        return StageAck(
            version=manifest.version,
            bytes=payload.buffer.numel(),
            tensors=len(manifest.entries),
            digest=payload.digest,
            manifest_digest=manifest.digest,
        )

    def discard(self, version: int) -> None:
        """Forget what is staged of `version`."""
        self._forget()

    def commit(self, version: int, keep: bool = False) -> CommitReport:
        """Load the staged version in place of the served one, and what was not staged of it as it comes.

        `keep`: samples may be in flight. They go on with the new weights; keys and values
        of what they have so far are computed again with these.

        Raises:
            RunFailure: it is not staged, or loading failed: then the engine is lost.
        """
        self.refuse_lost("commit")
        if self._staged is None or self._staged.manifest.version != version:
            raise RunFailure("rollout", "commit", f"version {version} is not staged")
        parts_later = len(self._staged.manifest.later)
        # The engine's processes have it too, and drop it once it is loaded.
        self._staged = None
        began = time.monotonic()
        try:
            digests = self._load(version, parts_later)
            loaded = self._finish(version, keep)
        except Exception as error:
            self.lost = f"{type(error).__name__} while committing version {version}: {error}"
            # A trainer that still has parts to send need not wait for its deadline.
            self.close()
            raise RunFailure("rollout", "commit", self.lost, "restart this engine") from error
        self.version = version
        seconds = {**loaded[0].seconds, "commit": time.monotonic() - began}
        bound, expected = (max(getattr(one, what) for one in loaded) for what in ("bound", "expected"))
        return CommitReport(version, bound, expected, seconds, digests)

    def readback(self, version: int) -> Readback:
        """Digests of what the last commit bound, by checkpoint name.

        Raises:
            RunFailure: another version is served.
        """
        self.refuse_lost("readback")
        if version != self.version:
            raise RunFailure("rollout", "readback", f"version {self.version} is served, not {version}")
        return Readback(version, dict(self._digests))

    def refuse_lost(self, phase: str) -> None:
        """An engine that failed inside a commit serves nobody."""
        if self.lost:
            raise RunFailure("rollout", phase, f"the engine is lost: {self.lost}", "restart this engine")

    def close(self) -> None:
        """Drop the connection."""
        self._connector = None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _load(self, version: int, parts_later: int) -> tuple[str, ...]:
        """Load what is staged, then part by part what was not; digests of these."""
        info = {"update_info": {"version": version}}
        self._llm.start_weight_update()
        self._llm.update_weights(info)
        digests = []
        for _ in range(parts_later):
            part = self._received()
            digests.append(part.digest)
            self._rpc("stage_later", part)
            del part
            self._llm.update_weights(info)
        return tuple(digests)

    def _finish(self, version: int, keep: bool) -> list[Loaded]:
        llm = self._llm
        llm.finish_weight_update(f"v{version}")
        # Keys and values of the old weights would be taken for the same prompts.
        if not llm.reset_prefix_cache(reset_running_requests=keep):
            raise InvariantViolation("rollout", "commit", "samples are still being generated")
        loaded: list[Loaded] = self._rpc("loaded_weights")
        self._digests = {name: digest for one in loaded for name, digest in one.digests.items()}
        if any(self._digests[name] != digest for one in loaded for name, digest in one.digests.items()):
            raise InvariantViolation("rollout", "commit", "the engine's processes hold different weights")
        return loaded

    def _forget(self) -> None:
        self._staged = None
        self._rpc("discard_weights")

    def _received(self) -> Payload:
        if self._channel is None:
            raise RunFailure("rollout", "stage", "no trainer is connected", "call open_channel first")
        return self._channel.receive()

    def _refuse_unbound(self, changed: dict[str, int]) -> None:
        unbound = [name for name, size in changed.items() if self._elements[name] < size]
        if unbound:
            self._forget()
            raise RunFailure("rollout", "stage", f"bound to no module of the engine: {unbound[:3]}")

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        found: list[Any] = self._llm.llm_engine.collective_rpc(method, args=args)
        return found
