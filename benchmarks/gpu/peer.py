"""A process of the sections on groups and turns: `python -m benchmarks.gpu.peer PART DEVICE TIMEOUT_S`.

Parts: `trainer` and `engine`, the ends of a channel; `lender` and `borrower`, the same through memory that
both have; `alone`, a trainer whose engine never comes, and then one whose engine leaves before the first
operation; `one`, alone in its group, and then that engine. It says in a line of JSON that it is ready, waits
for a line, does its part, says what came of it, and so on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from actors.errors import RunFailure
from actors.sync.channel import Connector, Listener
from actors.sync.payload import pack_merged
from actors.sync.spec import Backend

HOST = "127.0.0.1"


def main() -> None:
    part, device, timeout_s = sys.argv[1], torch.device(sys.argv[2]), float(sys.argv[3])
    on_cuda = device.type == "cuda"
    backend: Backend = "nccl" if on_cuda else "gloo"
    if part in ("lender", "borrower"):
        backend = "ipc" if on_cuda else "shared"
    listener = Listener(HOST, timeout_s) if part in ("trainer", "lender", "alone") else None
    torch.ones(1, device=device)  # the context of CUDA, which takes seconds
    say({"ready": part, "address": listener.address if listener else None})
    told = sys.stdin.readline().strip()
    if part == "one":
        say(one(backend, device))
        leave(sys.stdin.readline().strip(), backend, timeout_s)
    elif listener is None:
        say(tried(lambda: receive(told, backend, timeout_s)))
    else:
        say(tried_sending(listener, backend, device))
    if part == "alone":
        listener = Listener(HOST, timeout_s)
        say({"address": listener.address})
        sys.stdin.readline()
        say(tried_sending(listener, backend, device))


def say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def one(backend: Backend, device: torch.device) -> dict[str, Any]:
    """A group of this process alone."""
    began = time.perf_counter()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    number = torch.ones(1, device=device)
    dist.all_reduce(number)
    found = {"sum": float(number), "seconds": time.perf_counter() - began}
    dist.destroy_process_group()
    return found


def leave(address: str, backend: Backend, timeout_s: float) -> None:
    """Come to a channel and end as a process that is killed."""
    Connector(address, timeout_s).join(backend)
    os._exit(0)


def tried_sending(listener: Listener, backend: Backend, device: torch.device) -> dict[str, Any]:
    """As `tried`, with a sum that the device still does."""
    found = tried(lambda: send(listener, backend, device))
    return {**found, "works": float(torch.ones(2, device=device).sum())}


def tried(work: Callable[[], float]) -> dict[str, Any]:
    """The sum of what was carried, or why it was not; and when that was known."""
    began = time.perf_counter()
    try:
        found: dict[str, Any] = {"carried": work()}
    except RunFailure as error:
        found = {"reason": error.reason}
    return {**found, "seconds": time.perf_counter() - began}


def send(listener: Listener, backend: Backend, device: torch.device) -> float:
    weights = torch.ones(2**20, device=device, dtype=torch.bfloat16)
    channel = listener.accept("engine", backend)
    channel.send(pack_merged(0, "bfloat16", {"weight": weights}))
    return float(weights.float().sum())


def receive(address: str, backend: Backend, timeout_s: float) -> float:
    payload = Connector(address, timeout_s).join(backend).receive()
    return float(payload.tensors()["weight", "W"].float().sum())


if __name__ == "__main__":
    main()
