"""Standard output of a run, which outlives its reader: a terminal that is closed, or the `tee` of a pipe that
took the same Ctrl-C. What the run does (it saves) must not depend on whether somebody reads what it says."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO

GONE = (errno.EIO, errno.EPIPE)
"""A terminal that was hung up; a pipe or socket whose reader is gone."""


class LastingOutput:
    """A text file in front of another one, whose writes are dropped once nobody can read them."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        """Raises: OSError, but for a reader that is gone."""
        try:
            return self._out.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Raises: as `write`."""
        try:
            self._out.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send this text and all later ones nowhere: what is still in buffers would fail once more at the
        interpreter's end, which then exits with 120."""
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._out.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)
