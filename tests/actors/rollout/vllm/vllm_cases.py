"""Tiny policies with their payloads, and engines with one planted fault each, for tests with a real vLLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.cluster.worker_group import WorkerGroup
from actors.models.base.loading import load_base
from actors.models.lora.adapters import adapter_parameters, attach_lora, role
from actors.models.lora.merge import adapter_factors, merged_state, write_model
from actors.models.moe.router_stats import RouterStats
from actors.models.spec import LoraSpec, ModelSpec, TargetGroup
from actors.rollout.engine import EngineSpec, RolloutEngine, SamplingSpec
from actors.rollout.parity import ParityReport, probe_engine
from actors.rollout.remote import ROLLOUT
from actors.rollout.weight_updater import WeightUpdater
from actors.sync.channel import Channel, Listener
from actors.sync.digests import Algorithm, digest_of
from actors.sync.payload import Payload, fused_groups_of, pack_adapter, pack_merged
from actors.trainer.merged_weights import HostMerge
from tests.actors.models.tiny_models import GROUPS, tiny_model
from tests.architecture_results import record

GENERATOR = np.random.default_rng(7)
LONG = GENERATOR.integers(5, 250, 300).tolist()
"""A prompt of more than one block of vLLM's prefix cache."""
SEQUENCES = [LONG, *(GENERATOR.integers(5, 250, n).tolist() for n in (12, 33, 47))]
STARTS = [250, 1, 3, 10]
ADAPTER, MERGED = "adapter", "merged"
PART_BYTES = 50_000
CHANNEL_S = 60.0


def write_base(path: Path, architecture: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A random base of an architecture, with random norms, biases and router corrections."""
    from actors.models.tiny import byte_tokenizer

    tiny_model(architecture, **overrides).to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_untested_base(path: Path) -> Path:
    """A random base of an architecture that vLLM and transformers know and the table lacks."""
    from transformers import AutoModelForCausalLM, GraniteConfig

    from actors.models.tiny import byte_tokenizer

    config = GraniteConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        initializer_range=0.05,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


class Policy:
    """A policy with LoRA on all that its architecture has, whose weights change when told to."""

    def __init__(
        self, base: Path, architecture: str, targets: list[TargetGroup] | None = None, **model: Any
    ) -> None:
        self.base, self.architecture = base, architecture
        lora = LoraSpec(r=4, targets=targets or GROUPS[architecture])
        self.peft: Any = attach_lora(load_base(ModelSpec(base=str(base), **model)), lora, "policy").eval()

    def change(self, seed: int) -> None:
        """Other weights, whose effect is far beyond rounding."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter_parameters(self.peft, "policy").items():
                std = 0.02 if "lora_B" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    @property
    def dtype(self) -> str:
        """Of the base in the trainer."""
        return str(self.peft.get_base_model().dtype).removeprefix("torch.")

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

    def payload(
        self,
        kind: str,
        version: int,
        dtype: torch.dtype = torch.float32,
        algorithm: Algorithm = "xxh3",
    ) -> Payload:
        if kind == ADAPTER:
            return pack_adapter(version, self.dtype, adapter_factors(self.peft, "policy"), algorithm)
        state, base = self.state(dtype), merged_state(self.peft)
        touched = [name for name in state if not torch.equal(state[name], base[name].to(dtype))]
        return pack_merged(
            version,
            self.dtype,
            {name: state[name] for name in fused_groups_of(touched, state)},
            algorithm=algorithm,
        )

    def digests(
        self, names: Any, dtype: torch.dtype = torch.float32, algorithm: Algorithm = "xxh3"
    ) -> dict[str, str]:
        state = self.state(dtype)
        return {name: digest_of(state[name], algorithm) for name in names}

    def write(self, path: Path, dtype: torch.dtype) -> Path:
        """The merged model as a checkpoint."""
        write_model(self.peft, self.state(dtype), path, self.base)
        return path


def with_tensors(payload: Payload, change: Any) -> Payload:
    """A merged payload whose tensors `change` has edited: what a broken sender would send."""
    tensors = {name: tensor.clone() for (name, _), tensor in payload.tensors().items()}
    change(tensors)
    return pack_merged(payload.manifest.version, payload.manifest.base_dtype, tensors)


def push(engine: WorkerGroup, payload: Payload, keep: bool = False) -> Any:
    """Stage and commit on one engine, without a channel."""
    engine.call_rank(0, "weights.stage_payload", payload, phase="sync")
    return engine.call_rank(0, "weights.commit", payload.manifest.version, keep, phase="sync")


def push_parts(engine: WorkerGroup, policy: Policy, version: int) -> Any:
    """Merged weights in parts of whole groups, of which the first is staged, over a channel."""
    merge = HostMerge(policy.peft.get_base_model(), adapter_factors(policy.peft, "policy"), "float32")
    first, *later = merge.parts(limit_bytes=PART_BYTES)
    assert later
    outlines = [merge.outline(part) for part in later]
    channel = connect(engine)
    staging = engine.submit_rank(0, "weights.stage", version, phase="sync")
    channel.send(pack_merged(version, "float32", merge.merged(first), outlines))
    staging.result()
    committing = engine.submit_rank(0, "weights.commit", version, phase="sync")
    for part in later:
        channel.send(pack_merged(version, "float32", merge.merged(part)))
    return committing.result()


def connect(engine: WorkerGroup) -> Channel:
    """The trainer's end of a channel to an engine."""
    listener = Listener("127.0.0.1", CHANNEL_S)
    engine.call_rank(0, "weights.connect", listener.address, CHANNEL_S, phase="sync")
    opening = engine.submit_rank(0, "weights.open_channel", phase="sync")
    channel = listener.accept("engine")
    opening.result()
    return channel


def scores(engine: WorkerGroup) -> list[np.ndarray]:
    found: list[np.ndarray] = engine.call_rank(0, "score_tokens", SEQUENCES, STARTS, phase="sync")
    return found


def off(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Largest difference."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def check_ten_syncs(rollout: WorkerGroup, policy: Policy) -> None:
    """Five adapter and five merged versions: after each the engine holds and computes the policy's."""
    before, worst = scores(rollout), {ADAPTER: 0.0, MERGED: 0.0}
    for version in range(10):
        policy.change(seed=version)
        kind = ADAPTER if version % 2 else MERGED
        in_parts = kind == MERGED and version % 4 == 2
        report = (
            push_parts(rollout, policy, version) if in_parts else push(rollout, policy.payload(kind, version))
        )
        assert bool(report.part_digests) == in_parts
        assert report.bound == report.expected > 0
        now = scores(rollout)
        # The change is a thousand times what is allowed: an engine that kept its weights would be seen.
        assert off(now, before) > 1e-2
        difference = off(now, policy.logps(SEQUENCES, STARTS))
        assert difference < 1e-5
        before, worst[kind] = now, max(worst[kind], difference)
        read = rollout.call_rank(0, "weights.readback", version).digests
        assert len(read) == report.expected
        assert read == policy.digests(read)
    record(policy.architecture, **worst)


def check_fresh_equal(rollout: WorkerGroup, policy: Policy, kind: str, scratch: Path) -> None:
    """In bfloat16, an engine after two versions is to the bit one that has loaded the merged checkpoint."""
    for version in range(2):
        policy.change(seed=version)
        push(rollout, policy.payload(kind, version, torch.bfloat16))
    updated = scores(rollout), samples(rollout, [LONG, *SEQUENCES[1:]])
    merged = policy.write(scratch / "merged", torch.bfloat16)
    rollout.call_rank(0, "load", str(merged), phase="load")
    fresh = scores(rollout), samples(rollout, [LONG, *SEQUENCES[1:]])
    record(policy.architecture, fresh=off(updated[0], fresh[0]))
    assert off(updated[0], fresh[0]) == 0.0
    np.testing.assert_array_equal(updated[1].token_ids, fresh[1].token_ids)
    np.testing.assert_array_equal(updated[1].logprobs, fresh[1].logprobs)


def samples(rollout: WorkerGroup, prompts: list[list[int]]) -> Any:
    """Two samples of eight tokens for each prompt."""
    sampling = SamplingSpec(max_tokens=8, n=2)
    return rollout.call_rank(0, "generate", prompts, sampling, list(range(2 * len(prompts))))


def updatable(process: WorkerGroup, base: Path, dtype: str = "float32", what: str = ROLLOUT) -> WorkerGroup:
    """An updatable engine on `base`."""
    process.build(what, EngineSpec(max_num_seqs=16, max_model_len=512, dtype=dtype)).result()  # type: ignore[arg-type]
    process.call_rank(0, "load", str(base), updatable=True, phase="load")
    return process


class DisklessEngine(RolloutEngine):
    """Has no room for a merged copy."""

    def _load_merged(self, *args: Any) -> Any:
        raise OSError("no space left on device")


class ShortEngine(DisklessEngine):
    """Binds a tensor less than it was handed."""

    def _stage_in_place(self, *args: Any) -> Any:
        seconds, updater = super()._stage_in_place(*args)
        real = updater.commit

        def commit(version: int) -> Any:
            report = real(version)
            return dataclasses.replace(report, bound=report.bound - 1)

        updater.commit = commit  # type: ignore[method-assign]
        return seconds, updater


class UnpackedEngine(RolloutEngine):
    def make_updater(self, llm: Any, base: str) -> WeightUpdater:
        return UnpackedUpdater(llm, base, self.spec.dtype)


class UnpackedUpdater(WeightUpdater):
    """Leaves reloaded experts in the checkpoint's layout."""

    def commit(self, version: int, keep: bool = False) -> Any:
        from actors.rollout.vllm import weight_transfer as vllm_side

        real, vllm_side.repack_experts = vllm_side.repack_experts, lambda modules, threads: 0
        try:
            return super().commit(version, keep)
        finally:
            vllm_side.repack_experts = real


def probe_unpacked(spec: EngineSpec, model: ModelSpec) -> ParityReport:
    """A parity probe of an `UnpackedEngine`."""
    return probe_engine(UnpackedEngine(spec), model)


class BreakingEngine(RolloutEngine):
    def make_updater(self, llm: Any, base: str) -> WeightUpdater:
        return BreakingUpdater(llm, base, self.spec.dtype)


class BreakingUpdater(WeightUpdater):
    """Loads one module of a version, then fails."""

    def commit(self, version: int, keep: bool = False) -> Any:
        from actors.rollout.vllm import weight_transfer as vllm_side

        engine = vllm_side.SyncTransferEngine
        real = engine.receive_weights

        def break_off(self: Any, update_info: Any) -> None:
            parts = self._staged.parts
            parts[0] = dataclasses.replace(parts[0], modules=parts[0].modules[:1])
            real(self, update_info)
            raise OSError("no space left on device")

        engine.receive_weights = break_off
        try:
            return super().commit(version, keep)
        finally:
            engine.receive_weights = real


class DroppingEngine(RolloutEngine):
    def make_updater(self, llm: Any, base: str) -> WeightUpdater:
        return DroppingUpdater(llm, base, self.spec.dtype)


class DroppingUpdater(WeightUpdater):
    """A loader that loses a tensor without a word, as vLLM's do for names that they don't know."""

    def commit(self, version: int, keep: bool = False) -> Any:
        from actors.rollout.vllm import weight_transfer as vllm_side

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
            return super().commit(version, keep)
        finally:
            engine.receive_weights = real


class UnaidedEngine(RolloutEngine):
    """Leaves out the workarounds of `without`."""

    without: frozenset[str] = frozenset()

    def load(self, *args: Any, **kwargs: Any) -> Any:
        from actors.rollout.vllm import settings as vllm_settings

        real = vllm_settings.use_only
        vllm_settings.use_only = lambda names: real(n for n in names if n not in self.without)
        try:
            return super().load(*args, **kwargs)
        finally:
            vllm_settings.use_only = real


class NoGptOssLoaders(UnaidedEngine):
    without = frozenset({"gpt_oss_loaders"})


class NoRotaryFix(UnaidedEngine):
    without = frozenset({"rotary_queries_by_head"})


class NoRouterBias(UnaidedEngine):
    without = frozenset({"router_bias"})


class NoNamedLoaders(UnaidedEngine):
    without = frozenset({"named_loaders"})


class NoHeadBias(UnaidedEngine):
    without = frozenset({"phimoe_head_bias"})


class NoDbrxNames(UnaidedEngine):
    without = frozenset({"dbrx_expert_names"})
