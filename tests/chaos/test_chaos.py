"""A dozen losses of all kinds, one after the other in one run; all others are in `make chaos`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import bases
from tests.chaos.cells import Cell
from tests.chaos.observe import Lengths
from tests.chaos.play import play
from tests.chaos.scene import Scene
from tests.whole_runs.runs import adapter_digest, complete

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

STEPS = 36
PATIENCE = 2.0
"""Other tests work at the same time."""

CELLS = {
    ("rollout-1", "start", "kill"): "in place",
    ("rollout-0", "generation", "kill"): "in place",
    ("reference-0", "scoring", "kill"): "in place",
    ("reward-0", "scoring", "kill"): "in place",
    ("critic-0", "update", "kill"): "in place",
    ("policy-1", "update", "kill"): "in place",
    ("rollout-1", "generation", "stop"): "in place",
    ("driver", "update", "kill"): "ended",
    ("policy-0", "save", "kill"): "in place",
    ("rollout-1", "sync stage", "kill"): "in place",
    ("rollout-0", "sync commit", "kill"): "in place",
}
"""Role, phase and way, and what becomes of the run."""


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """The PPO run with every role in processes of its own, and an undisturbed one."""
    reward = bases.reward_model(tmp_path)

    def make(place: Path) -> list[str]:
        return bases.command_for(place, bases.ppo(place / "run", STEPS, PATIENCE, reward, evaluates=False))

    temporary = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # Sockets fit below it.
    made = Scene("ppo", "ppo", make, tmp_path, temporary, PATIENCE)
    made.whole = tmp_path / "whole" / "run"
    complete(make(made.whole.parent), made.whole.parent)
    made.lengths = Lengths(made.whole)
    yield made
    made.finish()
    shutil.rmtree(temporary, ignore_errors=True)


def test_a_run_that_loses_process_after_process_ends_with_the_same_adapter(scene: Scene) -> None:
    for (role, phase, way), verdict in CELLS.items():
        outcome = play(scene, Cell("ppo", role, phase, way))
        told = outcome.text() + "\n" + outcome.said
        assert outcome.verdict == verdict, told
        assert outcome.hit, told
        assert outcome.equal, told
        assert outcome.named or outcome.code != 1, told
        assert not any(outcome.left.values()), told
        assert outcome.steps_lost == 0 if verdict == "in place" else outcome.steps_lost <= bases.SAVE_STEPS
    assert scene.life is not None
    assert scene.life.process.wait(300) == 0
    assert scene.whole is not None
    assert adapter_digest(scene.run, "ppo") == adapter_digest(scene.whole, "ppo")
    assert not any(scene.life.left().values())
