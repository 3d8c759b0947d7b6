"""Requests to vLLM, a step of the engine at a time, and samples and scores from its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches.generations import SamplingSpec
from actors.batches.slices import Work
from actors.errors import RunFailure
from actors.sync.protocol import NO_VERSION

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest


LEAST_SLICE_S = 0.01
"""Seconds that an engine works on before it hands an ended sample back: a call of it costs 1 to 2 ms."""


def sampling_params(sampling: SamplingSpec, seed: int, max_tokens: int | None = None) -> SamplingParams:
    """Parameters of a request for one sample; its log-probability alone comes back with each token.
    `max_tokens`: in place of those of `sampling`."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=max_tokens or sampling.max_tokens,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=sampling.stop or None,
        stop_token_ids=sampling.stop_token_ids or None,
        # Greedy sampling needs no seed, and a generator per request costs time.
        seed=seed if sampling.temperature > 0 else None,
        logprobs=0,
        flat_logprobs=True,
        # Stop strings are looked for in text; nothing else needs it: samples are sent as token ids.
        detokenize=bool(sampling.stop),
    )


def scoring_params() -> SamplingParams:
    """Parameters of a request that scores the tokens of a prompt."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)


def scores_of(found: Any, ids: Sequence[int], start: int) -> np.ndarray:
    """float64 (tokens from `start` on,): from vLLM's `prompt_logprobs` of `ids`."""
    return np.array([found[i][int(ids[i])].logprob for i in range(start, len(ids))], dtype=np.float64)


def sample_of(output: Any) -> tuple[Sequence[int], Sequence[float], str]:
    """Token ids, their log-probabilities and why it ended, of one of vLLM's completions."""
    ids, values = list(output.token_ids), list(output.logprobs.logprobs)
    if len(ids) != len(values):
        raise RunFailure("rollout", "generate", f"{len(values)} log-probabilities for {len(ids)} tokens")
    return ids, values, output.finish_reason or "abort"


class Stepper:
    """The requests of one engine that are not finished, or not yet collected."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._ended: dict[str, Any] = {}

    @property
    def busy(self) -> bool:
        """True while requests are in the engine."""
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def add(
        self,
        requests: Sequence[Any],
        params: Sequence[SamplingParams] | SamplingParams,
        slot: LoRARequest | None = None,
    ) -> list[str]:
        """Give requests to the engine; their names, in order. `slot`: LoRA that they are computed with."""
        if not requests:
            return []
        states = self._llm.llm_engine.output_processor.request_states
        # enqueue answers with vLLM's inner names; outputs carry the outer ones.
        names = self._llm.enqueue(requests, params, lora_request=slot, use_tqdm=False)
        return [states[name].external_req_id for name in names]

    def run(self, names: Sequence[str], seconds: float | None = None, *, any_ended: bool = False) -> Work:
        """Step until these requests have ended, or with `any_ended` one of them has, for no more than
        `seconds` and one step."""
        engine, began = self._llm.llm_engine, time.monotonic()
        missing = set(names) - self._ended.keys()
        steps, tokens, waited = 0, 0, len(set(names))
        while missing:
            if not self.busy:
                raise RuntimeError(f"the engine has nothing to do, and {len(missing)} requests did not end")
            outputs = engine.step()
            steps, tokens = steps + 1, tokens + len(outputs)
            for output in outputs:
                if output.finished:
                    self._ended[output.request_id] = output
                    missing.discard(output.request_id)
            spent = time.monotonic() - began
            if seconds is not None and spent >= seconds:
                break
            if any_ended and len(missing) < waited and spent >= LEAST_SLICE_S:
                break
        return Work(steps, tokens, time.monotonic() - began)

    def take(self, names: Sequence[str]) -> list[Any]:
        """Outputs of these requests, which have ended, in order."""
        return [self._ended.pop(name) for name in names]

    def has_ended(self, name: str) -> bool:
        return name in self._ended

    def so_far(self, name: str) -> int:
        """Tokens of a request that has not ended."""
        processor = self._llm.llm_engine.output_processor
        (inner,) = processor.external_req_ids[name]
        return int(processor.request_states[inner].detokenizer.num_output_tokens())

    def drop(self, names: Sequence[str]) -> None:
        """Forget requests that have not ended: whatever was computed of them is lost."""
        self._llm.llm_engine.abort_request(list(names))


def slot_request(version: int, number: int) -> LoRARequest:
    """Name of a version in a slot. Both numbers are in the name, by which vLLM keeps its prefix caches apart:
    a version that was staged anew finds no keys of what had its number before."""
    from vllm.lora.request import LoRARequest

    # The path is never read: what is not in a slot is no request's.
    return LoRARequest(f"v{version}.{number}", number, lora_path="in a slot")


def version_in_slot(slot: LoRARequest) -> int:
    """The inverse of `slot_request`."""
    return int(slot.lora_name.removeprefix("v").partition(".")[0])


def token_versions(output: Any) -> np.ndarray:
    """int32 (tokens,): version of the weights that drew each token of a vLLM output of one completion; -1 is
    the base.

    vLLM labels spans of tokens with the name that `finish_weight_update` got, here `v` and the version, and
    with `default` before the first of them. A sample of a LoRA slot is of that one to its end.
    """
    slot, output = output.lora_request, output.outputs[0]
    if slot is not None:
        return np.full(len(output.token_ids), version_in_slot(slot), np.int32)
    found = np.full(len(output.token_ids), NO_VERSION, np.int32)
    for span in output.weight_versions or []:
        if span.version.startswith("v"):
            found[span.start : span.end] = int(span.version.removeprefix("v"))
    return found
