"""A vLLM engine that holds one model's merged weights and generates from token ids.

An engine serves one set of weights. `load` ends it and starts a fresh one in the same process: 0.4 s for a
tiny model, no more than reading the checkpoint for a large one, and with none of the traps of weights that
are exchanged in place. A trainer that needs that every step loads it `updatable`; `actors/sync` knows the
traps and proves each exchange.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches.generations import Generations, SamplingSpec, sample_seed
from actors.batches.slices import Asked, Parsing, Progress, Said
from actors.cluster.environment import SOCKETS
from actors.cluster.scratch import Scratch, unfit
from actors.cluster.turn_plan import both_awake
from actors.errors import InvariantViolation, RunFailure, UserError
from actors.rollout.spec import EngineSpec
from actors.rollout.vllm.processes import EngineProcesses
from actors.rollout.vllm.requests import (
    Stepper,
    sample_of,
    sampling_params,
    scores_of,
    scoring_params,
    token_versions,
)
from actors.rollout.vllm.settings import (
    ArchitectureInUse,
    building_models,
    llm_settings,
    no_collections,
    read_config,
    without_remains,
)
from actors.rollout.vllm.sleeping import fall_asleep, is_asleep, wake

if TYPE_CHECKING:
    from vllm import LLM

    from actors.models.spec import Quantization
    from actors.rollout.weight_updater import WeightUpdater
    from actors.sync.payload import Payload
    from actors.sync.spec import SlotSpec

__all__ = ["EngineSpec", "Generations", "RolloutEngine", "SamplingSpec", "sample_seed"]


SOCKET_ROOM = len(f"/{uuid.UUID(int=0)}")
"""Bytes of the name of one of vLLM's sockets."""


@dataclass
class _Sliced:
    """A call whose samples are drawn in slices."""

    since: float
    """When the last slice ended, or the first one began (time.monotonic())."""
    names: dict[int, str] = field(default_factory=dict)
    """Sample that has not ended -> its request."""
    hand_back: bool = False
    """As `Asked` says, as is the next."""
    parsing: Parsing | None = None
    tools: dict[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Of samples with tools of their own."""


class RolloutEngine:
    """One engine in this process. Empty until `load`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.label = ""
        self.max_model_len = 0
        self._llm: LLM | None = None
        self._updater: WeightUpdater | None = None
        self._asleep = False
        self._stepper: Stepper
        self._calls: dict[int, _Sliced] = {}
        """By key."""
        self._in_use = ArchitectureInUse()
        self._processes = EngineProcesses()
        if SOCKETS not in os.environ and unfit(Path(tempfile.gettempdir()), SOCKET_ROOM, more=0):
            os.environ[SOCKETS] = str(Scratch(SOCKET_ROOM).path)

    def load(
        self,
        base: str,
        adapter: str | None = None,
        label: str = "",
        updatable: bool = False,
        slots: SlotSpec | None = None,
    ) -> dict[str, float]:
        """Serve `base`, with `adapter` added to it, in place of what was served before.

        An adapter directory as `base` stands for itself on the base that it names. With `updatable` the
        base alone is served, at version -1, and a trainer brings new versions (`weights`): of its weights,
        or, with `slots`, of LoRA beside them. Returns seconds of merge and engine start.

        Raises:
            UserError: base or adapter can't be used.
        """
        if updatable:
            return self._load_updatable(base, label, slots)
        if adapter is None and (Path(base) / "adapter_config.json").is_file():
            return self._load_adapted(None, base, label)
        if adapter is not None:
            return self._load_adapted(base, adapter, label)
        return {"merge": 0.0, "engine": self._start(base, label, quantization=self.spec.quantization)}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec, seeds: Sequence[int] | None = None
    ) -> Generations:
        """`sampling.n` samples of each prompt (token ids), in prompt order.

        `seeds`: one per sample. The same seed gives the same tokens whatever else is in the batch. None
        takes hashes of `sampling.seed`, prompt and sample number.

        Raises:
            UserError: a prompt leaves no room for an answer.
            RunFailure: nothing is loaded.
        """
        began = time.monotonic()
        outputs = self._outputs(self._ask(prompts, sampling, seeds))
        return self._made(outputs, sampling.n, time.monotonic() - began)

    def advance(
        self, key: int, seconds: float | None, asked: Asked | None = None, give_back: Sequence[int] = ()
    ) -> Progress:
        """Go on with the samples of a call, named `key`, for about `seconds` (None: until all have ended), in
        which other calls' samples go on with them. Between two slices other work comes in, also new weights.

        Args:
            asked: samples to begin.
            give_back: numbers of samples to forget, where they have not ended.

        Raises: as `generate`.
        """
        self._running("generate")
        call = self._calls.setdefault(key, _Sliced(time.monotonic()))
        returned = [n for n in give_back if n in call.names and not self._stepper.has_ended(call.names[n])]
        self._drop([call.names.pop(number) for number in returned])
        if asked is not None:
            names = self._ask(asked.prompts, asked.sampling, asked.seeds, asked.max_tokens)
            call.names |= dict(zip(asked.numbers, names, strict=True))
            call.hand_back, call.parsing = asked.hand_back, asked.parsing
            own = zip(asked.numbers, asked.tools or [], strict=False)
            call.tools |= {number: tools for number, tools in own if tools is not None}
        work = self._stepper.run(list(call.names.values()), seconds, any_ended=call.hand_back)
        ended = [number for number, name in call.names.items() if self._stepper.has_ended(name)]
        outputs = self._stepper.take([call.names.pop(number) for number in ended])
        since, call.since = call.since, time.monotonic()
        if not call.names:
            del self._calls[key]
        return Progress(
            ended=ended,
            made=self._made(outputs, 1, 0.0) if ended else None,
            so_far={number: self._stepper.so_far(name) for number, name in call.names.items()},
            returned=returned,
            seconds=call.since - since,
            work=work,
            said=self._said(outputs, call.parsing, [call.tools.pop(number, None) for number in ended]),
        )

    def check_parser(self, parsing: Parsing) -> str:
        """Reason for which vLLM's tool parser of this name can't be used with this model; empty: it can."""
        from actors.rollout.vllm.tool_calls import parser_problem

        return parser_problem(self._loaded("load").get_tokenizer(), parsing)

    def score_tokens(
        self, token_ids: Sequence[Sequence[int]], starts: Sequence[int], version: int | None = None
    ) -> list[np.ndarray]:
        """float64 (tokens from `start` on,) per sequence: log-probabilities of its tokens, at temperature 1.

        Args:
            token_ids: sequences that leave at least one of the model's positions free.
            starts: per sequence, the first token that counts; at least 1, as the first has nothing before it.
            version: the one by which they are scored, if that is staged in a LoRA slot; None: the served one.

        Raises:
            RunFailure: nothing is loaded, or another version.
        """
        self._running("score_tokens")
        self._check_lengths(token_ids)
        requests = [{"prompt_token_ids": list(map(int, ids))} for ids in token_ids]
        slot = None if self._updater is None else self._updater.slot(version)
        outputs = self._outputs(self._stepper.add(requests, scoring_params(), slot))
        return [
            scores_of(output.prompt_logprobs, ids, start)
            for output, ids, start in zip(outputs, token_ids, starts, strict=True)
        ]

    # --- Turns with a trainer on the same device --------------------------------------------------

    def sleep(self) -> bool:
        """Give the device's memory back (`vllm.sleeping`); what is loaded stays so. True if it is awake
        afterwards."""
        if self._llm is not None and not self._asleep:
            fall_asleep(self._llm)
            self._asleep = True
        return self._llm is not None and not is_asleep(self._llm)

    def wake_up(self) -> bool:
        """Take the device: weights are as they were, the cache is empty. True if it is awake afterwards."""
        if self._llm is not None and self._asleep:
            wake(self._llm)
            self._asleep = False
        return self._llm is None or not is_asleep(self._llm)

    # --- Weights that a trainer keeps up to date --------------------------------------------------

    @property
    def weights(self) -> WeightUpdater:
        """Versions of this engine's weights: what a trainer calls.

        Raises:
            RunFailure: the engine was not loaded as updatable.
        """
        if self._updater is None:
            raise RunFailure("rollout", "sync", "this engine can't be updated", "load it with updatable=True")
        self._refuse_asleep()
        return self._updater

    @property
    def version(self) -> int:
        """Version that is served; -1 is the base."""
        return self.weights.version

    def expert_load(self) -> np.ndarray | None:
        """int64 (layers, experts): tokens that each expert got in this engine since the last call.

        None where it can't be counted: dense models, GPUs, engines that can't be updated.
        """
        if self._updater is None:
            return None
        from actors.rollout.vllm.worker_calls import ask, unpacked

        # Counts of what was generated, also when it sleeps by now.
        load = ask(self._loaded("expert_load"), "expert_load")[0]
        return None if load is None else unpacked(load)

    def make_updater(self, llm: LLM, base: str) -> WeightUpdater:
        """Versions of the weights of `llm`, which has loaded the checkpoint in directory `base`."""
        from actors.rollout.weight_updater import WeightUpdater

        return WeightUpdater(llm, base, self.spec.dtype, self.spec.quantization)

    def make_slot_updater(self, llm: LLM, base: str) -> WeightUpdater:
        """Versions in the LoRA slots of `llm`, beside the checkpoint in directory `base`."""
        from actors.rollout.slot_updater import SlotUpdater

        return SlotUpdater(llm, base, self.spec.dtype)

    def unload(self) -> None:
        """Give the engine's memory back."""
        if self._updater is not None:
            self._updater.close()
        llm, self._llm, self._updater, self.label = self._llm, None, None, ""
        self._asleep = False
        self._in_use.leave()
        if llm is None:
            return
        self._processes.release()
        with no_collections():
            llm.llm_engine.engine_core.shutdown()
            del llm
        gc.collect()

    close = unload

    def _load_adapted(self, base: str | None, adapter: str, label: str) -> dict[str, float]:
        """Serve an adapter: brought into its loaded base or, where that can't be, merged on disk."""
        from actors.rollout.adapted import commit_adapted, find_adapted

        with building_models():
            adapted = find_adapted(base, adapter)
        payload = adapted.payload
        if payload is not None:
            try:
                seconds, updater = self._stage_in_place(adapted.base, payload, label)
            except InvariantViolation:
                raise
            except (UserError, RunFailure) as error:
                adapted = replace(adapted, payload=None, why_not=str(error))
                self.unload()
            else:
                try:
                    return {"merge": commit_adapted(updater, payload), "engine": seconds}
                except RunFailure:
                    self.unload()
                    raise
        print(f"{label or adapter}: served from a merged copy on disk: {adapted.why_not}", flush=True)
        return self._load_merged(base, adapter, label)

    def _stage_in_place(self, base: str, payload: Payload, label: str) -> tuple[float, WeightUpdater]:
        """Seconds of the engine's start, and its versions, of which the payload's is staged.

        Raises:
            UserError, RunFailure: this engine can't take it.
        """
        from actors.rollout.weight_updater import WeightUpdater, engine_settings

        seconds = self._start(base, label, engine_settings())
        assert self._llm is not None
        updater = WeightUpdater(self._llm, base, self.spec.dtype)
        updater.stage_payload(payload)
        return seconds, updater

    def _load_merged(self, base: str | None, adapter: str, label: str) -> dict[str, float]:
        from actors.models.lora.merge import merge_adapter

        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="raylign-merged-") as scratch:
            merged = Path(scratch) / "model"
            with building_models():
                merge_adapter(base, adapter, merged, dtype=self.spec.dtype, check=False)
            seconds = time.monotonic() - began
            return {"merge": seconds, "engine": self._start(str(merged), label)}

    def _load_updatable(self, base: str, label: str, slots: SlotSpec | None) -> dict[str, float]:
        from actors.models.base.loading import local_base_dir, resolve_base
        from actors.models.spec import ModelSpec
        from actors.rollout.slot_updater import slot_settings
        from actors.rollout.vllm.router_capture import capture_settings, keep_experts
        from actors.rollout.weight_updater import engine_settings

        # Whether an architecture without a row may run was decided before any engine was started.
        spec = ModelSpec(base=base, trust_remote_code=self.spec.trust_remote_code, allow_untested=True)
        resolved = resolve_base(spec).checked()
        directory = str(local_base_dir(resolved.base_path))
        keeps = self.spec.enable_return_routed_experts
        settings = engine_settings() if slots is None else slot_settings(slots, resolved.config)
        settings |= capture_settings() if keeps else {}
        seconds = self._start(directory, label or base, settings, self.spec.quantization)
        assert self._llm is not None
        try:
            make = self.make_updater if slots is None else self.make_slot_updater
            self._updater = make(self._llm, directory)
            if keeps:
                keep_experts(self._llm)
        except Exception:
            self.unload()
            raise
        return {"merge": 0.0, "engine": seconds}

    def _said(
        self,
        outputs: Sequence[Any],
        parsing: Parsing | None,
        tools: Sequence[Sequence[Mapping[str, Any]] | None],
    ) -> list[Said] | None:
        if parsing is None:
            return None
        from actors.rollout.vllm.tool_calls import said

        tokenizer = self._loaded("generate").get_tokenizer()
        ways = [
            parsing if own is None else parsing._replace(tools=own, parser=parsing.parser if own else None)
            for own in tools
        ]
        return [
            said(tokenizer, output.outputs[0].token_ids, way)
            for output, way in zip(outputs, ways, strict=True)
        ]

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        seeds: Sequence[int] | None,
        max_tokens: Sequence[int] | None = None,
    ) -> list[str]:
        """Give the engine `sampling.n` requests of each prompt; their names."""
        self._running("generate")
        self._check_lengths(prompts)
        if seeds is None:
            seeds = [
                sample_seed(sampling.seed, 0, p, s) for p in range(len(prompts)) for s in range(sampling.n)
            ]
        requests = [{"prompt_token_ids": list(map(int, ids))} for ids in prompts for _ in range(sampling.n)]
        if len(seeds) != len(requests):
            raise ValueError(f"{len(seeds)} seeds for {len(requests)} samples")
        slot = None if self._updater is None else self._updater.slot()
        limits: Sequence[int | None] = max_tokens or [None] * len(seeds)
        params = [sampling_params(sampling, seed, most) for seed, most in zip(seeds, limits, strict=True)]
        return self._stepper.add(requests, params, slot)

    def _outputs(self, names: Sequence[str]) -> list[Any]:
        """Outputs of requests, once all of them have ended."""
        self._stepper.run(names)
        return self._stepper.take(names)

    def _drop(self, names: Sequence[str]) -> None:
        if not names:
            return
        self._stepper.drop(names)
        if self._updater is not None and self.spec.enable_return_routed_experts:
            from actors.rollout.vllm.router_capture import forget_experts

            assert self._llm is not None
            forget_experts(self._llm, names)

    def _made(self, outputs: Sequence[Any], n: int, seconds: float) -> Generations:
        ended = [output.outputs[0] for output in outputs]
        made = Generations.of([sample_of(one) for one in ended], n, self.label, seconds)
        if self._updater is None or not ended:
            return made
        versions = [token_versions(output) for output in outputs]
        return self._with_experts(replace(made, token_versions=np.concatenate(versions)), outputs)

    def _with_experts(self, made: Generations, outputs: Sequence[Any]) -> Generations:
        """With the experts of every position, where a trainer wants them."""
        from actors.rollout.vllm.router_capture import routed_experts

        if self._updater is None or not outputs or not self.spec.enable_return_routed_experts:
            return made
        assert self._llm is not None
        return made.with_experts(routed_experts(self._llm, outputs))

    def _running(self, phase: str) -> LLM:
        self._refuse_asleep()
        return self._loaded(phase)

    def _refuse_asleep(self) -> None:
        if self._asleep:
            raise both_awake("rollout", "it was asked to compute while it sleeps and the policy is awake")

    def _loaded(self, phase: str) -> LLM:
        if self._llm is None:
            raise RunFailure("rollout", phase, "no model is loaded")
        if self._updater is not None:
            self._updater.refuse_lost(phase)
        return self._llm

    def _start(
        self,
        model: str,
        label: str,
        more: Mapping[str, Any] | None = None,
        quantization: Quantization | None = None,
    ) -> float:
        """`quantization`: of the base; a merged model has the dequantised weights in its files."""
        from vllm import LLM

        from actors.rollout.vllm.base_loader import loader_settings

        began = time.monotonic()
        self.unload()
        config = read_config(model, self.spec)
        settings = llm_settings(config, self.spec) | loader_settings(config, quantization) | dict(more or {})
        with no_collections(), without_remains():
            self._in_use.enter(config)
            self._llm = LLM(model=model, **settings)
        self._processes.watch()
        self._stepper, self._calls = Stepper(self._llm), {}
        self.label, self.max_model_len = label or model, settings["max_model_len"]
        return time.monotonic() - began

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        too_long = [i for i, ids in enumerate(prompts) if len(ids) >= self.max_model_len]
        if too_long:
            i = too_long[0]
            raise UserError(
                f"{len(too_long)} of {len(prompts)} prompts leave no room for an answer in the model's "
                f"{self.max_model_len} positions (the first: prompt {i} with {len(prompts[i])} tokens)"
            )
