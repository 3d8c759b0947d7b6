"""Models that one engine serves by vLLM's OpenAI-compatible server: which can be there together, and how.

Loads no vLLM, and no torch, before `set_environment` was called.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster.connection import local_resources
from actors.cluster.environment import CORE_APART, actor_environment, engine_environment
from actors.errors import EXIT_INTERRUPTED, UserError
from actors.models.spec import ModelSpec
from actors.rollout.spec import EngineSpec

if TYPE_CHECKING:
    from actors.rollout.vllm.openai_server import Served

BASE = "base"
"""Name of the model that adapters are on."""
UNWIND_S = 5.0
"""Time for this process to end by itself after a signal that comes before it serves."""


@dataclass(frozen=True)
class Models:
    """Models by the names that requests give them."""

    paths: Mapping[str, str]
    """Name -> model or adapter, as `model.base` of a config names one; the last is the one that matters."""
    all_wanted: bool
    """The user named each of them."""


def set_environment() -> None:
    """Set a rollout actor's environment for this process and vLLM's, before torch is loaded."""
    there = local_resources()
    ours = actor_environment(max(1, int(there["CPU"])), True) | engine_environment(there["GPU"] > 0)
    # A process that has computed with torch is no good one to fork. What vLLM warns of are the settings here.
    own = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", CORE_APART: "1"}
    level = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    os.environ.update(ours | own | level)


def serve_models(
    models: Models, spec: EngineSpec, listener: socket.socket, ready: Callable[[list[str], str], None]
) -> None:
    """Serve models at a socket that listens, until SIGINT or SIGTERM.

    Args:
        ready: told the names of what is served, and why the others are not (or nothing), once requests are
            answered.

    Raises:
        UserError: a model can't be used, or all are wanted where only one can be served.
        KeyboardInterrupt: a signal came before requests were answered.
    """
    from actors.rollout.vllm.openai_server import serve

    with tempfile.TemporaryDirectory(prefix="raylign-served-") as scratch:
        for number in (signal.SIGINT, signal.SIGTERM):  # vLLM's server takes them over once it answers.
            signal.signal(number, functools.partial(_interrupted, scratch))
        served, settings, why = _as_served(models, spec, Path(scratch))
        names = [*served.names, *served.adapters]
        serve(served, spec, settings, listener, Path(scratch), lambda: ready(names, why))


def _interrupted(scratch: str, number: int, frame: Any) -> None:
    """End what starts: there is nothing to save. vLLM's core takes no signal meanwhile, and this process's
    wait for it may take no exception."""
    for child in multiprocessing.active_children():
        child.kill()
    threading.Thread(target=_end_at_last, args=(scratch,), daemon=True, name="end-at-last").start()
    raise KeyboardInterrupt


def _end_at_last(scratch: str) -> None:
    time.sleep(UNWIND_S)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(EXIT_INTERRUPTED)


def _as_served(models: Models, spec: EngineSpec, scratch: Path) -> tuple[Served, dict[str, Any], str]:
    """How one engine has these models: adapters beside their base where vLLM can compute them there, else the
    last one alone, merged into a copy if it is an adapter. With settings that make room for adapters, and
    the reason for which it is alone."""
    from actors.models.base.loading import is_adapter_dir, load_tokenizer, local_base_dir, resolve_base
    from actors.models.lora.merge import merge_adapter
    from actors.models.turn_ends import turn_ends
    from actors.rollout.vllm.openai_server import Served

    for path in models.paths.values():
        resolve_base(_spec_of(path, spec)).checked()
    adapters = {name: path for name, path in models.paths.items() if is_adapter_dir(path)}
    whole = {name: path for name, path in models.paths.items() if name not in adapters}
    name, path = list(models.paths.items())[-1]
    why = _why_alone(adapters, whole)
    if why and models.all_wanted and len(models.paths) > 1:
        raise UserError(f"--model: one engine can't have all of these: {why}; name one of them")
    room: dict[str, Any] = {}
    if why:
        adapters, whole = {}, {name: path}
        if is_adapter_dir(path):
            merge_adapter(None, path, scratch / "model", dtype=spec.dtype, check=False)
            path = str(scratch / "model")
    elif adapters:
        path = next(iter(whole.values()), "") or _base_of(path)
        room = _room(list(adapters.values()), resolve_base(_spec_of(path, spec)).checked().config)
    one = _spec_of(path, spec)
    directory = str(local_base_dir(resolve_base(one).checked().base_path))
    ends = turn_ends(load_tokenizer(one), path).ids
    return (
        Served(directory, list(whole) or [BASE], adapters, ends),
        room,
        why if len(models.paths) > 1 else "",
    )


def _spec_of(path: str, spec: EngineSpec) -> ModelSpec:
    """A model as a config names it. Who trained it has probed its base, or the caller has looked at it."""
    return ModelSpec(base=path, allow_untested=True, trust_remote_code=spec.trust_remote_code)


def _why_alone(adapters: Mapping[str, str], whole: Mapping[str, str]) -> str:
    """Reason for which one engine can't have all of these models; empty: it can.

    Raises:
        UserError: an adapter is no language model's.
    """
    if len(whole) > 1:
        return f"{' and '.join(whole)} have weights of their own"
    bases = {os.path.realpath(path) for path in [*whole.values(), *map(_base_of, adapters.values())]}
    if len(bases) > 1:
        return f"{', '.join(adapters)} and {', '.join(whole)} are on different bases"
    return next((f"{name} {why}" for name, path in adapters.items() if (why := _why_merged(path))), "")


def _why_merged(adapter: str) -> str:
    """Reason for which vLLM doesn't compute an adapter's file beside its base; empty: it does."""
    from actors.models.base.loading import resolve_base
    from actors.models.facts import saved_head, vllm_row
    from actors.models.lora.adapters import base_quantization, saved_config

    if saved_head(adapter) is not None:
        raise UserError(f"{adapter} is a reward model, which answers nothing; `raylign eval` scores with it")
    config = resolve_base(ModelSpec(base=adapter, allow_untested=True)).checked().config
    saved = saved_config(adapter)
    if saved.target_parameters:
        return "adapts experts or other fused weights, so its adapter is merged into a copy of the base"
    if base_quantization(adapter) is not None:
        return "is an adapter on a quantised base, so it is merged into a copy of it"
    if (
        config is None
        or not vllm_row(config.model_type).supports_lora
        or not isinstance(saved.target_modules, set | list)
    ):
        return "is an adapter that vLLM can't compute beside its base, so it is merged into a copy"
    return ""


def _base_of(adapter: str) -> str:
    from actors.models.base.resolving import follow_adapter

    return follow_adapter(adapter)[0]


def _room(adapters: Sequence[str], config: Any) -> dict[str, Any]:
    """Settings of an engine with room for each of these adapters beside its base, whose config this is."""
    from actors.models.lora.adapters import saved_config
    from actors.rollout.slot_updater import slot_settings
    from actors.sync.spec import SlotSpec

    found = [saved_config(path) for path in adapters]
    rank = max(max([one.r, *one.rank_pattern.values()]) for one in found)
    modules = {name.split(".")[-1] for one in found for name in one.target_modules or ()}
    settings = slot_settings(SlotSpec(rank, tuple(sorted(modules))), config)
    return settings | {"max_loras": len(adapters), "max_cpu_loras": len(adapters)}
