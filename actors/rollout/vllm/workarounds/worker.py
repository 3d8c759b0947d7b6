"""Imported by vLLM in each of its worker processes, before a model is built there."""

from __future__ import annotations

from actors.rollout.vllm.processes import end_with_engine
from actors.rollout.vllm.workarounds.registry import use_those_of_environment

EXTENSION = f"{__name__}.WorkaroundExtension"
"""For vLLM's `worker_extension_cls`: naming it makes workers import this module."""

end_with_engine()
use_those_of_environment()


class WorkaroundExtension:
    """Adds nothing to a worker but the import of this module."""
