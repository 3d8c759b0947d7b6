"""A vLLM engine's requests, advanced step by step, so that other calls (new weights) come in between.

vLLM's own `generate` returns when nothing is left to do. Here requests of several callers are in the engine
together; each step advances all of them, and whoever asks next finds what ended meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.sync.protocol import NO_VERSION

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


class Stepper:
    """The requests of one engine that are not finished, or not yet collected."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._ended: dict[str, Any] = {}

    @property
    def busy(self) -> bool:
        """Whether requests are in the engine."""
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def add(self, requests: Sequence[Any], params: Sequence[SamplingParams] | SamplingParams) -> list[str]:
        """Give requests to the engine; their names, in order."""
        if not requests:
            return []
        states = self._llm.llm_engine.output_processor.request_states
        # enqueue answers with vLLM's inner names; outputs carry the outer ones.
        return [states[name].external_req_id for name in self._llm.enqueue(requests, params, use_tqdm=False)]

    def run(self, names: Sequence[str], seconds: float | None = None) -> list[Any] | None:
        """Outputs of these requests, in order, once all have ended; None if they have not in `seconds`."""
        engine, until = self._llm.llm_engine, None if seconds is None else time.monotonic() + seconds
        missing = set(names) - self._ended.keys()
        while missing:
            if not self.busy:
                raise RuntimeError(f"the engine has nothing to do, and {len(missing)} requests did not end")
            for output in engine.step():
                if output.finished:
                    self._ended[output.request_id] = output
                    missing.discard(output.request_id)
            if missing and until is not None and time.monotonic() >= until:
                return None
        return [self._ended.pop(name) for name in names]


def token_versions(output: Any) -> np.ndarray:
    """int32 (tokens,): version of the weights that drew each token of a vLLM completion; -1 is the base.

    vLLM labels spans of tokens with the name that `finish_weight_update` got, here `v` and the version, and
    with `default` before the first of them.
    """
    found = np.full(len(output.token_ids), NO_VERSION, np.int32)
    for span in output.weight_versions or []:
        if span.version.startswith("v"):
            found[span.start : span.end] = int(span.version.removeprefix("v"))
    return found
