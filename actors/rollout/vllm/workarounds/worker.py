"""Imported in each of vLLM's worker processes, before a model is built there: ends them with their engine,
and applies the engine's workarounds."""

from __future__ import annotations

from actors.rollout.vllm.processes import end_with_engine
from actors.rollout.vllm.workarounds.registry import use_those_of_environment

end_with_engine()
use_those_of_environment()
