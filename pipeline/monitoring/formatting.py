"""Marks of states, and durations as text."""

from __future__ import annotations

from datetime import datetime

MARKS = {"done": "✓", "skipped": "↷", "failed": "✗", "stopped": "■", "running": "▶"}


def duration(seconds: float) -> str:
    """Seconds as people say them: `8.4 s`, `48 s`, `3:07 min`, `2:15 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def local_time(seconds: float, form: str) -> str:
    """Seconds since the epoch in this machine's time; the number itself where no calendar has it."""
    try:
        return datetime.fromtimestamp(seconds).strftime(form)
    except (OverflowError, ValueError, OSError):  # Beyond the year 9999.
        return str(seconds)
