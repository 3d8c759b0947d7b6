"""Environment variables of the driver's Ray and of actors: threads that leave each other's cores alone, no
telemetry, no noise."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.errors import UserError

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""torch's own variable. Engines don't get it: memory that vLLM gives back in its sleep can't be so."""
DEVICES = "CUDA_VISIBLE_DEVICES"
"""CUDA's own variable. Ray sets it for an actor with GPUs, and leaves it alone for one without."""
CORE_APART = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""vLLM's own variable: 1 puts an engine's core into a process of its own, as is the default on GPUs."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo's own variable: the network interface on which ranks meet. Without it gloo takes the one that the
machine's name resolves to, which other nodes perhaps don't reach."""
SHIPPED = "shipped-files"
"""Folder of a job's package with the copy of the user's working directory, beside Raylign's packages. No
import can name it."""
SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's own variable: where the sockets between its processes are; by default among temporary files."""


def import_root() -> str:
    """The directory that `actors` is imported from: on the path of every process that a run starts."""
    package = sys.modules[__name__.partition(".")[0]]
    return str(Path(str(package.__file__)).resolve().parents[1])


def enter_shipped_files() -> None:
    """In a process of a job: work in the copy of the user's directory, where relative paths mean what they
    mean to the driver. Anywhere else: nothing."""
    place = Path(import_root()) / SHIPPED
    if place.is_dir():
        os.chdir(place)


def ray_environment() -> dict[str, str]:
    """For the process that calls `ray.init`; a local cluster's processes inherit it."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # An actor that died is reported once, by whoever waited for it.
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
        # A thread that still waits for an actor after the end of Ray would start a cluster of its own.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        # Ray gives its workers nice 15, so that they yield to whatever else runs; here they are the work.
        "RAY_worker_niceness": "0",
    }


def beside_proxies(hosts: Sequence[str]) -> dict[str, str]:
    """Variables with which connections to `hosts` don't go to the proxies that this process's variables name;
    none where none is named."""
    named = [os.environ.get(name, "") for name in ("http_proxy", "https_proxy", "all_proxy")]
    named += [os.environ.get(name, "") for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")]
    if not any(named):
        return {}
    before = ",".join(filter(None, [os.environ.get("no_proxy"), os.environ.get("NO_PROXY")])).split(",")
    everything = ",".join(dict.fromkeys([*filter(None, map(str.strip, before)), *hosts]))
    return {"no_proxy": everything, "NO_PROXY": everything}


def actor_environment(threads: int, one_node: bool) -> dict[str, str]:
    """For every actor, set before torch is imported there.

    `one_node`: all ranks are on this machine, so that gloo can use the loopback interface and doesn't
    depend on what the machine's own name resolves to.
    """
    env = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Waiting threads must not spin: several roles share the cores. A rank of several threads spins for
        # about a millisecond (the libraries' own default): waking a thread up for each of the thousand small
        # products of a step made two threads half as fast as one on a 1 M-parameter model.
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0" if threads == 1 else "1",
        "GOMP_SPINCOUNT": "0" if threads == 1 else "300000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        # vLLM looks at a model with `python -m` in a process of its own, which would import a random.py of
        # the working directory in place of Python's.
        "PYTHONSAFEPATH": "1",
    }
    return env | ({GLOO_INTERFACE: "lo"} if one_node else {})


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Variables of this process that `ray.env` passes on to actors and jobs, with their values.

    Raises:
        UserError: some are not set here; an empty one counts as set.
    """
    if unset := [name for name in names if name not in os.environ]:
        raise UserError(
            f"ray.env: {', '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set here; export "
            f"{'it' if len(unset) == 1 else 'them'} before the command, or leave the name out of ray.env"
        )
    return {name: os.environ[name] for name in names}


def trainer_environment(gpu: bool, has_guests: bool = False) -> dict[str, str]:
    """For ranks of a host, on top of `actor_environment`; what the user has set is kept. `has_guests`:
    engines take turns with them on the GPU."""
    if not gpu:
        # It would see all GPUs of its node, and could take memory on those of others.
        return {DEVICES: ""}
    if has_guests:
        # CUDA's handles of memory that grows in place need rights over the other process.
        return {}
    # Rows change their length from one micro-batch to the next: blocks of fixed sizes would leave gaps that
    # nothing fits into.
    return {ALLOCATOR: os.environ.get(ALLOCATOR, "expandable_segments:True")}


def engine_environment(gpu: bool) -> dict[str, str]:
    """For rollout actors, on top of `actor_environment`."""
    if gpu:
        return {}
    return {
        # vLLM's core in this process unless it is asked for: 2 s to start instead of 18 to 40 s.
        CORE_APART: os.environ.get(CORE_APART, "0"),
        # vLLM would pin each engine to all cores of the node.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # An eager engine still compiles a few helpers with a C++ compiler: 25 s on a fresh machine, for
        # nothing (generation runs as fast without).
        "TORCHDYNAMO_DISABLE": "1",
        # Compressed tensors, quantisation kernels, ... that an info line each would announce.
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CONFIGURE_LOGGING": "1",
    }
