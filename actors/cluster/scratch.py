"""Temporary directories that go with the process that made them, also when that is killed with -9.

Each holds a locked file, whose lock the kernel takes back when the process ends. What a killed process left
is removed by the next one of this machine and user that makes such a directory in the same place.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from actors.errors import UserError

PREFIX = "raylign-"
LOCK = "lock"
"""File in a scratch directory: locked as long as its process lives, and holds the machine's name, since a
lock on a shared disk may be one of each machine's own."""
LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket (`sun_path` of unix(7), without the final zero)."""
OWN_NAME = len(f"/{PREFIX}12345678")
"""Bytes that a scratch directory adds to the path it is made in."""
PLAIN = re.compile(r"[^\x00-\x1f\x7f-\U0010ffff'\"\\\\]+")
"""Paths that Ray takes for its files: its processes' command lines are not safe for quotes, and its encoding
of paths is ASCII."""
REMOVAL_S = 2.0
"""Seconds to go on removing what ending processes still write to."""


class Scratch:
    """A directory of this process, made at once, and removed at its end at the latest."""

    def __init__(self, socket_room: int = 0) -> None:
        """`socket_room`: bytes that the longest name of a socket below it adds to its path; 0: none is made.

        The place is that of Python's `tempfile` (TMPDIR), or another one where a socket would not fit. For
        sockets RAY_TMPDIR goes first, as in Ray.

        Raises:
            UserError: there is no place that can be written; names the variable.
        """
        root = _root(socket_room)
        sweep(root)
        try:
            self.path, self._lock = _locked_directory(root)
        except OSError as error:
            raise UserError(_unusable(root, error)) from None
        self._owner = os.getpid()
        atexit.register(self.remove)

    def remove(self) -> None:
        """Remove it with all that is in it. Never raises."""
        if os.getpid() != self._owner:  # a fork of the process
            return
        deadline = time.monotonic() + REMOVAL_S
        while True:
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists() or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.leave()

    def leave(self) -> None:
        """Keep what is in it, until another process makes a scratch directory in the same place."""
        atexit.unregister(self.remove)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def unfit(root: Path, socket_room: int, more: int = OWN_NAME) -> str | None:
    """The reason why sockets with names of `socket_room` bytes can't be made in a directory of `more` bytes
    below `root`; None: they can, or none is asked for."""
    path = str(root.absolute())
    longest = LONGEST_SOCKET - more - socket_room
    if not socket_room:
        return None
    if len(os.fsencode(path)) > longest:
        return f"longer than the {longest} bytes that its sockets leave"
    return None if PLAIN.fullmatch(path) else "with characters that it doesn't take in the path of its files"


def sweep(root: Path) -> None:
    """Remove scratch directories of this user and machine whose process is gone. Never raises."""
    with contextlib.suppress(OSError):
        for path in root.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError), _held_if_dead(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _held_if_dead(path: Path) -> Iterator[None]:
    """Hold the lock of another's directory. OSError: it is not ours, not from here, or its process lives."""
    if path.is_symlink() or path.stat().st_uid != os.geteuid():
        raise PermissionError(path)
    with (path / LOCK).open("r+") as lock:
        if lock.read() != socket.gethostname():
            raise PermissionError(path)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _locked_directory(root: Path) -> tuple[Path, int]:
    """A new directory, and the descriptor of its lock, which is held from the moment that it can be seen."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    try:
        aside = directory / f"{LOCK}.new"
        lock = os.open(aside, os.O_CREAT | os.O_RDWR, 0o600)
        os.write(lock, socket.gethostname().encode())
        fcntl.flock(lock, fcntl.LOCK_EX)
        aside.rename(directory / LOCK)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory, lock


def _root(socket_room: int) -> Path:
    """The directory to make one in."""
    chosen = os.environ.get("RAY_TMPDIR") if socket_room else None
    if chosen:
        return _chosen_root(Path(chosen), socket_room)
    try:
        usual = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"TMPDIR: no directory for temporary files can be written ({error.strerror}); set it to one"
        ) from None
    for root in (Path(usual), Path("/tmp"), Path("/var/tmp")):
        if unfit(root, socket_room) is None and os.access(root, os.W_OK | os.X_OK):
            return root.absolute()
    reason = unfit(Path(usual), socket_room) or "read-only"
    raise UserError(
        f"TMPDIR: {usual} can't hold Ray's files: it is {reason}; and /tmp can't be written. Set RAY_TMPDIR "
        "to a directory with a short path"
    )


def _chosen_root(root: Path, socket_room: int) -> Path:
    reason = unfit(root, socket_room)
    if reason is not None:
        raise UserError(
            f"RAY_TMPDIR: {root} can't hold Ray's files: it is {reason}; set it to another path, or unset it"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"RAY_TMPDIR: {root} can't be made ({error.strerror}); set another, or unset it"
        ) from None
    return root.absolute()


def _unusable(root: Path, error: OSError) -> str:
    chosen = os.environ.get("RAY_TMPDIR")
    name = "RAY_TMPDIR" if chosen and Path(chosen).absolute() == root else "TMPDIR"
    return f"{name}: temporary files can't be made in {root} ({error.strerror}); set it to another directory"
