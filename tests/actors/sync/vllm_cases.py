"""Tiny policies with their payloads, and engines with one planted fault each, for tests with a real vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.group import ActorGroup
from actors.models.adapters import adapter_parameters, attach_lora, role
from actors.models.loading import load_base
from actors.models.merge import adapter_factors, merged_state, write_model
from actors.models.moe import RouterStats
from actors.models.spec import LoraSpec, ModelSpec
from actors.rollout import RolloutEngine
from actors.sync.payload import Payload, closure, digest_of, pack_adapter, pack_merged
from tests.actors.models.conftest import GROUPS, tiny_config_of

GENERATOR = np.random.default_rng(7)
LONG = GENERATOR.integers(5, 250, 300).tolist()
"""A prompt of more than one block of vLLM's prefix cache."""
SEQUENCES = [LONG, *(GENERATOR.integers(5, 250, n).tolist() for n in (12, 33, 47))]
STARTS = [250, 1, 3, 10]
ADAPTER, MERGED = "adapter", "merged"


def write_base(path: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random base of an architecture."""
    from transformers import AutoModelForCausalLM

    from actors.models.tiny import byte_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config_of(architecture))
    model.to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


class Policy:
    """A policy with LoRA on all that its architecture has, whose weights change when told to."""

    def __init__(self, base: Path, architecture: str) -> None:
        self.base = base
        # glm4_moe's router has a bias that vLLM doesn't reload: an engine refuses to update that router.
        groups = [g for g in GROUPS[architecture] if (architecture, g) != ("glm4_moe", "router")]
        lora = LoraSpec(r=4, targets=groups)
        self.peft: Any = attach_lora(load_base(ModelSpec(base=str(base))), lora, "policy").eval()

    def change(self, seed: int) -> None:
        """Other weights, whose effect is far beyond rounding."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter_parameters(self.peft, "policy").items():
                std = 0.02 if "lora_B" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def logps(self, sequences: list[list[int]], starts: list[int]) -> list[np.ndarray]:
        """transformers' log-probability of each token from `start` on."""
        found = []
        for ids, start in zip(sequences, starts):
            with torch.no_grad(), role(self.peft, "policy"):
                logits = self.peft(input_ids=torch.tensor([ids])).logits[0].float()
            logps = logits[start - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(ids[start:])[:, None])[:, 0].numpy())
        return found

    def expert_load(self, sequences: list[list[int]]) -> np.ndarray:
        """(layers, experts): choices of transformers' routers."""
        routers = RouterStats(self.peft.get_base_model())
        for ids in sequences:
            with torch.no_grad(), role(self.peft, "policy"), routers.collecting():
                self.peft(input_ids=torch.tensor([ids]))
        return routers.read().load

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """All merged weights under checkpoint names."""
        return merged_state(self.peft, "policy", dtype)

    def payload(self, kind: str, version: int, dtype: torch.dtype = torch.float32) -> Payload:
        if kind == ADAPTER:
            return pack_adapter(version, "float32", adapter_factors(self.peft, "policy"))
        state, base = self.state(dtype), merged_state(self.peft)
        touched = [name for name in state if not torch.equal(state[name], base[name].to(dtype))]
        return pack_merged(version, "float32", {name: state[name] for name in closure(touched, state)})

    def digests(self, names: Any, dtype: torch.dtype = torch.float32) -> dict[str, str]:
        state = self.state(dtype)
        return {name: digest_of(state[name]) for name in names}

    def write(self, path: Path, dtype: torch.dtype) -> Path:
        """The merged model as a checkpoint."""
        write_model(self.peft, self.state(dtype), path, self.base)
        return path


def with_tensors(payload: Payload, change: Any) -> Payload:
    """A merged payload whose tensors `change` has edited: what a broken sender would send."""
    tensors = {name: tensor.clone() for (name, _), tensor in payload.tensors().items()}
    change(tensors)
    return pack_merged(payload.manifest.version, payload.manifest.base_dtype, tensors)


def push(engine: ActorGroup, payload: Payload) -> Any:
    """Stage and commit on one engine, without a channel."""
    engine.call_rank(0, "weights.stage_payload", payload, phase="sync")
    return engine.call_rank(0, "commit", payload.manifest.version, phase="sync")


def scores(engine: ActorGroup) -> list[np.ndarray]:
    found: list[np.ndarray] = engine.call_rank(0, "score_tokens", SEQUENCES, STARTS, phase="sync")
    return found


def off(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Largest difference."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


class UnpackedEngine(RolloutEngine):
    """Leaves reloaded experts in the checkpoint's layout."""

    def commit(self, version: int) -> Any:
        from actors.sync import vllm_side

        real, vllm_side.repack_experts = vllm_side.repack_experts, lambda modules: 0
        try:
            return super().commit(version)
        finally:
            vllm_side.repack_experts = real


class BreakingEngine(RolloutEngine):
    """Loads one module of a version, then fails."""

    def commit(self, version: int) -> Any:
        from actors.sync import vllm_side

        engine = vllm_side.SyncTransferEngine
        real = engine.receive_weights

        def break_off(self: Any, update_info: Any) -> None:
            staged = self._staged
            self._staged = vllm_side.Staged(staged.payload, staged.targets, staged.modules[:1])
            real(self, update_info)
            raise OSError("no space left on device")

        engine.receive_weights = break_off
        try:
            return super().commit(version)
        finally:
            engine.receive_weights = real


class DroppingEngine(RolloutEngine):
    """A loader that loses a tensor without a word, as vLLM's do for names that they don't know."""

    def commit(self, version: int) -> Any:
        from actors.sync import vllm_side

        engine = vllm_side.SyncTransferEngine
        real = engine.receive_weights

        def lose_one(self: Any, update_info: Any) -> None:
            load = self.model.load_weights
            self.model.load_weights = lambda weights: load((n, t) for n, t in weights if ".o_proj" not in n)
            try:
                real(self, update_info)
            finally:
                del self.model.load_weights

        engine.receive_weights = lose_one
        try:
            return super().commit(version)
        finally:
            engine.receive_weights = real
