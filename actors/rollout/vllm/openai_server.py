"""vLLM's own OpenAI-compatible server over one engine with the settings of rollout engines.

vLLM's core is in a process of its own here, which applies the workarounds as a worker does, and ends with
this one however that ends.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rollout.spec import EngineSpec
from actors.rollout.vllm.processes import EngineProcesses
from actors.rollout.vllm.settings import ArchitectureInUse, llm_settings, read_config

NOT_THE_SERVERS = ("logprobs_mode",)
"""Settings of engines that a trainer reads: a server's log-probabilities are those that OpenAI's are."""

SHUTDOWN_S = 5
"""Seconds for answers under way, and for vLLM's core to end by itself, once a signal has come."""


@dataclass(frozen=True)
class Served:
    """Models that one server has."""

    directory: str
    """With the engine's weights."""
    names: Sequence[str]
    """Of the model itself."""
    adapters: Mapping[str, str]
    """Name -> directory of an adapter, which is computed beside it."""
    ends: Sequence[int]
    """Tokens that end a turn."""


def serve(
    served: Served,
    spec: EngineSpec,
    room: Mapping[str, Any],
    listener: socket.socket,
    scratch: Path,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        room: settings of an engine that has adapters beside its base.
        listener: bound and listening: who comes early waits.
        scratch: a directory for a file.
        ready: called once requests are answered.

    Raises:
        UserError, RunFailure: the model can't be served.
        KeyboardInterrupt: a signal came before requests were answered.
    """
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker

    config = read_config(served.directory, spec)
    in_use = ArchitectureInUse()
    in_use.enter(config)
    EngineProcesses()
    settings = llm_settings(config, spec) | dict(room)
    _write_ends(Path(served.directory), served.ends, scratch)
    host, port = listener.getsockname()[:2]
    args = _arguments(served, settings, scratch, host, port)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # A connection is an open file.

    async def work() -> None:
        waiting = asyncio.create_task(_when_it_answers(host, port, ready))
        try:
            await run_server_worker(f"http://{host}:{port}", listener, args)
        finally:
            waiting.cancel()

    try:
        asyncio.run(work())
    finally:
        in_use.leave()


def _arguments(served: Served, settings: Mapping[str, Any], scratch: Path, host: str, port: int) -> Namespace:
    """Arguments of vLLM's server, as its own command line has them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    quiet = ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(quiet)
    ours = {name: value for name, value in settings.items() if name not in NOT_THE_SERVERS}
    adapters = [LoRAModulePath(name=name, path=path) for name, path in served.adapters.items()]
    for name, value in ours.items():
        if not hasattr(args, name):
            raise AttributeError(f"vLLM's server has no setting {name}")
        setattr(args, name, value)
    args.model, args.served_model_name = served.directory, list(served.names)
    args.host, args.port, args.shutdown_timeout = host, port, SHUTDOWN_S
    args.generation_config, args.lora_modules = str(scratch), adapters or None
    return args


def _write_ends(model: Path, ends: Sequence[int], scratch: Path) -> None:
    """The model's generation_config.json with every token that ends a turn, beside the model, which is not
    touched."""
    own = model / "generation_config.json"
    held = json.loads(own.read_text()) if own.is_file() else {}
    if ends:
        held["eos_token_id"] = list(ends)
    (scratch / "generation_config.json").write_text(json.dumps(held))


async def _when_it_answers(host: str, port: int, ready: Callable[[], None]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /health HTTP/1.0\r\n\r\n")
    if await reader.readline():
        ready()
    writer.close()
