"""Entry of a process in which the functions of one module of the user's are called.

A function may do anything: hold the interpreter for hours in a regular expression, set an alarm, end the
process. Here that hurts no one: it works in the main thread of a process that is killed when its time is
over.

The process is two. The first one leads the group and does nothing but wait: for the second, which does the
work, and for the end of the run's process, whose death it answers by killing the group, processes that the
functions have started included. It can always do so, whatever the second is busy with.

Loads nothing but Python's own modules, so that it is ready in a tenth of a second.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from pipeline.rewards.calling import answer, taken

LOOK_S = 0.5
"""Seconds between two looks at whether the run's process is still there."""
ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask the run to stop. Sent to all processes of a job they reach this one too, which has to work
on: the run finishes its step. It ends when the run closes its connection."""


def main(serve: Callable[[Connection], None] | None = None) -> None:
    """Serve the process that started this one; `sys.argv`: the connection's file descriptor, its pid.
    `serve`: in place of `serve_functions`."""
    descriptor, run = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    _leave_watch(run, descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    (serve or serve_functions)(Connection(descriptor))


def serve_functions(connection: Connection) -> None:
    """Load the user's code, then answer requests until the connection is closed.

    Messages are pickled tuples of Python's own types. First comes where to find the code, and its answer is
    ("loaded",) or ("failed", type and text). Then ("find", name) is answered by ("found", *taken) or
    ("failed", text); ("call", name, samples, seconds, arguments) by ("done", values, problem, bad), before
    which ("raised", text) may come. Each answer comes with the time at which it was ready, by the clock that
    all processes of a machine share.
    """
    send = sender(connection)
    find = load_first(connection, send)
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            reply = _reply(find, request, send)
        except BaseException as error:
            reply = "failed", shown(error)
        settle(send, reply)


def load_first(connection: Connection, send: Callable[..., None]) -> Callable[[str], Any]:
    """Import the user's code, which the first message tells of, and answer that; what looks its functions
    up."""
    try:
        find = load(*pickle.loads(connection.recv_bytes()))
        reply: tuple[Any, ...] = ("loaded",)
    except BaseException as error:  # a user's module can fail in any way while it is imported
        reply = "failed", shown(error)
        find = _nothing
    settle(send, reply)
    return find


def _nothing(name: str) -> Any:
    raise LookupError(f"{name}: its module was not imported")


def _reply(find: Callable[[str], Any], request: tuple[Any, ...], send: Callable[..., None]) -> Any:
    kind, name, *rest = request
    function = find(name)
    if kind == "find":
        if not callable(function):
            return "uncallable", type(function).__name__
        return "found", *taken(function)
    n, seconds, given = rest
    called = answer(function, given, n, seconds, lambda text: send(("raised", text)))
    return "done", called.values, called.problem, called.bad


def load(path: list[str], argv: list[str], module: str, payload: bytes) -> Callable[[str], Any]:
    """Looks up functions of `module`, imported as the run's process would; with a `payload` it is the one
    function, pickled."""
    sys.path[:], sys.argv[:] = path, argv
    if payload:
        function = pickle.loads(payload)
        return lambda name: function
    found = importlib.import_module(module)
    return lambda name: getattr(found, name)


def settle(send: Callable[..., None], reply: tuple[Any, ...]) -> None:
    """Send a reply, once what the function left behind is away: an alarm that would end this process, and
    text that was not written yet."""
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            break
        except BaseException:  # the alarm's handler, at the last moment
            continue
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # a function may have closed it
            continue
    send(reply)


def sender(connection: Connection) -> Callable[..., None]:
    def send(message: tuple[Any, ...]) -> None:
        connection.send_bytes(pickle.dumps((time.monotonic(), message), pickle.HIGHEST_PROTOCOL))

    return send


def _leave_watch(run: int, descriptor: int) -> None:
    """Return in a fork of this process, which waits for it and for the end of `run`.

    A poll of the parent's pid, since a signal of the kernel (PR_SET_PDEATHSIG) comes when the parent's
    *thread* ends and doesn't reach what functions have started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *ASKS})
    worker = os.fork()
    if worker == 0:
        for number in ASKS:
            signal.signal(number, _go_on)
        # Processes that a function forks are ended by `terminate()`, as ever, however soon it comes.
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_as_usual)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, *ASKS})
        return
    os.close(descriptor)
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_S)
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if os.getppid() != run:
            end_group(os.getpid())


def end_group(leader: int) -> None:
    """Kill a group of processes, and those below its leader that have left the group; the leader last."""
    import psutil

    try:
        below = psutil.Process(leader).children(recursive=True)
    except psutil.Error:
        below = []
    for process in below:
        with suppress(psutil.Error):
            process.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _go_on(number: int, frame: FrameType | None) -> None:
    """Handler of signals that are for the run."""


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS)


def _as_usual() -> None:
    for number in ASKS:
        if signal.getsignal(number) is _go_on:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _let_go()


def shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:2000]}"
    except Exception:  # a class of the user's own
        return type(error).__name__
