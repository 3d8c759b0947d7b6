"""A disk of a few megabytes to fill, empty and make read-only: a tmpfs in a namespace of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

READY_S = 10.0


class SmallDisk:
    """Mounted for as long as this object is open. Others reach it through /proc, without any rights."""

    def __init__(self, mount_point: Path, size: str) -> None:
        """`size`: as mount takes it, `32m`.

        Raises:
            OSError: the kernel gives no such namespaces to this user.
        """
        self._shell = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh"], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._mount_point = mount_point
        self.path = Path(f"/proc/{self._shell.pid}/root{mount_point}")
        self._do(f"mount -t tmpfs -o size={size} none {mount_point}")

    def _do(self, command: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command} && echo done || echo failed\n")
        self._shell.stdin.flush()
        said = self._shell.stdout.readline().strip()
        if said != "done":
            raise OSError(f"{command}: {said}")

    def fill(self) -> None:
        """Leave no room."""
        block = bytes(4096)
        with (self.path / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(block)
                except OSError:
                    return

    def empty(self) -> None:
        """Take that back."""
        (self.path / "filler").unlink()

    def writable(self, yes: bool) -> None:
        """Let everybody write, or nobody. Raises: OSError, while somebody has a file open to write."""
        self._do(f"mount -o remount,{'rw' if yes else 'ro'} {self._mount_point}")

    def close(self) -> None:
        """Unmount it."""
        if self._shell.poll() is None:
            self._shell.kill()
        self._shell.wait()
        for pipe in (self._shell.stdin, self._shell.stdout):
            if pipe is not None:
                pipe.close()


def available() -> bool:
    """Namespaces with mounts of their own are to be had (not in every container)."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=READY_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
