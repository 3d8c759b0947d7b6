"""Processes of one engine live and die together: its actor, vLLM's core and vLLM's workers.

vLLM ends its processes when it is asked to, and its workers when their parent goes. It leaves a core alone
whose engine was killed, and an engine whose core was killed raises errors and lives. Here each ends the
other: an engine that lost a process is dead to its callers too, and is replaced like any that died.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait

ENGINE = "RAYLIGN_ENGINE"
"""Environment variable by which an engine tells its processes its own number."""
EXIT_LOST_PROCESS = 70
"""EX_SOFTWARE."""


class EngineProcesses:
    """The processes that vLLM starts for an engine, watched from the engine's own."""

    def __init__(self) -> None:
        self._stop: list[int] = []
        os.environ[ENGINE] = str(os.getpid())

    def watch(self) -> list[int]:
        """From now on, end this process when one of its processes ends. Returns their numbers: none where
        core and worker live in this one."""
        self.release()
        children = [child for child in multiprocessing.active_children() if child.is_alive()]
        if not children:
            return []
        reader, writer = os.pipe()
        self._stop = [writer]
        by_sentinel = {child.sentinel: f"{child.name} ({child.pid})" for child in children}
        args = (by_sentinel, reader)
        threading.Thread(target=_end_with_children, args=args, daemon=True, name="engine-processes").start()
        return [child.pid for child in children if child.pid is not None]

    def release(self) -> None:
        """They may end."""
        while self._stop:
            os.close(self._stop.pop())


def end_with_engine() -> None:
    """In a process of vLLM: end it, and the core that started it, as soon as the engine is gone."""
    engine = os.environ.get(ENGINE, "")
    if engine.isdigit() and int(engine) != os.getpid():
        watch = threading.Thread(target=_end_with, args=(int(engine),), daemon=True, name="engine-watch")
        watch.start()


def _end_with_children(by_sentinel: dict[int, str], stop: int) -> None:
    gone: Sequence[object] = wait([*by_sentinel, stop])
    os.close(stop)
    lost = [by_sentinel[one] for one in gone if isinstance(one, int) and one in by_sentinel]
    if not lost or stop in gone:
        return
    print(f"vLLM's process {lost[0]} has ended, and this engine with it", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST_PROCESS)


def _end_with(engine: int) -> None:
    parent = os.getppid()
    try:
        handle = os.pidfd_open(engine)
    except ProcessLookupError:
        handle = -1
    if handle >= 0:
        select.select([handle], [], [])
    if parent not in (1, engine):
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os._exit(EXIT_LOST_PROCESS)
