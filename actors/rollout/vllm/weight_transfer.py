"""The engine's half of a weight sync, behind vLLM's weight-transfer interface, in vLLM's worker process.

Importing this module registers the backend; vLLM imports it in every worker with `worker_extension`. Nothing
of the model is touched before `start_weight_update`: from there
on every parameter is without storage and there is no way back, so all that can be refused is refused
while staging.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from actors.errors import InvariantViolation, RunFailure
from actors.models.spec import Quantization
from actors.models.threads import one_thread
from actors.rollout.vllm.base_loader import base_weights
from actors.rollout.vllm.lora_merge import Merger, Targets
from actors.rollout.vllm.parameter_map import record_bindings, without_reload_warnings
from actors.rollout.vllm.readback import Reader
from actors.rollout.vllm.repack import refuse_padded_experts, repack_experts
from actors.rollout.vllm.workarounds import worker as worker
from actors.sync.digests import Algorithm
from actors.sync.payload import Payload, PayloadEntry

BACKEND = "raylign"


@dataclass
class BaseInfo(WeightTransferInitInfo):
    """Place of the base."""

    base: str
    """Directory of the checkpoint that the engine has loaded."""
    quantization: Quantization | None = None
    """`model.quantization`."""


@dataclass
class VersionInfo(WeightTransferUpdateInfo):
    """Staged version to load."""

    version: int


@dataclass
class Loaded:
    """Result of one update."""

    bound: int = 0
    expected: int = 0
    algorithm: Algorithm = "xxh3"
    digests: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"merge": 0.0, "load": 0.0})


@dataclass(frozen=True)
class Part:
    """Changes of one part of a version."""

    targets: Targets
    changed: frozenset[str]
    """Checkpoint tensors."""
    modules: tuple[str, ...]
    """Modules that have to be reloaded for it, in the model's order."""


@dataclass
class Staged:
    """A version that can be loaded, and the part of it that is here."""

    version: int
    parts: list[Part]
    entries: tuple[tuple[PayloadEntry, ...], ...]
    """Of each part, as announced."""
    algorithm: Algorithm
    """Of the digests."""
    payload: Payload | None
    """None once it is loaded."""
    number: int = 0
    """Of the part that is here, or was the last."""

    @property
    def modules(self) -> list[str]:
        """Of all parts."""
        return [path for part in self.parts for path in part.modules]


class SyncTransferEngine(WeightTransferEngine):
    """Loads staged payloads through vLLM's layerwise reload."""

    init_info_cls = BaseInfo
    update_info_cls = VersionInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: BaseInfo) -> None:
        """Open the base and learn where its tensors are bound."""
        refuse_padded_experts(self.model)
        with set_current_vllm_config(self.vllm_config):
            # The checkpoint's own config: vLLM writes into the one that it holds ("deepseek_yarn" as a kind
            # of rope, for one), and transformers does not know what it writes.
            config = AutoConfig.from_pretrained(
                init_info.base, trust_remote_code=self.model_config.trust_remote_code
            )
            base = base_weights(init_info.base, config, init_info.quantization, self.model_config.dtype)
            self._bindings, elements = record_bindings(self.model, self.model_config, base.shapes)
            self._merger = Merger(base, config, self.model_config.dtype)
        self._shapes = base.shapes
        self.held = {name: [elements[name], tensor.numel()] for name, tensor in base.shapes.items()}
        """Checkpoint tensor -> how many of its elements this process holds, and how many it has."""
        self.unbound: frozenset[str] = frozenset()
        """Checkpoint tensors that the workers of this engine don't hold whole, all together."""
        self._order = {path: i for i, (path, _) in enumerate(self.model.named_modules())}
        self._staged: Staged | None = None
        self._reader = Reader({})
        self._threads = 1
        """Tensors that are merged or packed at a time."""
        self.loaded = Loaded()

    def stage(self, payload: Payload) -> None:
        """Keep a payload for the next update, if it can be loaded.

        Raises:
            RunFailure: it names what the base or the engine lacks, shapes or a dtype that are others, or part
                of a group.
        """
        manifest = payload.manifest
        if manifest.payload == "lora":
            raise refusal("this engine was loaded without LoRA slots, and was sent a payload 'lora'")
        entries = (manifest.entries, *manifest.later)
        later = [{entry.name: {entry.name: entry.shape} for entry in part} for part in manifest.later]
        parts = [self._part(targets) for targets in (self._merger.targets(payload), *later)]
        if manifest.payload == "merged":
            for part, of_part in zip(parts, entries):
                self._refuse_other_dtype(of_part)
                self._refuse_incomplete(part)
        if lacking := [name for part in parts for name in sorted(part.changed & self.unbound)]:
            raise refusal(f"bound to no module of the engine: {lacking[:3]}")
        self._staged = Staged(manifest.version, parts, entries, manifest.algorithm, payload)

    def stage_later(self, payload: Payload) -> None:
        """Keep the next part of the version that is being loaded, in place of the one before.

        Raises:
            RunFailure: it is not what was announced.
        """
        staged = self._the_staged(payload.manifest.version)
        number = staged.number + 1
        if number >= len(staged.parts) or payload.manifest.entries != staged.entries[number]:
            raise RunFailure("rollout", "commit", f"part {number + 1} has other tensors than was announced")
        staged.payload, staged.number = payload, number

    def _part(self, targets: Targets) -> Part:
        self._refuse_foreign(targets)
        changed = frozenset(name for names in targets.values() for name in names)
        modules = [path for path, names in self._bindings.items() if changed.intersection(names)]
        return Part(targets, changed, tuple(sorted(modules, key=self._order.__getitem__)))

    def discard(self) -> None:
        """Forget what is staged."""
        self._staged = None

    def start_weight_update(self) -> None:
        """Point of no return: parameters lose their storage until they are loaded."""
        if self._staged is None:
            raise RunFailure("rollout", "commit", "nothing is staged")
        algorithm = self._staged.algorithm
        self.loaded = Loaded(algorithm=algorithm)
        self._reader = Reader(self._bindings, algorithm)
        # Each one as soon as it is loaded, while it is in the cache.
        self._reader.watch(self._modules(), then=lambda module: repack_experts([module], self._threads))
        with without_reload_warnings():
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: VersionInfo) -> None:
        """Merge and load, module by module: no more than one module is held twice."""
        staged, seconds = self._the_staged(update_info.version), self.loaded.seconds
        began, merging = time.monotonic(), seconds["merge"]
        if staged.payload is None:
            raise RunFailure("rollout", "commit", f"part {staged.number + 1} is loaded already")
        # Tensors are too small to be split: two threads wait for each other at each of its copies and sums,
        # for milliseconds where the trainer's threads want the cores as well.
        with one_thread() as self._threads:
            self.model.load_weights(self._merged(staged.payload, staged.parts[staged.number]))
        staged.payload = None
        seconds["load"] += time.monotonic() - began - (seconds["merge"] - merging)

    def _merged(self, payload: Payload, part: Part) -> Iterator[tuple[str, torch.Tensor]]:
        for path in part.modules:
            began = time.monotonic()
            names = list(self._bindings[path])
            tensors = self._merger.merged(payload, names, part.targets, self._threads)
            self.loaded.seconds["merge"] += time.monotonic() - began
            self.loaded.expected += len(tensors)
            self._reader.hand(tensors)
            yield from tensors.items()

    def finish_weight_update(self) -> None:
        """Put the model together again, read back what is bound.

        Raises:
            InvariantViolation: bound values are not those that were handed over.
        """
        began = time.monotonic()
        modules = self._modules()
        with without_reload_warnings(), one_thread() as self._threads:
            finalize_layerwise_reload(self.model, self.model_config)
            self._reader.finish(modules)
        self.loaded.digests = self._reader.digests
        self.loaded.bound = len(self._reader.digests)
        self.loaded.seconds["load"] += time.monotonic() - began
        self._staged = None
        if wrong := [*self._reader.differing, *self._reader.unbound]:
            raise InvariantViolation(
                "rollout", "commit", f"{len(wrong)} tensors are not bound as they were loaded: {wrong[:3]}"
            )

    def shutdown(self) -> None:
        """Nothing is held but what is staged."""
        self._staged = None

    def _the_staged(self, version: int) -> Staged:
        if self._staged is None or self._staged.version != version:
            raise RunFailure("rollout", "commit", f"version {version} is not staged")
        return self._staged

    def _modules(self) -> dict[str, torch.nn.Module]:
        assert self._staged is not None
        return {path: self.model.get_submodule(path) for path in self._staged.modules}

    def _refuse_foreign(self, targets: Targets) -> None:
        for source, names in targets.items():
            for name, shape in names.items():
                there = self._shapes.get(name)
                if there is None:
                    raise refusal(f"{source} is bound to no module: the base has no {name}")
                if tuple(there.shape) != shape:
                    raise refusal(f"{source} makes {name} {shape}, the base has {tuple(there.shape)}")

    def _refuse_other_dtype(self, entries: tuple[PayloadEntry, ...]) -> None:
        own = str(self.model_config.dtype).removeprefix("torch.")
        other = {entry.name: entry.dtype for entry in entries if entry.dtype != own}
        for name, dtype in other.items():
            raise refusal(f"{name} is {dtype}, the engine computes in {own}")

    def _refuse_incomplete(self, part: Part) -> None:
        for path in part.modules:
            if missing := sorted(self._bindings[path].keys() - part.changed):
                raise refusal(f"half a fused group: {path} also needs {', '.join(missing[:3])}")


def refusal(reason: str) -> RunFailure:
    """Reason for not staging a payload; the engine goes on with what it has."""
    return RunFailure("rollout", "stage", reason)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SyncTransferEngine)
