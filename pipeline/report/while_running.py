"""The report of a run that works: a process of its own writes it every few minutes.

It may cost the run nothing: it yields the cores to it (nice 19), works for a twentieth of the time at most,
and is the first that a kernel short of memory ends. It can't harm the run either: what goes wrong in it is
one line of the run's output.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

FIRST_S, EVERY_S = 60.0, 180.0
"""From the start of the run to the first report, and between two of them."""

TIMES_ITS_WORK = 20
"""A report that is much work, of a run with a long history, is written less often: after so many times the
seconds of a core that the last one took."""

LIMIT_S = 1800.0
"""A report that takes longer is given up. The usual 3 s of a core take minutes where others want it too."""

NICENESS = 19
"""About 1.5 % of a core that another process wants too. With the scheduler's own class for idle work it would
be 0.3 %, and no report would come to an end on a machine that trains on all of its cores."""


class ReportWhileRunning:
    """Writes the report of `directory` from `start` to `stop`; neither raises."""

    def __init__(
        self,
        directory: Path,
        note: Callable[[str], None],
        *,
        first_s: float = FIRST_S,
        every_s: float = EVERY_S,
    ) -> None:
        self.directory, self.note = directory, note
        self.first_s, self.every_s = first_s, every_s
        self.process: subprocess.Popen[str] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._failed = False

    def start(self) -> None:
        """Begin; the first report comes later, so that a start has the machine for itself."""
        self._thread.start()

    def stop(self) -> None:
        """End, also in the middle of a report: the run writes its last one itself."""
        self._ending.set()
        process = self.process
        if process is not None and process.poll() is None:
            process.kill()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _work(self) -> None:
        wait = self.first_s
        while not self._ending.wait(wait):
            worked = 0.0
            try:
                worked = self._write()
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self._say(str(error))
            wait = max(self.every_s, TIMES_ITS_WORK * worked)

    def _write(self) -> float:
        """Write one; the seconds of a core that it took."""
        package = sys.modules[__name__.partition(".")[0]]
        root = str(Path(str(package.__file__)).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self.directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": path},
        )
        yield_everything(process.pid)
        try:
            if self._ending.is_set():  # Between the wait and the start of the process.
                process.kill()
            worked, said = process.communicate(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
            self._clear(process.pid)
        if process.returncode > 0:
            self._say(said.strip().rpartition("\n")[2] or f"exit code {process.returncode}")
        return float(worked) if process.returncode == 0 else 0.0

    def _clear(self, pid: int) -> None:
        """Remove what a report that was ended had begun to write."""
        with contextlib.suppress(OSError):
            for place in (self.directory, self.directory / "plots"):
                for aside in place.glob(f".*.{pid}.tmp"):
                    aside.unlink(missing_ok=True)

    def _say(self, reason: str) -> None:
        if not self._failed and not self._ending.is_set():
            self._failed = True
            self.note(f"the report could not be renewed while the run works ({reason}); it goes on without")


def yield_everything(pid: int) -> None:
    """Give a process what others leave: of the cores, and of the memory when it runs out."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def main(directory: str) -> int:
    """The process itself: writes the report once, and prints the seconds of a core that this took."""
    from actors.errors import UserError
    from pipeline.report.build import build_report

    try:
        build_report(directory, works=True)
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        return 1
    print(time.process_time())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
