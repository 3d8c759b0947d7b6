"""Groups of processes on one device: one alone, a trainer and an engine, channels whose peer is not there.

On CUDA a trainer and an engine on the same card have to be refused by NCCL at once: channels need a GPU each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks.gpu.check import ROOT, Check, Deviation

TIMEOUT_S = {"one": 20.0, "trainer": 20.0, "engine": 20.0, "alone": 4.0}
"""Of every operation of a process."""
REFUSED_WITHIN_S = 10.0
"""NCCL finds two processes on one GPU when they exchange their addresses, well before a deadline."""
START_S, END_S = 180.0, 30.0
"""Longest wait for a process to have made its imports, and for one to answer after its deadline."""


def run(check: Check) -> None:
    """Start all four processes, let them begin one case after the other, and judge what they say."""
    peers = {name: Peer(name, check) for name in TIMEOUT_S}
    try:
        ready = {name: peer.answer(START_S) for name, peer in peers.items()}
        peers["alone"].go()  # it waits while the others work
        wrong = [
            _one(check, peers["one"]),
            _pair(check, peers, str(ready["trainer"].get("address"))),
            _given_up(check, peers["alone"], "a channel whose peer never comes"),
            _left(check, peers["alone"], peers["one"]),
        ]
    finally:
        for peer in peers.values():
            peer.end()
    if found := [reason for reason in wrong if reason]:
        raise Deviation("; ".join(found))


class Peer:
    """A process of `benchmarks.gpu.peer`."""

    def __init__(self, name: str, check: Check, timeout_s: float | None = None, **variables: str) -> None:
        """Start it, with further variables of the environment; it does its imports and waits."""
        self.name = name
        seconds = str(TIMEOUT_S[name] if timeout_s is None else timeout_s)
        command = [sys.executable, "-m", "benchmarks.gpu.peer", name, str(check.device), seconds]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": path, **variables}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def go(self, word: str = "go") -> None:
        """Let it begin; `word` is the address that an engine is told."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Its next line; `{"died": exit code}`, or `{"hung": True}` when none came, and it is killed."""
        assert self._process.stdout is not None
        began, killing = time.monotonic(), threading.Timer(seconds, self._process.kill)
        killing.start()
        line = self._process.stdout.readline()
        killing.cancel()
        if line:
            return dict(json.loads(line))
        code = self._process.wait()
        return {"hung": True} if time.monotonic() - began >= seconds else {"died": code}

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()


def _one(check: Check, peer: Peer) -> str:
    peer.go()
    said = peer.answer(TIMEOUT_S[peer.name] + END_S)
    check.tell(case="a group of one process", **said)
    return "" if said.get("sum") == 1.0 else f"a group of one process: {said}"


def _pair(check: Check, peers: dict[str, Peer], address: str) -> str:
    """Trainer and engine on one device: carried by gloo, refused by NCCL."""
    ends = {name: peers[name] for name in ("trainer", "engine")}
    for peer in ends.values():
        peer.go(address)
    said = {name: peer.answer(TIMEOUT_S[peer.name] + END_S) for name, peer in ends.items()}
    check.tell(
        case="trainer and engine on one device", expected="refused" if check.on_cuda else "carried", **said
    )
    if not check.on_cuda:
        right = all(end.get("carried") for end in said.values())
    else:
        # One end is told by NCCL; the other may learn it from the connection that the first has closed.
        right = not any(end.get("carried") for end in said.values()) and any(
            "reason" in end and end["seconds"] < REFUSED_WITHIN_S for end in said.values()
        )
        right = right and all("reason" in end for end in said.values())
    return "" if right else f"trainer and engine on one device: {said}"


def _left(check: Check, peer: Peer, leaver: Peer) -> str:
    """The peer of a channel is gone before the first operation, in which NCCL makes its own connection."""
    leaver.go(str(peer.answer(END_S).get("address")))
    peer.go()
    return _given_up(check, peer, "a channel whose peer leaves at once")


def _given_up(check: Check, peer: Peer, case: str) -> str:
    """The process gives its channel up in time, and the device works on."""
    deadline = TIMEOUT_S[peer.name]
    said = peer.answer(deadline + END_S)
    check.tell(case=case, deadline_s=deadline, **said)
    right = "reason" in said and said["seconds"] < deadline + END_S / 2 and said.get("works") == 2.0
    return "" if right else f"{case}: {said}"
