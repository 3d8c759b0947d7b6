"""Memory that was freed, and that the C library keeps: small pieces lie in heaps of threads, or between large
ones, where nobody fills them again."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Return it to the system. Without it loading kept 1.4 times a base of many experts, and all of a base
    that is quantised weight by weight."""
    with suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)
