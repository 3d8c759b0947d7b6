"""Looks at processes of the machine that this runs on: their state, their CPU time, and their pulse.

A module of its own, which a task on another node imports: it needs neither Ray nor anything of a run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from actors.cluster.hung import Look

Targets = Mapping[int, tuple[int, str]]
"""Process id and path of the pulse's file, by rank."""


def look_at(targets: Targets) -> dict[int, Look]:
    """A look at each process that is there."""
    found = {}
    for rank, (pid, path) in targets.items():
        with contextlib.suppress(psutil.Error):
            found[rank] = _look(psutil.Process(pid), _note(path))
    return found


def _look(process: psutil.Process, note: Mapping[str, Any]) -> Look:
    states, seconds = set(), 0.0
    # The states first: one that goes on meanwhile has been still no longer than was seen.
    family = [process, *process.children(recursive=True)]
    for number, one in enumerate(family):
        try:
            with one.oneshot():
                states.add(one.status())
                times = one.cpu_times()
            seconds += times.user + times.system
        except psutil.Error:
            if number == 0:
                raise
    return Look(
        stopped=psutil.STATUS_STOPPED in states,
        traced=psutil.STATUS_TRACING_STOP in states,
        cpu_s=seconds,
        beats=int(note.get("beats", 0)),
        doing=str(note.get("doing", "")),
        entered=dict(note.get("entered", {})),
    )


def _note(path: str) -> Mapping[str, Any]:
    """The last note of a pulse; empty where there is none, or it is longer than its record."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
