"""A script: runs one completion's code and its tests, after it has taken from itself what they must not have.

Started by `code_tests.py` with the task as JSON on its standard input. Writes, with the task's nonce before
it, a line for each test that passed and for each limit that the kernel refused.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1
NOBODY = 65534
FILE_BYTES = 1 << 26
OPEN_FILES = 256


def main() -> None:
    """Read the task, be limited, run it."""
    task = json.load(sys.stdin.buffer)
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    def say(*words: object) -> None:
        os.write(out, (" ".join(map(str, (task["nonce"], *words))) + "\n").encode())

    libc = ctypes.CDLL(None, use_errno=True)
    root = os.getuid() == 0 and not left_root()
    # A user namespace gives the right to the others, and counts processes by itself: outside of one, the
    # limit of processes is of all that the user has.
    apart = libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET) == 0
    if not apart:
        say("unlimited", "code has the network and any number of processes: there are no user namespaces")
    elif root:
        say("unlimited", "code has any number of processes: it runs as root, since others can't read Python")
    limit(task, apart)
    inside = os.fork()
    if inside:  # Outside the namespace: its end, or an alarm, takes all processes inside with it.
        signal.setitimer(signal.ITIMER_REAL, task["seconds"])
        os.waitpid(inside, 0)
        os._exit(0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    run(task["code"], task["tests"], say)
    os._exit(0)  # whatever threads the code has left


def left_root() -> bool:
    """Become nobody, with the working directory, where nobody can read Python's modules: for root the kernel
    counts no processes."""
    places = [place for place in sys.path if os.path.exists(place)]
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    readable = all(os.access(place, os.R_OK, effective_ids=True) for place in places) and bool(places)
    os.seteuid(0)
    os.setegid(0)
    if readable:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    return readable


def limit(task: dict[str, Any], apart: bool) -> None:
    """Limits of this process and of all that it starts."""
    cpu, memory = int(task["seconds"]) + 1, task["memory_mb"] << 20
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if apart:
        limits[resource.RLIMIT_NPROC] = task["processes"] + 1  # and this one, which waits
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def run(code: str, tests: list[str], say: Any) -> None:
    """Run the code, then each test in the names that it has left; say which passed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(code, "completion", "exec"), names)
    except BaseException:  # also an exit, which must not end the tests as if they had passed
        return
    for index, test in enumerate(tests):
        try:
            exec(compile(test, f"test {index}", "exec"), names)
        except BaseException:
            continue
        say("passed", index)


if __name__ == "__main__":
    main()
