"""Processes in which a user's functions are called, seen from the run's process; their inside is `child.py`.

One for each module, started once and used for the whole run, since the functions of a module share its
clients, locks and models. It is killed when a call overruns its deadline, with all that it has started, and a
fresh one takes its place.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.rewards.calling import packed
from pipeline.rewards.values import RewardCall

IMPORT_S = 600.0
"""Seconds that the import of a user's module may take. It is no part of a call's `timeout_s`."""
LOOK_S = 0.2
"""Seconds between two looks at whether the process is still there: its end of the connection may be held open
by a process that it has started."""
CLOSE_S = 5.0
"""Seconds to an idle process for what a user's module does at its exit."""

CHUNK = 1 << 16
"""Bytes that are read at once of what a process prints, and characters of a line that is not waited for."""

ROOT = Path(__file__).resolve().parents[2]
_ENTRY = "import sys; sys.path.insert(0, sys.argv.pop()); "


class Late(Exception):
    """Raised where nothing came in time."""


class Gone(Exception):
    """Raised where the process has ended; its text says how."""


@dataclass(frozen=True)
class LoadedCode:
    """The code that a process loads: a module's, or one function by itself."""

    module: str
    payload: bytes = b""
    """The function pickled with all that it refers to, where no module can be imported for it."""


class UserProcess:
    """A process that has loaded a module of the user's; what is asked of it, its kinds say."""

    ENTRY = "from pipeline.rewards.child import main; main()"
    """Code that it runs, once Raylign can be imported."""

    def __init__(self, code: LoadedCode) -> None:
        """Start it, without waiting for the import."""
        self._code = code
        self._busy = False
        self._owner = os.getpid()
        self._start()

    def close(self) -> None:
        """End it: at once while it is in a call or an import, else after what its module does at exit."""
        if os.getpid() != self._owner:  # A fork of the run's process, whose exit is none of its concern.
            return
        self.hang_up()
        if not self._busy and self._problem is not None:
            self._ended(CLOSE_S)
        self._stop()

    def hang_up(self) -> None:
        """Let it end by itself."""
        self._connection.close()

    def _start(self) -> None:
        import socket
        from multiprocessing.connection import Connection

        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    _ENTRY + self.ENTRY,
                    str(theirs.fileno()),
                    str(os.getpid()),
                    str(ROOT),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group to kill, out of reach of the terminal's Ctrl-C
            )
        self._connection = Connection(ours.detach())
        self._forwarders = [
            _in_thread(_forward, self._popen.stdout, "stdout"),
            _in_thread(_forward, self._popen.stderr, "stderr"),
        ]
        self._send((list(sys.path), list(sys.argv), self._code.module, self._code.payload))
        self._problem: str | None = None

    def _loaded(self) -> str:
        """Wait for the import; what is wrong with it, or an empty text."""
        if self._problem is None:
            try:
                kind, *reply = self._receive(IMPORT_S)
            except Gone as gone:
                self._problem = str(gone)
            except Late:
                self._problem = f"no end of its import within {IMPORT_S:g} s"
                self._stop()
            else:
                self._problem = reply[0] if kind == "failed" else ""
        return self._problem

    def _send(self, message: tuple[Any, ...]) -> None:
        """In a thread, since a process that doesn't read would hold this one up for ever."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        _in_thread(send_bytes, self._connection, data)

    def _receive(self, seconds: float) -> tuple[Any, ...]:
        """The next message.

        Raises:
            Late: it was not ready in time; one that comes late is not taken. One that was, while this
                process stood still, is.
            Gone: the process has ended.
        """
        deadline = time.monotonic() + seconds
        try:
            while True:
                left = deadline - time.monotonic()
                if self._connection.poll(max(0.0, min(left, LOOK_S))):
                    ready, message = pickle.loads(self._connection.recv_bytes())
                    if ready > deadline:
                        raise Late
                    return cast(tuple[Any, ...], message)
                if left <= 0:
                    raise Late
                if self._ended() and not self._connection.poll(0):
                    raise Gone(self._how_it_ended())
        except (EOFError, OSError):
            raise Gone(self._how_it_ended()) from None

    def _ended(self, seconds: float = 0.0) -> bool:
        """True once the process has ended, waiting up to `seconds` for it. `_stop` reaps it: until then its
        group's number is its own."""
        deadline = time.monotonic() + seconds
        while self._popen.returncode is None:
            if os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def _how_it_ended(self) -> str:
        if not self._ended(LOOK_S):
            return "it closed its process's connection"
        self._stop()
        code = self._popen.returncode
        if code <= 128:
            return f"it ended its process (exit code {code})"
        name = (
            signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
        )
        why = {
            "SIGKILL": ": out of memory, or ended by somebody",
            "SIGSEGV": ": a crash in compiled code",
            "SIGABRT": ": a crash in compiled code",
        }.get(name, "")
        return f"its process was ended by {name}{why}"

    def _renew(self) -> None:
        self._stop()
        self._start()

    def _stop(self) -> None:
        """Kill the process and all that it has started; its last words are on the screen afterwards."""
        from pipeline.rewards.child import end_group

        if self._popen.returncode is None:
            end_group(self._popen.pid)
            self._popen.wait()
        for thread in self._forwarders:
            thread.join(1.0)
        self._connection.close()
        self._busy = False


class FunctionProcess(UserProcess):
    """A process that serves the functions of one module; several threads' calls come one after the other."""

    def __init__(self, code: LoadedCode) -> None:
        self._lock = threading.Lock()
        super().__init__(code)

    def find(self, name: str) -> tuple[Any, ...]:
        """("found", arguments, those needed, True for any others); ("uncallable", type); ("failed", text)."""
        with self._lock:
            return self._find(name)

    def call(self, name: str, given: Mapping[str, Sequence[Any]], n: int, timeout_s: float) -> RewardCall:
        """Call a function once with all `n` samples, as TRL does: one without **kwargs gets only what it
        names. A process that overruns the deadline, or ends, is replaced for the next call."""
        first = "the first of them is shown"
        with self._lock:
            try:
                found, *rest = self._find(name)
                if found != "found":
                    self._renew()
                    problem = f"it cannot be imported ({rest[0]})"
                    return RewardCall([None] * n, problem, tuple(range(n)))
                names, _, any_name = rest
                wanted = {key: values for key, values in given.items() if any_name or key in names}
                kind, *reply = self._ask(("call", name, n, timeout_s, packed(wanted)), timeout_s)
            except Late as late:
                self._renew()
                problem = str(late) or f"no answer within {timeout_s:g} s for {n} samples; {first}"
            except Gone as gone:
                self._renew()
                problem = f"{gone}, in a call with {n} samples; {first}"
            else:
                if kind == "done":
                    return RewardCall(*reply)
                problem = f"it failed: {reply[0]}"
        return RewardCall([None] * n, problem, tuple(range(n)))

    def _start(self) -> None:
        super()._start()
        self._found: dict[str, tuple[Any, ...]] = {}

    def _find(self, name: str) -> tuple[Any, ...]:
        if name not in self._found:
            try:
                problem = self._loaded()
                self._found[name] = ("failed", problem) if problem else self._ask(("find", name), IMPORT_S)
            except Late:
                self._stop()
                return "failed", f"no answer of its module within {IMPORT_S:g} s"
            except Gone as gone:
                return "failed", str(gone)
        return self._found[name]

    def _ask(self, request: tuple[Any, ...], seconds: float) -> tuple[Any, ...]:
        """The reply to a request. Late has the text of what the function raised, where it got so far."""
        self._busy = True
        self._send(request)
        deadline = time.monotonic() + seconds
        reply = self._receive(seconds)
        if reply[0] == "raised":
            try:
                reply = self._receive(deadline - time.monotonic())
            except Late:
                raise Late(reply[1]) from None
        self._busy = False
        return reply


def _in_thread(target: Any, *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True, name="function-process")
    thread.start()
    return thread


def send_bytes(connection: Any, data: bytes) -> None:
    """Send, whether anybody is still there or not."""
    with suppress(OSError, ValueError):  # whoever waits for the answer learns that the process is gone
        connection.send_bytes(data)


def _forward(pipe: Any, name: str) -> None:
    """Text of the process to this one's stream of that name: whole lines, since a live display breaks others,
    and nothing that acts on the terminal."""
    import codecs

    from pipeline.monitoring.printable import printable_log

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    with pipe:
        while data := pipe.read1(CHUNK):
            text = rest + decoder.decode(data)
            end = text.rfind("\n") + 1 or (len(text) if len(text) > CHUNK else 0)
            text, rest = text[:end], text[end:]
            _write(name, printable_log(text))
    _write(name, printable_log(rest))


def _write(name: str, text: str) -> None:
    with suppress(Exception):  # The screen is gone: read on, or the function would wait for ever.
        stream = getattr(sys, name)
        stream.write(text)
        stream.flush()
