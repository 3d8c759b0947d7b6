"""Private parts of Ray that a connection uses, each with what is done on a Ray that lacks it.

`ray._private` changes without notice. Everything here was tried with `TRIED`; what only makes a start faster
is in `actors.cluster.fast_start`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from actors.errors import UserError

TRIED = "2.60"
"""Release of Ray that has all names of this module."""
_WORKER, _PRINT = "ray._private.worker", "print_to_stdstream"
_SERVICES, _FIND = "ray._private.services", "canonicalize_bootstrap_address"
_TOKENS = "ray._private.authentication.authentication_token_setup"
_USE_TOKEN = "maybe_enable_token_auth_if_token_available"
_CONSTANTS, _REACHABLE = "ray._private.ray_constants", "ENABLE_RAY_CLUSTER"
_RAYLET = "ray._raylet"
RAYLET = "the raylet of this machine"
"""Name of it in messages."""
MODE = "RAY_AUTH_MODE"
"""Variable of Ray's: `token` or `disabled`; without it, Ray decides."""

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that the driver of a job has."""

_printed_before: Any = None
"""Ray's own function while `mute_raylet` stands in for it."""


def private(module: str, name: str) -> Any:
    """`module.name` of the installed Ray; None where it has no such module or name."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def head_address(address: str) -> str | None:
    """host:port of a cluster's head, from `auto` or host:port; None for `auto` where no cluster was started.

    Raises:
        UserError: `auto`, and this Ray has no function that looks the address up.
        ValueError: neither `auto` nor host:port.
    """
    find = private(_SERVICES, _FIND)
    if find is not None:
        found: str | None = find(address)
        return found
    if address == "auto":
        raise UserError(
            f"ray.address: auto can't be looked up: Ray {_version()} has no {_SERVICES}.{_FIND}, which Ray "
            f"{TRIED} has; give host:port of the cluster's head, or install ray=={TRIED}.*"
        )
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(f"no host in {address!r}")
    return f"{host}:{int(port)}"


def use_token(head: str, key: str = "ray.address") -> bool:
    """Let this process show its token to the cluster at `head`; False when it has none.

    Args:
        key: what named the cluster, for the error.

    Raises:
        UserError: this Ray has no function that does it.
    """
    use = private(_TOKENS, _USE_TOKEN)
    if use is None:
        raise UserError(
            f"{key}: the cluster at {head} asks for a token, and Ray {_version()} has no "
            f"{_TOKENS}.{_USE_TOKEN}, which Ray {TRIED} has; set the variable RAY_AUTH_MODE=token, or "
            f"install ray=={TRIED}.*"
        )
    log = logging.getLogger("ray")
    before = log.level
    log.setLevel(logging.ERROR)  # it would announce the token
    try:
        return bool(use(warn_if_disabled=False))
    finally:
        log.setLevel(before)


class _Fixed(list[str]):
    """A list that `extend` doesn't change."""

    def extend(self, more: Iterable[str], /) -> None:
        """Nothing."""


def workers_import_from(root: str) -> dict[str, Any]:
    """Settings of `ray.init` with which workers import from `root` first, and not from this process's working
    directory or script's folder.

    Ray puts these first on their path: a `random.py` or `torch.py` of the user's own there would be run in
    place of the module that is meant. In a job Ray does not, and takes other settings.
    """
    from ray.job_config import JobConfig

    return {} if _JOB in os.environ else {"job_config": JobConfig(_py_driver_sys_path=_Fixed([root]))}


def forget_token() -> None:
    """Let this process read anew whether Ray uses a token, and which: the next cluster may be another's.

    A Ray that lacks the names keeps what it has read.
    """
    config, tokens = private(_RAYLET, "Config"), private(_RAYLET, "AuthenticationTokenLoader")
    if config is not None and tokens is not None:
        # In this order: a thread of Ray's that still ends reads the token again as long as it is in use.
        config.initialize("")
        tokens.instance().reset_cache()


@contextlib.contextmanager
def on_loopback() -> Iterator[bool]:
    """While it lasts, `ray.init` gives the cluster that it starts the loopback address, so that none of its
    processes listens elsewhere; False with a Ray that lacks the name.

    It is what Ray does on macOS and Windows. Its own setting for it, a variable, is read once for the whole
    life of a process, which may connect to another cluster later.
    """
    before = private(_CONSTANTS, _REACHABLE)
    if before is None:
        yield False
        return
    constants = importlib.import_module(_CONSTANTS)
    setattr(constants, _REACHABLE, False)
    try:
        yield True
    finally:
        setattr(constants, _REACHABLE, before)


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, whatever Ray does inside: its own, of C++, prints a stack and
    aborts the process three seconds later. There is no setting for that; Python sets handlers in the main
    thread alone, which has other things to do."""
    import ctypes

    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(512)  # more than any `struct sigaction`
    libc.sigaction(signal.SIGTERM, None, before)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGTERM, before, None)


def own_processes() -> dict[str, int]:
    """Pids of the processes that a local cluster of this process can't do without, by what they are; empty
    with a Ray that lacks the name."""
    node = getattr(private(_WORKER, "_global_node"), "all_processes", {})
    names = {"raylet": RAYLET, "gcs_server": "the GCS"}
    return {names[kind]: node[kind][0].process.pid for kind in names if node.get(kind)}


def raylet_beside() -> dict[str, int]:
    """As `own_processes`, of the raylet that this process is connected to in a cluster of others; empty where
    it isn't found, as in another container."""
    import psutil

    socket = getattr(private(_WORKER, "_global_node"), "raylet_socket_name", None)
    argument = f"--raylet_socket_name={socket}"
    pids = [one.pid for one in psutil.process_iter(["cmdline"]) if argument in (one.info["cmdline"] or ())]
    return dict.fromkeys([RAYLET], pids[0]) if socket and pids else {}


def mute_raylet() -> None:
    """Keep Ray's half page per dead worker off the terminal until `unmute_raylet`: whoever waits for the
    worker reports its death.

    Ray prints it from a thread of the driver whatever `log_to_driver` says, and has no setting for that. With
    a Ray that lacks the function, the half page is printed.
    """
    global _printed_before
    found = private(_WORKER, _PRINT)
    if _printed_before is None and found is not None:
        _printed_before = found
        setattr(importlib.import_module(_WORKER), _PRINT, _print_nothing)


def unmute_raylet() -> None:
    """Put Ray's own function back."""
    global _printed_before
    if _printed_before is not None:
        setattr(importlib.import_module(_WORKER), _PRINT, _printed_before)
        _printed_before = None


def _print_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of Ray's `print_to_stdstream`."""


def _version() -> str:
    import ray

    return str(ray.__version__)
