"""A process and all that it has started, as Linux shows them: who they are, and their CPU time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.meter import TICKS


def tree(root: int) -> dict[int, tuple[str, float]]:
    """pid -> (name, CPU seconds so far) of `root` and every living descendant."""
    found: dict[int, tuple[int, str, float]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
            fields = rest.split()
            seconds = (int(fields[11]) + int(fields[12])) / TICKS
            found[int(stat.parent.name)] = int(fields[1]), head.partition("(")[2], seconds
        except OSError:  # it has ended meanwhile
            continue
    members = {root} & found.keys()
    while True:
        more = {pid for pid, (parent, _, _) in found.items() if parent in members} - members
        if not more:
            return {pid: found[pid][1:] for pid in sorted(members)}
        members |= more


def tree_cpu_seconds(root: int) -> float:
    """CPU seconds of `root` and every living descendant."""
    return sum(seconds for _, seconds in tree(root).values())


def pin(pid: int, cores: set[int]) -> None:
    """Keep a process, all its threads and those that it starts later on these cores."""
    import os

    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)
