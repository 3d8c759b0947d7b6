"""Requests in vLLM's terms, and what is read from its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches.generations import SamplingSpec
from actors.errors import RunFailure

if TYPE_CHECKING:
    from vllm import SamplingParams


def sampling_params(sampling: SamplingSpec, seed: int) -> SamplingParams:
    """What vLLM is asked for one sample; its log-probability alone comes back with each token."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=sampling.stop or None,
        stop_token_ids=sampling.stop_token_ids or None,
        # Greedy draws nothing, and a generator per request costs time.
        seed=seed if sampling.temperature > 0 else None,
        logprobs=0,
        flat_logprobs=True,
        # Stop strings are looked for in text; nothing else needs it, token ids travel.
        detokenize=bool(sampling.stop),
    )


def scoring_params() -> SamplingParams:
    """What vLLM is asked to score the tokens of a prompt."""
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
