"""Asking a run to save and stop: a signal, or a file in its directory.

- The first request is answered at once, whatever the run is doing: with what will be finished and saved, by
  the run's own account (`begin`). A thread does that, woken by the interpreter as soon as a signal arrives,
  while the main thread may be waiting for Ray or be inside of a long native call.
- Where nothing would be lost (start-up, between stages, evaluations) the main thread is cut short there and
  then: its handler raises KeyboardInterrupt, the one exception that Ray's waits let through, and `cut` tells
  it from a second signal's. Else it ends what it is doing, and `begin` says no to the next step.
- A second signal raises KeyboardInterrupt. Should that not end the process within `FORCE_S`, the thread does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from actors.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FILE_S = 1.0
"""Seconds between two looks for the stop file: it can lie on a network disk."""
POKE_S = 0.3
"""Seconds after which the handler of a second signal should have run. Python merges signals that come while
the main thread is in one native call."""
INSIST_S = 1.0
"""Seconds that the main thread gets to leave work that is cut short, before it is interrupted again."""
FORCE_S = 3.0
"""Seconds that the processes of a run get to end after a second signal."""
ANSWER_S = 1.0
"""Seconds that the answer to a request may take, before what comes of it is printed anyway."""
AGAIN = "; again: stop now without saving"


@dataclass(frozen=True)
class Doing:
    """Work of the run, from the point of view of somebody who stops it."""

    answer: str
    """Outcome of it: "stopping after step 8, then saving"."""
    at_once: bool = False
    """It is cut short, since nothing is lost with it."""
    ends: bool = False
    """The run is ending anyway, its processes with it: no signal may cut that short."""


START_UP = Doing("stopping at once: no step has begun, so there is nothing to save", at_once=True)
REPORTING = Doing("stopping at once: all is saved, the report is left out", at_once=True)
ENDING = Doing("the run is ending already", ends=True)


class StopRequests:
    """While entered, SIGTERM, SIGINT and SIGHUP ask for a stop instead of killing; a second SIGTERM or SIGINT
    ends the run without saving. A second SIGHUP doesn't: shells send their jobs the one that these had from
    the kernel. Under `nohup` SIGHUP stays ignored.

    The stop file serves `raylign stop` on a cluster, where Ray kills a job three seconds after SIGTERM. In
    another thread than the main one there are no signals, and only the file can ask.
    """

    def __init__(
        self, say: Callable[[str], None], stop_file: Path | None = None, *, to_the_end: bool = False
    ) -> None:
        """`say` prints a line; it is called from a thread, and must not raise. `to_the_end`: the process ends
        after this, and signals that still come shall not change its exit code."""
        self.say, self.stop_file, self._to_the_end = say, stop_file, to_the_end
        self._doing = START_UP
        self._asked = False
        self._lock = threading.Lock()
        """Of `_doing` and `_asked`, for everybody but the signal handler: what is said is what happens."""
        # Of the handler, which runs in the main thread between two bytecodes and can't take a lock.
        self._signals = 0
        self._stopped: Doing | None = None
        """Work that the first signal found, where the handler was faster than the thread that answers it."""
        self._cut = self._interrupted = self._forced = self._poked = False
        self._again: Doing | None = None
        """Work that was cut short, and goes on all the same."""
        self._term: float | None = None
        """Time of the first SIGTERM (time.monotonic())."""
        self._by_file = 0
        """1: the file asked first, and what comes next is the second request."""
        self._own = False
        """The next signal is this object's own."""
        self._answered = threading.Event()
        self._leaving, self._left = threading.Lock(), False
        """No signal of this object's own may come when the handlers are those of before."""
        self._handlers: dict[int, signal._HANDLER] = {}
        self._woken, self._wakes = socket.socketpair()
        self._earlier_wakeup = -1
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stop-requests")

    def __enter__(self) -> StopRequests:
        self._wakes.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._earlier_wakeup = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._leaving:
            self._left = True
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._to_the_end and self._signals else handler)
        if self._handlers:
            signal.set_wakeup_fd(self._earlier_wakeup)
        self._wakes.close()  # The thread reads the end of it.
        self._thread.join()
        self._woken.close()

    # --- For the run ------------------------------------------------------------------------------

    def begin(self, answer: str, *, at_once: bool = False) -> bool:
        """Say what a stop would come to from now on; False, and nothing changes, where one was asked for:
        then the run must not begin what it was about to."""
        self._look_for_file()
        with self._lock:
            if self._signals or self._asked:
                return False
            self._doing = Doing(answer, at_once)
            return True

    def begin_at_once(self, answer: str) -> None:
        """Begin what is cut short by a stop.

        Raises:
            KeyboardInterrupt: a stop was asked for; also later, at any point of the work. `cut` is True then.
        """
        if not self.begin(f"stopping at once: {answer}", at_once=True):
            self._cut = True
            raise KeyboardInterrupt

    def finish(self, doing: Doing) -> None:
        """As `begin`, for what is done at the end whether or not a stop was asked for."""
        with self._lock:
            self._doing = doing

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """At the end of what is done inside, however it ends, nothing is cut short any more."""
        try:
            yield
        finally:
            self.finish(ENDING)

    @property
    def cut(self) -> bool:
        """A KeyboardInterrupt that was caught is a stop where nothing was to be saved. It has been answered
        then, so that what is printed next stands below."""
        if self._cut and not self._interrupted:
            self._answered.wait(ANSWER_S)
            return True
        return False

    def asked(self) -> bool:
        """The run should save and stop."""
        self._look_for_file()
        return bool(self._signals) or self._asked

    def left(self, grace_s: float) -> float | None:
        """Seconds that are left of a grace period, which SIGTERM begins; None: there was none."""
        return None if self._term is None else self._term + grace_s - time.monotonic()

    # --- Signals ----------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.alarm(0)  # Ray's own handler, if it was the first to know, would abort the process.
        if self._poked:
            self._poked = False
        elif number == signal.SIGHUP and self._signals:
            return
        else:
            self._signals += 1
            if number == signal.SIGTERM and self._term is None:
                self._term = time.monotonic()
            self._stopped = self._stopped or self._doing
        if self._doing.ends:
            return
        if self._doing.at_once and (not self._cut or self._again is self._doing):
            self._cut, self._again = True, None
            raise KeyboardInterrupt
        if (self._signals + self._by_file > 1 or self._forced) and not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Answer signals, which arrive as a byte each, and look for the file, until the run is left."""
        signals = 0
        while True:
            if not select.select([self._woken], [], [], FILE_S)[0]:
                self._look_for_file()
                continue
            arrived = self._woken.recv(64)
            if not arrived:
                return
            for number in arrived:
                if self._own:
                    self._own = False
                elif number in self._handlers and not (number == signal.SIGHUP and signals):
                    signals += 1
                    self._answer(signals + self._by_file)

    def _answer(self, requests: int) -> None:
        if requests == 1:
            self._ask()
        elif requests == 2:
            threading.Thread(target=self._force, daemon=True, name="force-end").start()
            lost = not (self._doing.at_once or self._doing.ends)
            self.say("stopping now" + (" without saving" if lost else ""))

    def _ask(self) -> None:
        with self._lock:
            self._asked = True
            doing = self._stopped or self._doing
        self.say(doing.answer + ("" if doing.at_once or doing.ends else AGAIN))
        self._answered.set()
        if doing.at_once and self._handlers:
            by_file = self._by_file and threading.current_thread() is self._thread
            threading.Thread(target=self._insist, args=(doing, by_file), daemon=True, name="cut").start()

    def _look_for_file(self) -> None:
        if self._asked or self.stop_file is None or not self.stop_file.exists():
            return
        with self._lock:
            if self._asked:
                return
            self._asked, self._by_file = True, 1
        self._ask()

    def _insist(self, doing: Doing, now: bool) -> None:
        """Interrupt the main thread until it has left what is cut short: an exception that is raised inside a
        destructor, or a callback of native code, is printed and lost. `now`: no signal has done so yet."""
        while True:
            if not now:
                self._thread.join(INSIST_S)
                if self._doing is not doing or not self._thread.is_alive():
                    return
            now, self._again = False, doing
            self._poke()

    def _poke(self) -> None:
        """Let the handler run in the main thread, whatever that waits for."""
        with self._leaving:
            if not self._left:
                self._own = self._poked = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _force(self) -> None:
        """End the process with all that it started, should it still be there after `FORCE_S`."""
        self._thread.join(POKE_S)
        if not (self._interrupted or self._doing.ends) and self._thread.is_alive():
            self._forced = True
            self._poke()
        self._thread.join(FORCE_S)
        if self._thread.is_alive():
            kill_descendants()
            os._exit(EXIT_INTERRUPTED)


def kill_descendants() -> None:
    """SIGKILL every process that this one has started, directly or not."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
