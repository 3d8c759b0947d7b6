"""Bounds of compressed files: a few bytes can unpack to more than a machine has."""

from __future__ import annotations

import gzip
from pathlib import Path

from actors.errors import UserError

MOST_UNPACKED = 4 << 30
"""Bytes that a compressed file may unpack to."""
MOST_RATIO = 200
"""Bytes for each one of the file. Text packs to a tenth, lines that are all alike to a thirtieth."""
ALWAYS_FINE = 256 << 20
"""Bytes that a file of any size may unpack to."""
ENTRY = 64
"""Bytes that count for each line, list and object beside its text: what Python takes for it, at least."""

_CHUNK = 1 << 20


class Unpacked:
    """Size of a compressed file's content so far, refused once it is too large."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.packed = file.stat().st_size
        self.most = min(MOST_UNPACKED, max(ALWAYS_FINE, MOST_RATIO * self.packed))
        self.size = 0

    def add(self, size: int, entries: int) -> None:
        """Count bytes, and what else costs memory.

        Raises:
            UserError: this is more than the file may hold.
        """
        self.size += size + ENTRY * entries
        if self.size > self.most:
            rule = "the most of one file"
            if self.most < MOST_UNPACKED:
                rule = f"{MOST_RATIO} times its size, at least {ALWAYS_FINE >> 20} MiB"
            raise UserError(
                f"data source '{self.file}': {self.packed:,} bytes that unpack to more than "
                f"{self.most >> 20:,} MiB ({rule}); if they are meant to, split the file, or unpack it and "
                "name what came out"
            )


def gzip_bytes(file: Path) -> bytes:
    """Content of a .gz, which is first unpacked without being kept: what is too large takes no memory.

    Raises:
        UserError: it is too large.
        OSError, EOFError, zlib.error: it can't be read, or is damaged.
    """
    with gzip.open(file) as packed:
        count = Unpacked(file)
        for chunk in iter(lambda: packed.read(_CHUNK), b""):
            count.add(len(chunk), sum(map(chunk.count, (b"\n", b"{", b"["))))
        packed.seek(0)
        return packed.read()
