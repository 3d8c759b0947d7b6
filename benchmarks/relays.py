"""A version on its way from one process to 64 others over gloo: sent to each, and passed on by nodes.

python -m benchmarks.relays            # 64 processes on 8 pretended nodes, 16 MiB
python -m benchmarks.relays --quick    # 6 processes: does it run?

Each process is an engine without vLLM: the product's intake, channels and tree. The two ways take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from actors.rollout.vllm.intake import Intake
from actors.sync.channel import Channel
from actors.sync.outlets import Outlets
from actors.sync.payload import Payload, pack_merged
from actors.sync.relay_tree import TOP, children, levels, relay_tree
from benchmarks.figures import Execution, Ratio, rows

HOST, TIMEOUT_S, FAN_OUT = "127.0.0.1", 120.0, 4
TURNS, VERSIONS = 5, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--mib", type=int, default=16)
    args = parser.parse_args()
    if args.quick:
        args.engines, args.nodes, args.mib = 6, 3, 1
    execution = Execution("relays", args.quick)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    nodes = {engine: f"node-{engine * args.nodes // args.engines}" for engine in range(args.engines)}
    ways = {"direct": dict.fromkeys(nodes, TOP), "relays": relay_tree(nodes, FAN_OUT)}
    payload = pack_merged(0, "float32", {"weight": torch.randn(args.mib * 2**18)})
    found = measure(ways, payload, 1 if args.quick else TURNS)
    show(found, len(payload.buffer))
    seconds = {way: [one["seconds"] for one in found if one["way"] == way] for way in ways}
    ratios = [
        Ratio("seconds, direct : relays", [a / b for a, b in zip(seconds["direct"], seconds["relays"])])
    ]
    execution.end(ratios, engines=args.engines, nodes=args.nodes, mib=args.mib, turns=found)


def measure(ways: Mapping[str, Mapping[int, int]], payload: Payload, turns: int) -> list[dict[str, Any]]:
    """Versions by each way in turn, with connections made anew."""
    ends = {engine: forked() for engine in next(iter(ways.values()))}
    found = []
    try:
        for _ in range(turns):
            for way, parents in ways.items():
                with mock.patch.object(Channel, "_move", counted(sent := Counter[str](), Channel._move)):
                    trainer = Outlets()
                    began = time.perf_counter()
                    connect(trainer, ends, parents)
                    connected = time.perf_counter() - began
                    push(trainer, ends, parents, payload)
                    sent.clear()
                    began, cpu = time.perf_counter(), time.process_time()
                    for _ in range(VERSIONS):
                        push(trainer, ends, parents, payload)
                    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                found.append(
                    {"way": way, "connect": connected, "seconds": seconds / VERSIONS,
                     "sender_cpu": cpu / VERSIONS, "sender_bytes": sent["send"] // VERSIONS,
                     "steps": max(levels(parents).values())}
                )  # fmt: skip
                trainer.close()
    finally:
        for end in ends.values():
            end.send(None)
    return found


def connect(trainer: Outlets, ends: Mapping[int, Connection], parents: Mapping[int, int]) -> None:
    """Connect engines along a tree, all at the same time."""
    below = {one: engines for one, engines in children(parents, ()).items() if engines}
    relays = [one for one in below if one != TOP]
    addresses = trainer.listen(below[TOP], HOST, TIMEOUT_S)
    for listening in each(ends, relays, "listen", lambda one: (below[one], HOST, TIMEOUT_S)).values():
        addresses |= listening
    each(ends, list(parents), "connect", lambda one: (addresses[one], TIMEOUT_S))
    for engine in parents:
        ends[engine].send(("open", ("gloo",)))
    # Each does one thing after the other: it joins whoever sends to it, then lets others join it.
    for engine in relays:
        ends[engine].send(("accept", (below[engine], "gloo")))
    assert trainer.accept(below[TOP]) == {}
    for engine in parents:
        ends[engine].recv()
    assert not any(ends[engine].recv() for engine in relays)


def push(
    trainer: Outlets, ends: Mapping[int, Connection], parents: Mapping[int, int], payload: Payload
) -> None:
    """One version to all engines, until the last one has acknowledged it."""
    below = children(parents, parents)
    for engine in parents:
        ends[engine].send(("stage", (below[engine],)))
    assert trainer.send(payload, below[TOP]) == {}
    assert {ends[engine].recv() for engine in parents} == {payload.digest}


def each(ends: Mapping[int, Connection], engines: Sequence[int], method: str, args: Any) -> dict[int, Any]:
    """Answers of engines that are asked at the same time."""
    for engine in engines:
        ends[engine].send((method, args(engine)))
    return {engine: ends[engine].recv() for engine in engines}


def forked() -> Connection:
    """The end of a pipe to an engine in a fork of this process, which has its imports already."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there,), daemon=True).start()
    return here


def serve(end: Connection) -> None:
    """Do what is asked until nothing more is."""
    torch.set_num_threads(1)
    intake = Intake(SimpleNamespace(world_size=1, rank_in_group=0), torch.device("cpu"))

    def stage(below: list[int]) -> str:
        with intake.passing_on(below) as payload:
            return payload.digest

    while (asked := end.recv()) is not None:
        method, args = asked
        if method == "stage":
            end.send(stage(*args))
        else:
            end.send(getattr(intake, method)(*args))


def counted(sent: Counter[str], move: Any) -> Any:
    """`Channel._move`, which counts bytes."""

    def counting(self: Channel, chunk: torch.Tensor, operation: Any) -> None:
        move(self, chunk, operation)
        sent[operation] += chunk.nbytes

    return counting


def show(found: Sequence[Mapping[str, Any]], nbytes: int) -> None:
    """Medians of each way."""
    lines = []
    for way in dict.fromkeys(one["way"] for one in found):
        same = [one for one in found if one["way"] == way]

        def middle(name: str, same: list[Mapping[str, Any]] = same) -> float:
            return float(median(one[name] for one in same))

        times = [1000 * middle(name) for name in ("connect", "seconds", "sender_cpu")]
        lines.append([way, int(middle("steps")), *times, middle("sender_bytes") / nbytes])
    columns = ["", "steps", "connect, ms", "a version, ms", "sender's CPU, ms", "copies that it sends"]
    rows("One version to all engines, medians of turns", columns, lines)


if __name__ == "__main__":
    main()
