"""A process that makes the imports of all processes of a run on one machine, once.

To import torch, transformers and peft takes 4 seconds of CPU time in each rank; on a laptop with two cores
that was half of a start. Here one process imports them while Ray starts, and every worker of the local
cluster is forked from it (`actors.cluster.fast_start.forked_worker` asks for that): it is up at once, and
shares the memory of the imports.

The fork is safe because this process has one thread and has only imported code: no Ray, no CUDA, no process
group. It counts its threads and refuses to fork where an import has started more. Nodes of a running cluster
don't use it, and an actor finds its imports done and is otherwise the same.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.cluster.environment import import_root
from actors.cluster.fast_start.forked_worker import end_with
from actors.cluster.scratch import Scratch

STOP_S = 2.0
"""Seconds that the server gets to end; it has nothing to save."""

SOCKET = "socket"
"""Name of its socket."""


class ForkServer:
    """The server's process, seen from the driver."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Start it; returns at once. `modules`: what to import. `env`: variables on top of this process's,
        those that libraries read when they are loaded among them. `log`: file for what it prints."""
        # Only this user may ask for processes.
        self._scratch = Scratch(len(f"/{SOCKET}"))
        self.address = str(self._scratch.path / SOCKET)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([import_root(), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Made here, so that a worker finds it however late the server itself is.
        with socket.socket(socket.AF_UNIX) as listener, log.open("a") as output:
            listener.bind(self.address)
            listener.listen(64)
            own = str(listener.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, own, str(os.getpid()), *modules],
                env={**os.environ, **env, "PYTHONPATH": path, "TMPDIR": str(self._scratch.path)},
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End it. Actors that were forked from it end as well, if they are still there. Never raises."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.remove()


def serve(listener: socket.socket, driver: int, modules: Sequence[str]) -> list[str] | None:
    """Import, then fork at every request.

    Returns in more than one process, as `os.fork` does: in the server None, when it ends; in each forked
    process the command line that this one has to run.
    """
    end_with(driver)
    print(f"--- fork-server pid {os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    # An interrupt at the terminal, or its end, is for the driver, which saves and then ends its processes.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    if not import_all(modules):
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no one waits for them: the kernel clears them away
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                command = fork(connection)
            except (OSError, ValueError):
                traceback.print_exc()
                continue
        if command is not None:
            return command


def import_all(modules: Sequence[str]) -> bool:
    """Import `modules`; False where this process cannot be forked then, with the reason in the log."""
    gc.disable()  # imports make no garbage; see Worker
    try:
        for module in modules:
            began = time.process_time()
            importlib.import_module(module)
            print(f"{module}: {time.process_time() - began:.2f} s CPU", flush=True)
    except Exception:
        # A rank that imports by itself will tell it, under its own name.
        traceback.print_exc()
        return False
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        print(f"{len(threads)} threads after the imports: a fork would lose all but one", flush=True)
        return False
    gc.freeze()  # A collection in a forked process would touch, and so copy, every page.
    return True


def fork(connection: socket.socket) -> list[str] | None:
    """Fork the process that one request asks for. Returns in both: None in the server, in the forked process
    the command line that it has to run."""
    word, streams, _, _ = socket.recv_fds(connection, 1, 3)
    try:
        order = json.loads(b"".join(iter(lambda: connection.recv(65_536), b"")))
        if word != b"w" or len(streams) != 3:
            raise ValueError("not the request of a worker")
        sys.stdout.flush()
        sys.stderr.flush()
        server = os.getpid()
        if os.fork():
            connection.sendall(b"+")
            return None
        return become(order, streams, server)
    finally:
        for stream in streams:
            os.close(stream)


def become(order: Mapping[str, Any], streams: Sequence[int], server: int) -> list[str]:
    """In a forked process: take over streams, environment and directory of the process that asked; returns
    the command line to run. It ends with the server, also before it has become a rank."""
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        end_with(server)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.enable()
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["directory"])
        return list(order["command"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # It must not go on as a second server.


def main() -> None:
    own, driver, *modules = sys.argv[1:]
    with socket.socket(fileno=int(own)) as listener:
        command = serve(listener, int(driver), modules)
    if command is None:
        return
    # What `python SCRIPT ARGUMENTS` would have done.
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
