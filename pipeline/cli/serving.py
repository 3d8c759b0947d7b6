"""Models and the address of `raylign serve`: what a run or a directory holds, and where it may be reached."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import EXIT_DONE, UserError
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

if TYPE_CHECKING:
    from actors.rollout.serving import Models


def serve(target: str, names: Sequence[str], host: str, port: int, public: bool, dtype: str | None) -> int:
    """Serve a model, an adapter or a run until Ctrl-C; returns the exit code.

    Raises:
        UserError: there is no such model, or the address can't be used.
    """
    from actors.rollout.serving import serve_models, set_environment
    from actors.rollout.spec import EngineSpec

    set_environment()
    with bound(host, port, public) as listener, ExitStack() as busy:
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        busy.enter_context(working(f"reading {target}, and loading vLLM"))
        models, settings = chosen(target, names, dtype)

        def ready(served: list[str], why: str) -> None:
            busy.close()
            console.say(f"serving {', '.join(served)} at {url}" + (f"; not the others: {why}" if why else ""))

        serve_models(models, EngineSpec.model_validate(settings), listener, ready)
    return EXIT_DONE


def bound(host: str, port: int, public: bool) -> socket.socket:
    """A socket at this address, before anything takes time.

    Raises:
        UserError: it is taken or none of this machine, or others could reach it and `public` doesn't say so.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host {host}: no address ({error.strerror})") from None
    family, address = found[0][0], found[0][4]
    if not public and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"--host {host}: other machines could reach it, and whoever does may ask the model; if that is "
            "meant, add --public, and set VLLM_API_KEY to a key that requests must have"
        )
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen()  # Nobody else can have it from now on.
    except OSError as error:
        made.close()
        raise UserError(
            f"--port {port}: {host}:{port} can't be used ({error.strerror}); end what serves there, or take "
            "another port (0: one that is free)"
        ) from None
    return made


def chosen(target: str, names: Sequence[str], dtype: str | None) -> tuple[Models, dict[str, Any]]:
    """Models that are asked for, of a run by stage; and settings of their engine.

    Raises:
        UserError: there is no such model, stage or result.
    """
    from actors.models.base.loading import is_adapter_dir, resolve_base
    from actors.models.spec import ModelSpec
    from actors.rollout.serving import BASE, Models

    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml") or (path / "run.json").is_file():
        return _of_run(path, names, dtype)
    if names:
        raise UserError(f"--model is for the results of a run, and {target} is a model or an adapter")
    spec = ModelSpec(base=target, allow_untested=is_adapter_dir(target))
    base = resolve_base(spec).checked().base_path
    models = {BASE: base, target: spec.base} if is_adapter_dir(target) else {target: spec.base}
    return Models(models, False), {"dtype": dtype or "float32"}


def _of_run(path: Path, names: Sequence[str], dtype: str | None) -> tuple[Models, dict[str, Any]]:
    """Policies of a run, given by its config or its directory; its base is `base`."""
    from actors.rollout.serving import BASE, Models
    from pipeline.config.load import load_config

    config = load_config(path if path.is_file() else path / "config.yaml", [])
    directory = config.output_dir if path.is_file() else path
    found = {BASE: config.model.base}
    for name, stage in config.stages.items():
        places = [directory / name / kind for kind in ("adapter", "model")]
        if stage.hands_on_policy and (there := [place for place in places if place.is_dir()]):
            found[name] = str(there[0])
    if not names and len(found) == 1:
        raise UserError(f"{directory} holds no policy yet; run its config first")
    if unknown := [name for name in names if name not in found]:
        raise UserError(
            f"--model {' '.join(unknown)}: {directory} has no such result; possible: {', '.join(found)}"
        )
    chosen = {name: where for name, where in found.items() if not names or name in names}
    settings = {"dtype": dtype or config.model.dtype, "trust_remote_code": config.model.trust_remote_code}
    return Models(chosen, bool(names)), settings
