"""Asking a run to save and stop: a signal, or a file in its directory."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType


class StopRequests:
    """While entered, SIGTERM and SIGINT ask for a stop instead of killing; a second SIGINT interrupts.

    The stop file serves `raylign stop` on a cluster, where Ray kills a job three seconds after SIGTERM.
    """

    def __init__(self, stop_file: Path) -> None:
        self._file = stop_file
        self._signalled = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequests:
        self.arm()
        return self

    def arm(self) -> None:
        """Take the signals; again once Ray is connected, whose own handler aborts on SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                before = signal.signal(number, self._on_signal)
            except ValueError:  # Not the main thread: only the file can ask.
                break
            self._before.setdefault(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def asked(self) -> bool:
        """The run should save and stop at the next step."""
        return self._signalled or self._file.exists()
