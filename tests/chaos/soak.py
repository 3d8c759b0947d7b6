"""A long run in which processes are killed all the time: does anything grow? (`make soak`)

python -m tests.chaos.soak                        # 500 steps of GRPO, a kill every 25
python -m tests.chaos.soak --steps 100 --every 20
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.chaos import bases
from tests.chaos.cells import kind_of
from tests.chaos.observe import SHM, Life, Tail, beginnings, held, send, steps
from tests.whole_runs.runs import ROOT

PAGE = ROOT / "docs" / "chaos.md"
BEGINS, ENDS = "<!-- made by `make soak` -->", "<!-- end of what `make soak` made -->"
VICTIMS = ("rollout-0", "policy-1", "rollout-1", "policy-0")
EVERYONE = ("driver", "raylet", "gcs", *sorted(VICTIMS))
SETTLED = 0.2
"""Part of the steps that is left out of the slopes: caches fill."""
MIB = 2**20
SAMPLE_S = 1.0


@dataclass
class Watch:
    """Samples of what may grow: by name, (step, value)."""

    values: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def take(self, life: Life, step: int) -> None:
        """One look at the run."""
        for who in EVERYONE:
            pid = life.pid(who)
            if pid is None or not psutil.pid_exists(pid):
                continue
            try:
                process = psutil.Process(pid)
                self._add(f"{who}: memory, MiB", step, process.memory_info().rss / MIB)
                self._add(f"{who}: descriptors", step, process.num_fds())
                self._add(f"{who}: threads", step, process.num_threads())
            except psutil.Error:
                continue
        ours = {one.pid for one in life.ours()}
        self._add("processes", step, len(ours))
        self._add("/dev/shm: files of nobody", step, len({one.name for one in SHM.iterdir()} - held()))
        self._add("temporary files, MiB", step, size(life.temporary) / MIB)
        self._add("logs without traces, MiB", step, size(life.run / "logs", leave_out="trace") / MIB)

    def _add(self, name: str, step: int, value: float) -> None:
        self.values.setdefault(name, []).append((step, value))

    def rows(self, total: int) -> list[str]:
        """Lines of the table: the medians of the second and the last fifth, and the slope between them."""
        lines = ["| | second fifth | last fifth | slope per 100 steps |", "|---|---|---|---|"]
        for name, found in sorted(self.values.items()):
            at, values = np.array(found).T
            early = values[(at >= SETTLED * total) & (at < 2 * SETTLED * total)]
            late, settled = values[at >= (1 - SETTLED) * total], at >= SETTLED * total
            if not len(early) or not len(late) or len({*at[settled]}) < 2:
                continue
            slope = round(100 * np.polyfit(at[settled], values[settled], 1)[0], 2) + 0.0  # no -0.00
            lines.append(f"| {name} | {np.median(early):.1f} | {np.median(late):.1f} | {slope:+.2f} |")
        return lines


def size(directory: Path, leave_out: str = "") -> int:
    """Bytes of the files below a directory."""
    total = 0
    for path, names, files in os.walk(directory):
        names[:] = [name for name in names if name != leave_out]
        for name in files:
            try:
                total += (Path(path) / name).lstat().st_size
            except OSError:
                continue
    return total


@dataclass
class Story:
    """What happened on the way."""

    killed: list[str] = field(default_factory=list)
    """Names of the processes that were, in order."""
    starts: int = 0
    seconds: list[float] = field(default_factory=list)
    """From each kill to the end of the next step."""
    losses: Counter[str] = field(default_factory=Counter)
    """What the run said of lost processes, without numbers, and how often."""

    def hear(self, life: Life) -> None:
        """Take what a life of the run has said, once it has ended."""
        life.hear_out()
        self.losses += losses(text for _, text in life.said)

    def rows(self, lives: Mapping[str, int]) -> list[str]:
        """Lines on how often each process was begun, by its name, and what was said of it.

        A loss of one rank gives all ranks of its role fresh processes; one of an engine, that engine alone.
        """
        lines = ["| | killed | fresh processes for that | lives |", "|---|---|---|---|"]
        explained = self.starts == 1
        for who in sorted(lives):
            together = [one for one in self.killed if kind_of(one) == kind_of(who)]
            fresh = len(together) if kind_of(who) == "policy" else self.killed.count(who)
            explained = explained and lives[who] <= 1 + fresh
            lines.append(f"| {who} | {self.killed.count(who)} | {fresh} | {lives[who]} |")
        lines += [
            "",
            f"Lives explained by kills: {'yes' if explained else '**no**'}. Said of lost processes:",
            "",
        ]
        return lines + ([f"- {n} x {text}" for text, n in self.losses.most_common()] or ["- nothing"])


LOSS = re.compile(r"(\w+)(?:-\d+| ranks [\d, ]+) (was lost: |failed in )([^;]*)")
"""A process that was lost, in a line of a run."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def losses(lines: Iterable[str]) -> Counter[str]:
    """How often lines say that a process of a role was lost, by what they say, numbers left out."""
    found = (one.groups() for line in lines for one in LOSS.finditer(line))
    return Counter(f"{role} {NUMBER.sub('N', how + why).strip()}" for role, how, why in found)


def main() -> int:
    """Run it and write the page; 1 where the run could not be brought to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--patience", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # No run outlives this script.
    shutil.rmtree(options.work, ignore_errors=True)
    place, temporary = options.work.resolve(), Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    place.mkdir(parents=True)
    command = bases.command_for(place, bases.grpo(place / "run", options.steps, options.patience))
    watch, story, began = Watch(), Story(), time.monotonic()
    try:
        code = soak(lambda: Life(command, place, place / "run", temporary), options, watch, story)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    (place / "samples.json").write_text(json.dumps(watch.values))
    lives = {who: len(beginnings(place / "run", who)) for who in VICTIMS}
    above = told(options, story, time.monotonic() - began)
    made = "\n".join([BEGINS, above, "", *watch.rows(options.steps), "", *story.rows(lives), ENDS])
    print(made)
    if code == 0:
        before, _, rest = PAGE.read_text().partition(BEGINS)
        PAGE.write_text(before + made + rest.partition(ENDS)[2])
    return code


def told(options: argparse.Namespace, story: Story, seconds: float) -> str:
    """The line above the table."""
    ordered = sorted(story.seconds) or [0.0]
    return (
        f"Made on {time.strftime('%Y-%m-%d')} on {os.cpu_count()} cores: {options.steps} steps in "
        f"{seconds / 60:.1f} minutes, {len(story.killed)} processes killed in turns ({', '.join(VICTIMS)}), "
        f"the run started {story.starts} times. From a kill to the end of the next step: median "
        f"{ordered[len(ordered) // 2]:.1f} s, at most {ordered[-1]:.1f} s. Medians over samples of a second; "
        "the slope is a least-squares line through all samples but those of the first fifth."
    )


def soak(begin: Callable[[], Life], options: argparse.Namespace, watch: Watch, story: Story) -> int:
    """Let the run go to its end, killing a process every so many steps; it is started again where it ends
    before. The exit code of the last life, 1 where no step was done for long."""
    life = begin()
    metrics = Tail(life.run / "grpo" / "metrics.jsonl")
    story.starts, next_kill, killed, sampled, moved, last = 1, options.every, None, 0.0, time.time(), -1
    try:
        while True:
            now, step = time.time(), steps(metrics.rows())
            if step != last:
                moved, last = now, step
            if killed is not None and step > killed[1]:
                story.seconds.append(now - killed[0])
                killed = None
            if now - sampled > SAMPLE_S and step < options.steps:  # Not of a run that shuts down.
                watch.take(life, step)
                sampled = now
            if life.code == 0 or now - moved > 180 * options.patience:
                return 0 if life.code == 0 else 1
            if life.code is not None:
                life.end()
                story.hear(life)
                life = begin()
                story.starts += 1
                moved = now
            victim = VICTIMS[len(story.killed) % len(VICTIMS)]
            pid = life.pid(victim) if step >= next_kill else None
            if pid is not None:
                send(pid, "kill")
                killed, next_kill = (time.time(), step), next_kill + options.every
                story.killed.append(victim)
            time.sleep(0.02)
    finally:
        life.end()
        story.hear(life)


if __name__ == "__main__":
    sys.exit(main())
