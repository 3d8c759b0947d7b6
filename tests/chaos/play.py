"""One loss: wait for its moment, cause it, and see what becomes of the run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from pipeline.artifacts.manifest import file_digest
from tests.chaos.cells import Cell
from tests.chaos.observe import Life, Tail, alive, is_about, send, steps
from tests.chaos.scene import Outcome, Scene

LOOK_S = 0.001
DRIVER_STOPS_S = 10.0
"""A driver that was stopped is told to go on after so long: nobody else could."""
RAYS = ("raylet", "gcs")
"""Their loss ends a run, though a step that needs nothing of them may end before."""
TRIES = 6
EARLY_SHARE = 0.4


class Over(Exception):
    """The run ended by itself before the moment came."""


def strike(scene: Scene, cell: Cell, outcome: Outcome) -> tuple[float, int]:
    """Wait for a cell's moment and send the signal; its time (epoch) and the process.

    Raises:
        Over: the run ended before.
    """
    life, lengths = scene.life, scene.lengths
    assert life is not None
    assert lengths is not None
    who, call = cell.leader()
    after = life.began if cell.early else time.time()
    for attempt in range(TRIES):
        _wait(life, lambda: _is_on(life, who, call, after) and life.pid(cell.role) is not None)
        # Loading is done once in a life, and quicker where the machine has less to do.
        share = EARLY_SHARE if cell.early else 1 / 2**attempt
        wait_s = 0.05 if call is None else lengths.of(who, call) * cell.moment() * share
        time.sleep(wait_s)
        pid = life.pid(cell.role)
        if pid is None or life.code is not None:
            raise Over
        outcome.hit = _is_on(life, who, call, after)
        if outcome.hit or attempt == TRIES - 1 or cell.early:
            outcome.step = steps(Tail(scene.metrics).rows())
            send(pid, cell.way)
            return time.time(), pid
    raise AssertionError("unreachable")


def _is_on(life: Life, who: str, call: tuple[str, str] | None, after: float) -> bool:
    if call is not None:
        return life.calls(who).inside(call, after) is not None
    return bool(life.lives(who)) and not any(
        row["start"] >= after for row in life.calls(who).begun.rows() if row["method"] == "build"
    )


def _wait(life: Life, reached: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if life.code is not None or time.monotonic() > deadline:
            raise Over
        time.sleep(LOOK_S)


def play(scene: Scene, cell: Cell) -> Outcome:
    """Cause the loss that a cell names in the scene's run, and see it through: until two further steps are
    done, in this life of the run or in the next one.

    Raises:
        Over: the run ended before.
    """
    outcome = Outcome(cell.key, when=time.strftime("%Y-%m-%d %H:%M:%S"))
    scene.before()
    life = scene.life or scene.begin()
    at, pid = strike(scene, cell, outcome)
    if (cell.role, cell.way) == ("driver", "stop"):
        time.sleep(DRIVER_STOPS_S)
        os.kill(pid, signal.SIGCONT)
    bound = 45 * scene.patience + (60 if cell.role in RAYS else 0) + (40 if cell.early else 0)
    low = outcome.step
    while True:
        if not cell.early and scene.metrics.is_file():
            low = min(low, steps(Tail(scene.metrics).rows()))
        _note_detection(scene, cell, outcome, at, pid)
        if life.code:
            _ended(scene, cell, outcome, at)
            break
        if life.code == 0 or (cell.role not in RAYS and _further(scene, cell, outcome)):
            outcome.recovery_s = time.time() - at
            outcome.verdict = "in place" if outcome.detection_s is not None else "went on"
            loads = "rollout-1" if cell.role == "node" else cell.role
            outcome.loading_s = life.calls(loads).loading(at)
            break
        if time.time() - at > bound:
            outcome.verdict, outcome.said = "hung", " | ".join(text for _, text in life.said[-3:])
            scene.finish()
            return outcome
        time.sleep(0.02)
    _compare(scene, outcome)
    if outcome.verdict == "went on":  # Its call had just ended: it is missed at the next one.
        _note_detection(scene, cell, outcome, at, pid)
        outcome.verdict = "in place" if outcome.detection_s is not None else "went on"
    if outcome.verdict != "ended":
        outcome.steps_lost = 0 if cell.early else outcome.step - low
        if alive(pid) and outcome.verdict == "in place":
            outcome.left = {"processes": [f"{pid} is still there"]}
    if scene.life is not None and scene.life.code is not None:
        scene.anew()
    return outcome


def _further(scene: Scene, cell: Cell, outcome: Outcome) -> bool:
    """A step has ended that had not at the moment. Where the run had just begun, lines of the life before are
    there until it goes on from its checkpoint."""
    life, logged = scene.life, steps(Tail(scene.metrics).rows())
    assert life is not None
    if not cell.early:
        return logged > outcome.step
    base = _gone_on(life)
    if base is None or not scene.metrics.is_file() or scene.metrics.stat().st_mtime < life.began:
        return False
    outcome.step = base
    return logged > base


def play_evaluation(scene: Scene, cell: Cell) -> Outcome:
    """The same in the evaluation of a run whose stages are finished, which ends with it.

    Raises:
        Over: the run ended before.
    """
    assert scene.whole is not None
    outcome, kept = Outcome(cell.key, when=time.strftime("%Y-%m-%d %H:%M:%S")), scene.run / "eval"
    shutil.rmtree(kept, ignore_errors=True)
    life = scene.begin()
    at, pid = strike(scene, cell, outcome)
    if (cell.role, cell.way) == ("driver", "stop"):
        time.sleep(DRIVER_STOPS_S)
        os.kill(pid, signal.SIGCONT)
    while life.code is None and time.time() - at < 150 * scene.patience:
        _note_detection(scene, cell, outcome, at, pid)
        time.sleep(0.05)
    outcome.verdict, outcome.recovery_s = "hung", time.time() - at
    if life.code == 0:
        outcome.verdict = "in place" if outcome.detection_s is not None else "went on"
        outcome.loading_s = life.calls(cell.role).loading(at)
        outcome.left = life.left()
    elif life.code is not None:
        _ended(scene, cell, outcome, at)
        again = scene.life or scene.begin()
        _wait_for_end(again)
        _look_again(outcome, again)
    scene.finish()
    name = f"{scene.stage}.jsonl"
    outcome.equal = (kept / name).is_file() and file_digest(kept / name) == file_digest(
        scene.whole / "eval" / name
    )
    return outcome


def _wait_for_end(life: Life) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        life.process.wait(180)


def _note_detection(scene: Scene, cell: Cell, outcome: Outcome, at: float, pid: int) -> None:
    """Whatever comes first: a line about it, or another process in its place."""
    life = scene.life
    assert life is not None
    if not outcome.named:
        about = [(t, line) for t, line in life.said if t >= at and is_about(line, cell.role)]
        if about:
            outcome.named, outcome.said = True, about[0][1][:300]
            outcome.detection_s = outcome.detection_s or about[0][0] - at
    now = life.pid(cell.role) if cell.role not in ("driver", "raylet", "gcs", "node") else pid
    if outcome.detection_s is None and now not in (pid, None):
        outcome.detection_s = time.time() - at


def _ended(scene: Scene, cell: Cell, outcome: Outcome, at: float) -> None:
    """The run ended: how, what it left, and how it goes on."""
    life = scene.life
    assert life is not None
    life.hear_out()
    outcome.code, outcome.verdict = life.code, "ended"
    outcome.detection_s = outcome.detection_s or time.time() - at
    if not outcome.named:
        outcome.said = " | ".join(text for _, text in life.said[-3:])[:300]
    _note_detection(scene, cell, outcome, at, 0)
    outcome.left = life.left()
    scene.finish()
    if (scene.run / scene.stage / "manifest.json").is_file():
        return
    life, began = scene.begin(), time.time()
    from_start = Cell(cell.scene, cell.role, "start", cell.way)
    try:
        _wait(life, lambda: _further(scene, from_start, Outcome("")))
    except Over:
        outcome.verdict = "ended, and does not go on"
        outcome.said += " | " + " | ".join(text for _, text in life.said[-3:])[:200]
        return
    outcome.recovery_s = time.time() - began
    _look_again(outcome, life)
    outcome.loading_s = max(life.calls(f"{kind}-0").loading(began) for kind in ("policy", "rollout"))
    outcome.steps_lost = 0 if cell.early else max(0, outcome.step - (_gone_on(life) or 0))


def _look_again(outcome: Outcome, life: Life) -> None:
    """A driver that was killed, also by Ray, leaves temporary files, which go with the next run of this
    TMPDIR: what that has left counts."""
    files = outcome.left.get("/tmp", [])
    outcome.left["/tmp"] = [name for name in files if (life.temporary / name).exists()]


def _gone_on(life: Life) -> Any:
    """The step from which this life of the run has gone on; 0 from the start, None where it hasn't said."""
    for _, line in life.said:
        if found := re.search(r"continues from checkpoint-(\d+)", line):
            return int(found[1])
        if re.search(r"^\S+: (new|runs again)|: new$", line):
            return 0
    return None


def _compare(scene: Scene, outcome: Outcome) -> None:
    """Wait for a second step, so that what an update did is in a metric, and compare."""
    life = scene.life
    if life is None:
        return
    try:
        target = outcome.step + 2
        _wait(life, lambda: steps(Tail(scene.metrics).rows()) >= target, 60 * scene.patience)
    except Over:
        if life.code != 0:
            outcome.verdict += f", then {'hung' if life.code is None else f'ended with {life.code}'}"
            outcome.said += " | " + " | ".join(text for _, text in life.said[-3:])[:300]
            scene.finish()
    difference = scene.first_difference()
    outcome.equal = difference is None
    if difference is not None:
        outcome.said += f" | differs in {difference}"
