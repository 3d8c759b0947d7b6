"""Versions of one engine's weights: stage, commit, read back. Runs in the engine's process, outside of vLLM,
whose workers receive and hold them.

Invariants: versions only grow; staging leaves the served weights alone; after a failure inside a commit the
engine is lost and serves nobody.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actors.errors import InvariantViolation, RunFailure
from actors.rollout.vllm.worker_calls import ask, standing_still
from actors.sync.channel import Backend, own_address
from actors.sync.payload import Payload
from actors.sync.protocol import NO_VERSION, CommitReport, EngineFacts, Readback, StageAck, digest_of_all

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from actors.models.spec import Quantization


def engine_settings() -> dict[str, Any]:
    """Arguments of vLLM's `LLM` without which an engine can't be updated."""
    from vllm.config import WeightTransferConfig

    from actors.rollout.vllm.weight_transfer import BACKEND
    from actors.rollout.vllm.worker_extension import EXTENSION

    return {
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": EXTENSION,
    }


class WeightUpdater:
    """Versions of the weights of one vLLM engine, which was started with `engine_settings`."""

    def __init__(self, llm: LLM, base: str, dtype: str, quantization: Quantization | None = None) -> None:
        """`base`: directory of the checkpoint that the engine has loaded; `dtype`: in which it computes;
        `quantization`: `model.quantization`."""
        self._dtype, self._quantization = dtype, quantization
        self._llm = llm
        self._staged: tuple[int, int] | None = None
        """Version, and the number of its parts that are not staged."""
        self._digest, self._algorithm = digest_of_all({}), ""
        """Of all that the last commit bound, and of the digests of its parts."""
        self.version = NO_VERSION
        self.lost = ""
        """Why this engine can't be used any more."""
        self._open(base)

    def slot(self, version: int | None = None) -> LoRARequest | None:
        """The LoRA slot in which a version (None: the served one) is computed; None where weights are loaded.

        Raises:
            RunFailure: this version can't be computed.
        """
        if version not in (None, self.version):
            raise RunFailure("rollout", "score_tokens", f"version {self.version} is served, not {version}")
        return None

    def _open(self, base: str) -> None:
        """Let the workers get ready for versions."""
        info = {"base": base, "quantization": self._quantization}
        self._llm.init_weight_transfer_engine({"init_info": info})
        held: Counter[str] = Counter()
        whole: dict[str, int] = {}
        for found in self._ask("open_intake"):
            for name, (here, all_of_it) in found.items():
                held[name] += here
                whole[name] = all_of_it
        self._ask("refuse_names", [name for name, size in whole.items() if held[name] < size])

    def describe(self) -> EngineFacts:
        """Facts that a trainer needs before the first version."""
        return EngineFacts(self._dtype, own_address())

    def listen(self, engines: Sequence[int], timeout_s: float) -> dict[int, str]:
        """Addresses at which engines are waited for that get what comes from this one: `Outlets.listen`."""
        return dict(self._ask("listen_for", list(engines), own_address(), timeout_s)[0])

    def accept(self, engines: Sequence[int], backend: Backend = "gloo") -> dict[int, str]:
        """Reasons of engines that were told addresses of `listen` and did not come: `Outlets.accept`."""
        return dict(self._ask("accept_engines", list(engines), backend)[0])

    def connect(self, address: str, timeout_s: float) -> None:
        """Reach whoever sends to this engine, at `address`. An earlier connection is dropped.

        Raises:
            LinkFailure: nobody listens there.
        """
        self._ask("connect_sender", address, timeout_s)

    def open_channel(self, backend: Backend = "gloo") -> None:
        """Connect to whoever was reached.

        Raises:
            LinkFailure: nobody was, or it does not accept.
        """
        self._ask("open_channel", backend)

    def stage(self, version: int, pass_on_to: Sequence[int] = ()) -> StageAck:
        """Receive a version, pass it on to these engines, and keep it next to the served weights.

        An engine that does not take it says so itself, as it has nothing to acknowledge.

        Raises:
            LinkFailure: whoever sends is gone; the engine serves on.
            RunFailure: this can't be loaded; the engine serves on.
        """
        return self._stage("stage_version", version, list(pass_on_to))

    def stage_payload(self, payload: Payload) -> StageAck:
        """`stage`, for a payload that is here already."""
        return self._stage("stage_bytes", payload.manifest.encode(), payload.buffer.numpy().tobytes())

    def discard(self, version: int) -> None:
        """Forget what is staged of `version`."""
        self._staged = None
        self._ask("discard_weights")

    def commit(self, version: int, keep: bool = False) -> CommitReport:
        """Load the staged version in place of the served one, and what was not staged of it as it comes.

        `keep`: samples may be in flight. They go on with the new weights; keys and values
        of what they have so far are computed again with these.

        Raises:
            RunFailure: it is not staged, or loading failed: then the engine is lost.
        """
        self.refuse_lost("commit")
        if self._staged is None or self._staged[0] != version:
            raise RunFailure("rollout", "commit", f"version {version} is not staged")
        parts_later, self._staged = self._staged[1], None
        began = time.monotonic()
        try:
            with standing_still(self._llm):
                digests = self._load(version, parts_later)
                loaded = self._finish(version, keep)
        except Exception as error:
            self.lost = f"{type(error).__name__} while committing version {version}: {error}"
            # A trainer that still has parts to send need not wait for its deadline.
            with contextlib.suppress(Exception):
                self.close()
            raise RunFailure("rollout", "commit", self.lost, "restart this engine") from error
        self.version = version
        seconds = {**loaded[0]["seconds"], "commit": time.monotonic() - began}
        # A worker that bound less than it was handed has to be seen among others.
        short = min(loaded, key=lambda one: one["bound"] - one["expected"])
        return CommitReport(version, short["bound"], short["expected"], seconds, digests)

    def readback(self, version: int, known: str = "") -> Readback:
        """Digests of what the last commit bound, by checkpoint name; without the list where the one of all of
        them is `known`.

        Raises:
            RunFailure: another version is served.
        """
        self.refuse_lost("readback")
        if version != self.version:
            raise RunFailure("rollout", "readback", f"version {self.version} is served, not {version}")
        digests = {} if self._digest == known else self._ask("bound_digests")[0]
        return Readback(version, self._digest, self._algorithm, digests)

    def refuse_lost(self, phase: str) -> None:
        """An engine that failed inside a commit serves nobody."""
        if self.lost:
            raise RunFailure("rollout", phase, f"the engine is lost: {self.lost}", "restart this engine")

    def close(self) -> None:
        """Drop the connections."""
        self._ask("close_channel")

    def _stage(self, method: str, *args: Any) -> StageAck:
        self.refuse_lost("stage")
        self._staged = None
        found = self._ask(method, self.version, *args)
        if any(one != found[0] for one in found):
            self._ask("discard_weights")
            raise InvariantViolation("rollout", "stage", "the engine's processes received different bytes")
        ack = StageAck(**found[0]["ack"])
        self._staged = ack.version, found[0]["parts_later"]
        return ack

    def _load(self, version: int, parts_later: int) -> tuple[str, ...]:
        """Load what is staged, then part by part what was not; digests of these."""
        info = {"update_info": {"version": version}}
        self._llm.start_weight_update()
        self._llm.update_weights(info)
        digests = []
        for _ in range(parts_later):
            digests.append(self._receive_part())
            self._llm.update_weights(info)
        return tuple(digests)

    def _receive_part(self) -> str:
        found: list[str] = self._ask("receive_part")
        if len(set(found)) > 1:
            raise InvariantViolation("rollout", "commit", "the engine's processes received different bytes")
        return found[0]

    def _finish(self, version: int, keep: bool) -> list[dict[str, Any]]:
        llm = self._llm
        llm.finish_weight_update(f"v{version}")
        # Keys and values of the old weights would be taken for the same prompts.
        if not llm.reset_prefix_cache(reset_running_requests=keep):
            raise InvariantViolation("rollout", "commit", "samples are still being generated")
        loaded: list[dict[str, Any]] = self._ask("loaded_weights")
        self._digest, self._algorithm = loaded[0]["digest"], loaded[0]["algorithm"]
        if any(one["digest"] != self._digest for one in loaded):
            raise InvariantViolation("rollout", "commit", "the engine's processes hold different weights")
        return loaded

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return ask(self._llm, method, *args)
