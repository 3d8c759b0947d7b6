"""Versions of LoRA in the slots of one vLLM engine, beside its base. Runs in the engine's process.

Invariants: those of `WeightUpdater`; and what is staged can be read back and computed with while the version
before is served, so that a version is proved before anybody serves it. Nothing is loaded, so no commit can
leave half a version behind.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from actors.errors import InvariantViolation, RunFailure, UserError
from actors.models.facts import vllm_row
from actors.rollout.vllm.requests import slot_request
from actors.rollout.weight_updater import WeightUpdater
from actors.sync.protocol import CommitReport, Readback, StageAck
from actors.sync.spec import SLOT_RANKS, SlotSpec

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def slot_settings(slots: SlotSpec, config: Any) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` without which an engine has no LoRA slots. `config`: the base's.

    Raises:
        UserError: vLLM keeps no LoRA of this rank, or for this architecture.
    """
    from actors.rollout.vllm.adapter_slots import SLOTS
    from actors.rollout.vllm.worker_extension import EXTENSION

    problems = []
    if slots.max_lora_rank is None:
        problems.append(f"sync.payload: lora: rank {slots.rank}; a slot of vLLM has {SLOT_RANKS[-1]} at most")
    if not vllm_row(config.model_type).supports_lora:
        problems.append(f"sync.payload: lora: vLLM has no LoRA for a {config.model_type} model")
    problems += _no_kernel(slots)
    if problems:
        raise UserError(problems)
    return {
        "worker_extension_cls": EXTENSION,
        "enable_lora": True,
        "max_loras": SLOTS,
        "max_cpu_loras": SLOTS,
        "max_lora_rank": slots.max_lora_rank,
        "lora_target_modules": list(slots.modules),
    }


def _no_kernel(slots: SlotSpec) -> list[str]:
    """Experts with LoRA run in Triton kernels alone."""
    from vllm.platforms import current_platform

    if "experts" not in slots.modules or not current_platform.is_cpu():
        return []
    return ["sync.payload: lora: vLLM has no kernel for LoRA on experts on the CPU"]


class SlotUpdater(WeightUpdater):
    """Versions in the slots of one engine, which was started with `slot_settings`."""

    _served_slot: LoRARequest | None = None
    _staged_slot: LoRARequest | None = None
    _said: tuple[str, ...] = ()
    """Slots that the workers were told are in use."""
    _found: dict[str, Any]
    """What the workers say of the staged slot."""

    def slot(self, version: int | None = None) -> LoRARequest | None:
        """The slot of the staged version if it is asked for, else as `WeightUpdater.slot`."""
        if version is not None and self._staged is not None and version == self._staged[0]:
            return self._staged_slot
        super().slot(version)
        return self._served_slot

    def commit(self, version: int, keep: bool = False) -> CommitReport:
        """Serve the staged version from now on, by its name. Requests that are under way end with theirs.

        Raises:
            RunFailure: it is not staged.
        """
        self.refuse_lost("commit")
        if self._staged is None or self._staged[0] != version or self._staged_slot is None:
            raise RunFailure("rollout", "commit", f"version {version} is not staged")
        began = time.monotonic()
        self._ask("switch_slot", version)
        self.version, self._served_slot = version, self._staged_slot
        self._staged = self._staged_slot = None
        seconds = {"place": self._found["seconds"], "commit": time.monotonic() - began}
        return CommitReport(version, self._found["bound"], self._found["expected"], seconds)

    def readback(self, version: int, known: str = "") -> Readback:
        """Digests of what the slot of the served or the staged version holds, read now.

        Raises:
            RunFailure: no slot holds this version.
            InvariantViolation: one holds something where nothing was put, or workers hold different versions.
        """
        self.refuse_lost("readback")
        found = self._ask("read_slot", version)
        if any(one != found[0] for one in found):
            raise InvariantViolation("rollout", "readback", "the engine's processes hold different slots")
        digest, algorithm = found[0]
        listed = {} if digest == known else self._ask("slot_digests", version)[0]
        return Readback(version, digest, algorithm, listed)

    def _open(self, base: str) -> None:
        self._ask("open_slots", base)

    def _stage(self, method: str, *args: Any) -> StageAck:
        self._say_in_use()
        self._staged_slot = None
        ack = super()._stage(method, *args)
        try:
            self._found = self._of_all(self._ask("staged_slot"))
        except RunFailure:
            self.discard(ack.version)
            raise
        self._staged_slot = slot_request(ack.version, self._found["number"])
        return ack

    def _say_in_use(self) -> None:
        """Tell the workers which slots besides the served one samples are generated with. They refuse what
        comes, once it is there: whoever sends it is not kept waiting."""
        served = None if self._served_slot is None else self._served_slot.lora_name
        states = self._llm.llm_engine.output_processor.request_states.values()
        in_use = tuple(sorted({state.lora_name for state in states} - {None, served}))
        if in_use != self._said:
            self._ask("slots_in_use", list(in_use))
            self._said = in_use

    @staticmethod
    def _of_all(found: list[dict[str, Any]]) -> dict[str, Any]:
        """What all workers say, if together they hold all of the version."""
        held: Counter[str] = Counter()
        for one in found:
            for name, (here, _) in one["partial"].items():
                held[name] += here
        short = [name for name, (_, whole) in found[0]["partial"].items() if held[name] < whole]
        if short or len({one["number"] for one in found}) > 1:
            reason = f"the workers of this engine don't hold all of {short[0] if short else 'one version'}"
            raise RunFailure("rollout", "stage", reason)
        return min(found, key=lambda one: one["bound"] - one["expected"])
