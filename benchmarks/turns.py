"""Sides of a comparison that live at the same time, each in a process of its own, and take turns.

Only one of them works at a time: a side waits at its gate until it is told to go on. So models are loaded and
kernels warmed up once, and what disturbs the machine for a minute disturbs all sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.processes import tree_cpu_seconds
from benchmarks.workloads import ROOT

GATE = "RAYLIGN_BENCH_GATE"
"""Environment variable: the two file descriptors of a side's gate."""
END_S = 60.0


def _plain() -> dict[str, str]:
    """This process's environment; how threads wait is left to each side."""
    inherited = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")
    return {name: value for name, value in os.environ.items() if name not in inherited}


class Gate:
    """A side's end, in its process. It comes up with the first `wait`."""

    def __init__(self) -> None:
        read, write = map(int, os.environ.pop(GATE).split(","))
        # Processes that this one starts must not hold the gate open.
        os.set_inheritable(read, False)
        os.set_inheritable(write, False)
        self._in, self._out = os.fdopen(read), os.fdopen(write, "w")

    def wait(self) -> bool:
        """Tell that the last turn is over, and wait for the next; False: there is none."""
        self._send({"waiting": True})
        return self._in.readline() == "go\n"

    def tell(self, found: Mapping[str, Any]) -> None:
        """What this turn has shown; its measured part is over with this."""
        self._send(dict(found))

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


class Side:
    """A side, as the comparison sees it."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Start its process; `ready` waits for it."""
        self.name, self.log = name, log
        to_child, from_parent = os.pipe()
        to_parent, from_child = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**_plain(), **env, GATE: f"{to_child},{from_child}"},
            stdin=subprocess.DEVNULL,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            pass_fds=(to_child, from_child),
        )
        os.close(to_child)
        os.close(from_child)
        self._out, self._in = os.fdopen(from_parent, "w"), os.fdopen(to_parent)

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the side end by itself, else end it."""
        self._out.close()
        try:
            self._process.wait(END_S if error is None else 1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._in.close()

    def ready(self) -> Side:
        """Wait until it stands at its gate."""
        while "waiting" not in self._receive():
            pass
        return self

    def turn(self) -> dict[str, Any]:
        """Let it work once. What it told, with `cpu_seconds` of all its processes, and `seconds` from here
        where it told none."""
        cpu, began = tree_cpu_seconds(self._process.pid), time.perf_counter()
        self._out.write("go\n")
        self._out.flush()
        found = self._receive()
        seconds = time.perf_counter() - began
        found = {"seconds": seconds, **found}
        found["cpu_seconds"] = tree_cpu_seconds(self._process.pid) - cpu
        self.ready()
        return found

    def _receive(self) -> dict[str, Any]:
        line = self._in.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-4000:]}")
        return dict(json.loads(line))
