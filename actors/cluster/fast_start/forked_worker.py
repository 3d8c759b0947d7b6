"""Command that a local cluster runs as a worker: asks the fork server (`fork_server.py`) to start it.

Ray starts it as it would start its own worker, with the same arguments. It sends them to the server, together
with its environment and its standard streams, and ends as soon as a process there has taken its place.
Where no server answers, this process becomes Ray's own worker by itself: the start is then slower, not wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

STREAMS = (0, 1, 2)


def hand_over(address: str, command: Sequence[str]) -> bool:
    """Let the server at `address` run `command`, a script and its arguments; True when a process does."""
    import socket

    order = {"command": list(command), "environment": dict(os.environ), "directory": os.getcwd()}
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            socket.send_fds(connection, [b"w"], STREAMS)
            connection.sendall(json.dumps(order).encode())
            connection.shutdown(socket.SHUT_WR)
            # Answered once the server has made its imports; at its end the connection ends too.
            return connection.recv(1) == b"+"
    except OSError:
        return False


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent goes, also when that is killed: Ray's own worker would
    look for its node for half a minute."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the process that started this one is gone already")


def main() -> None:
    node = os.getppid()
    address, *command = sys.argv[1:]
    if not hand_over(address, command):
        end_with(node)
        os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    del sys.path[0]  # this file's directory, whose names are not meant to be imported from there
    main()
