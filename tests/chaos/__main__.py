"""Lose processes of runs at chosen moments, and say what becomes of them (`make chaos`).

python -m tests.chaos                               # the whole matrix, an hour on two quiet cores
python -m tests.chaos --cells 'ppo:policy-*:update'  # some of it, by the beginnings of their names
python -m tests.chaos --seeds 3                     # other moments within the phases, too
python -m tests.chaos --list                        # only which, and why others are left out

Cells that are in the file of results already are not done again (`--fresh`: all). The tables in docs/chaos.md
are written at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos import bases
from tests.chaos.cells import FORMS, ON_NODES, SCENES, Cell, all_cells, chosen, next_cell, senseless
from tests.chaos.nodes import Nodes
from tests.chaos.observe import Lengths
from tests.chaos.play import Over, play, play_evaluation
from tests.chaos.scene import Outcome, Scene, saved
from tests.chaos.table import bad, page, put_into
from tests.whole_runs.runs import ENVIRONMENT, ROOT, start

PAGE = ROOT / "docs" / "chaos.md"
STEPS = 60
"""Of a run, which sees a dozen losses or two before its end."""
FORMS_STEPS = 32
"""Of a run of `FORMS`, which sees three at most, and is played to its end."""
TRIES = 3
"""Of a cell whose run ends by itself before the moment comes."""


def main() -> int:
    """Play the cells that were asked for; 1 where one is not as it should be."""
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # No run outlives this script.
    if options.list:
        for cell in all_cells(options.seeds):
            print(f"{cell.key:48s} {senseless(cell) or ''}")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.json"
    rows: dict[str, Any] = {}
    if results.is_file() and not options.fresh:
        rows = json.loads(results.read_text())
    cells = [cell for cell in chosen(options.cells, options.seeds) if cell.key not in rows]
    print(f"{len(cells)} cells to do, {len(rows)} done before, in {options.work}", flush=True)
    began, temporary = time.monotonic(), Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    try:
        for name in (*SCENES, *FORMS):
            mine = [cell for cell in cells if cell.scene == name]
            if mine:
                with contextlib.closing(Nodes(2)) if name in ON_NODES else contextlib.nullcontext() as nodes:
                    play_scene(scene_of(name, options, temporary, nodes), mine, rows, results)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    how = (
        f"Made on {time.strftime('%Y-%m-%d')} on {os.cpu_count()} cores; deadlines (`limits`) were "
        f"{options.patience:g} times those of `tests/chaos/bases.py`."
    )
    made = page(rows, how)
    if not options.cells:
        PAGE.write_text(put_into(PAGE.read_text(), made))
    print(made)
    return int(any(bad(row) for row in rows.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=[], help="beginnings of names, with * and ?")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--patience", type=float, default=1.0, help="times the deadlines; 3 on busy cores")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "chaos", help="runs and results")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def scene_of(name: str, options: argparse.Namespace, temporary: Path, nodes: Nodes | None) -> Scene:
    """A scene, and the undisturbed run to which it is compared (made once)."""
    directory, patience = options.work.resolve(), options.patience

    def make(place: Path) -> list[str]:
        output = place / "run"
        steps = FORMS_STEPS if name in FORMS else STEPS
        if name in bases.OFFLINE:
            return bases.command_for(place, bases.offline(name, output, steps, patience))
        if name in bases.POLICIES:
            whole = bases.form(name, output, steps, patience)
        else:
            whole = bases.ppo(output, steps, patience, bases.reward_model(directory))
        return bases.command_for(place, whole if nodes is None else bases.on_nodes(whole, nodes.address))

    scene = Scene(name, bases.stage_of(name), make, directory, temporary, patience)
    if nodes is not None:
        scene.before = nodes.complete
    scene.whole = directory / f"{name}-whole" / "run"
    if not (scene.whole / scene.stage / "manifest.json").is_file():
        print(f"{name}: the undisturbed run", flush=True)
        undisturbed = start(make(scene.whole.parent), scene.whole.parent, TMPDIR=str(temporary))
        said, _ = undisturbed.communicate(timeout=900)
        if undisturbed.returncode != 0:
            sys.exit(said[-3000:])
    scene.lengths = Lengths(scene.whole)
    while scene.place.exists():  # of an earlier call of this script
        scene.number += 1
    return scene


def play_scene(scene: Scene, cells: list[Cell], rows: dict[str, Any], results: Path) -> None:
    """Play cells one after the other in as few lives of the run as they allow."""
    left, tries = list(cells), dict.fromkeys(cells, 0)
    try:
        while (cell := next_cell(left, scene.life is not None)) is not None:
            began = time.monotonic()
            if scene.life is not None and (cell.early or cell.phase == "evaluation"):
                scene.finish()
            try:
                outcome = playing(scene, cell)
            except Over:
                found = over(scene, cell)
                tries[cell] += 1
                if found is None and tries[cell] < TRIES:
                    continue
                outcome = found or Outcome(cell.key, said="the run ended before the moment came")
            left.remove(cell)
            if not left and cell.scene in FORMS:
                to_the_end(scene, outcome)
            rows[cell.key] = outcome.row()
            saved(results, rows)
            done = f"{len(cells) - len(left)}/{len(cells)}"
            print(f"[{done} {time.monotonic() - began:.0f} s] {outcome.text()}", flush=True)
            if outcome.equal is False:
                scene.anew()
    finally:
        scene.finish()


def playing(scene: Scene, cell: Cell) -> Outcome:
    """One cell; those of the evaluation on a run that has done everything else. Raises: Over."""
    if cell.phase != "evaluation":
        return play(scene, cell)
    if not (scene.run / scene.stage / "manifest.json").is_file():
        subprocess.run(
            scene.make(scene.place), cwd=scene.place, env=ENVIRONMENT, capture_output=True, check=True
        )
    return play_evaluation(scene, cell)


def to_the_end(scene: Scene, outcome: Outcome) -> None:
    """Let a run end by itself, and note at its last cell what it made and what it leaves."""
    if scene.life is None or outcome.equal is False:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        scene.life.process.wait(120 * scene.patience)
    difference = f"ended with {scene.life.code}" if scene.life.code != 0 else scene.first_difference()
    if difference is not None:
        outcome.equal, outcome.said = False, f"{outcome.said} | at its end: {difference}"
    outcome.left = {name: outcome.left.get(name, []) + found for name, found in scene.life.left().items()}


def over(scene: Scene, cell: Cell) -> Outcome | None:
    """The run ended before a cell's moment: well, and then it is begun anew; or not, which is a finding."""
    life = scene.life
    assert life is not None
    code, said = life.code, " | ".join(text for _, text in life.said[-3:])
    difference = scene.first_difference() if code == 0 else None
    scene.finish() if cell.phase == "evaluation" else scene.anew()
    if code == 0 and difference is None:
        return None
    if code is None:
        return Outcome(cell.key, said=f"the moment did not come: {said}")
    return Outcome(cell.key, code=code, said=f"ended by itself: {difference or said}")


if __name__ == "__main__":
    sys.exit(main())
