"""Arguments of vLLM for serving a model: the user's options, the architecture's row, the machine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.errors import UserError
from actors.models.architectures.vllm_table import vllm_row
from actors.models.facts import max_positions
from actors.models.sizes import heads_in_cache
from actors.rollout.spec import EngineSpec, cache_bytes, positions_of
from actors.rollout.vllm.workarounds.registry import use_only
from actors.variables import set_variables

TOKENS_PER_STEP = 8192
"""Tokens that one engine step may prefill on the CPU."""


def read_config(model: str, spec: EngineSpec) -> Any:
    """The transformers config of a checkpoint.

    Raises:
        UserError: there is none that can be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = "no such directory" if _is_missing_path(model) else str(error).splitlines()[0]
        raise UserError(f"{model}: the rollout engine can't read this model: {reason}") from None


def llm_settings(config: Any, spec: EngineSpec) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`, but for the model itself.

    Raises:
        UserError: the architecture can't be served in this dtype.
    """
    from vllm.platforms import current_platform

    from actors.rollout.vllm.worker_extension import EXTENSION

    row = vllm_row(config.model_type)
    length = positions_of(spec.max_model_len, max_positions(config))
    settings: dict[str, Any] = {
        "dtype": spec.dtype,
        "max_model_len": length,
        "max_num_seqs": spec.max_num_seqs,
        "trust_remote_code": spec.trust_remote_code,
        # After temperature and filters: what the behaviour policy really drew from.
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": spec.enforce_eager,
        "hf_overrides": row.overrides_for(config),
        "tensor_parallel_size": spec.tensor_parallel_size,
        # In an actor of a placement group vLLM would choose its Ray executor, which wants a bundle for each
        # worker; an engine's workers are processes of its actor.
        "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
        # Processes of the engine's own apply the workarounds when they import this.
        "worker_extension_cls": EXTENSION,
    }
    if row.transformers_backend:
        settings["model_impl"] = "transformers"
    if not current_platform.is_cpu():
        settings["enable_sleep_mode"] = spec.enable_sleep_mode
        return settings | {"gpu_memory_utilization": spec.gpu_memory_utilization}
    if spec.dtype not in row.dtypes:
        raise UserError(
            f"model.dtype: {spec.dtype}: vLLM's CPU engine runs {config.model_type} in "
            f"{' or '.join(row.dtypes)} only"
        )
    if row.attention_backend is not None:
        settings["attention_config"] = {"backend": row.attention_backend}
    return settings | {
        "enforce_eager": True,
        # A prompt cut into chunks loses its seed on the CPU ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(TOKENS_PER_STEP, length),
        "kv_cache_memory_bytes": cache_bytes(spec, _cached_per_token(config.get_text_config(), spec), length),
        **row.engine_args,
    }


def _cached_per_token(config: Any, spec: EngineSpec) -> int:
    """Bytes of a token's keys and values in all layers."""
    heads, head_dim = heads_in_cache(config)
    size = 4 if spec.dtype == "float32" else 2
    per_token: int = config.num_hidden_layers * 2 * heads * head_dim * size
    return per_token


class ArchitectureInUse:
    """The workarounds and the environment of one architecture at a time, in this process."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}

    def enter(self, config: Any) -> None:
        """Those of the model with this config, until `leave`.

        Raises:
            RunFailure: a workaround doesn't fit the installed vLLM.
        """
        import vllm.envs
        from vllm.platforms import current_platform

        self.leave()
        row = vllm_row(config.model_type)
        use_only(row.workarounds)
        variables = row.environment if current_platform.is_cpu() else {}
        self._before = set_variables(variables)
        # An engine that lived here before has made vLLM remember its variables.
        vllm.envs.disable_envs_cache()

    def leave(self) -> None:
        """The environment as it was."""
        set_variables(self._before)
        self._before = {}


@contextmanager
def no_collections() -> Iterator[None]:
    """Ignore vLLM's calls of the garbage collector, seven per start and end of an engine.

    Each walks the objects of torch, transformers and vLLM for 0.6 s: a change of models took 4.0 CPU
    seconds with them and takes 0.3 without. One collection after the end of an engine does their work.
    """
    real = gc.collect, gc.freeze, gc.unfreeze
    enabled = gc.isenabled()
    gc.disable()
    gc.collect, gc.freeze, gc.unfreeze = (lambda *args: 0), (lambda: None), (lambda: None)
    try:
        yield
    finally:
        gc.collect, gc.freeze, gc.unfreeze = real
        if enabled:
            gc.enable()


@contextmanager
def without_remains() -> Iterator[None]:
    """A model that fails to load leaves no process groups behind: vLLM would keep those for the next one,
    which may need others (a dense model has none for experts)."""
    try:
        yield
    except BaseException:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        raise


@contextmanager
def building_models() -> Iterator[None]:
    """transformers' models can be built in a process where vLLM's transformers backend has served one.

    That backend derives transformers' own classes from vLLM's, whose constructor asks for vLLM's config
    (compilation/decorators.py).
    """
    if "vllm.config" not in sys.modules:
        yield
        return
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))):
        yield


def _is_missing_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) and not Path(model).exists()
