"""The context of a stage: what it is given to work with, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actors.cluster import MeasuredLimits
from actors.errors import UserError
from pipeline.artifacts.identity import Decision, Identity, set_aside_newer
from pipeline.artifacts.manifest import MANIFEST, Manifest, new_directory, verify, versions, write_json
from pipeline.stages.prepared import Prepared

if TYPE_CHECKING:
    from pipeline.stages.views import View


class Stopped(Exception):
    """The user asked to stop and everything is saved."""


class GivenUp(Stopped):
    """All before the step in flight is saved, which ranks still work on."""


class Applied(Exception):
    """The state before a step can't be saved any more, or not while ranks work on it."""


class Stops(Protocol):
    """Requests to stop, as a stage asks about them."""

    def begin(self, answer: str) -> bool:
        """Say what a stop comes to from now on ("stopping after step 8, then saving"); False where one was
        asked for: then nothing must be begun."""

    def asked(self) -> bool:
        """The run should save and stop."""

    def left(self, grace_s: float) -> float | None:
        """Seconds that are left of a grace period; None: nobody has asked who won't wait."""


class WorkTime:
    """Seconds of a stage. Work is all from the beginning of the first step to the finished artifact, over all
    sessions that led to it; wait is what came before in this session: processes, weights, a first sync."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: in seconds; starts now."""
        self._clock, self._made = clock, clock()
        self._began: float | None = None
        self._earlier = 0.0

    def begin(self, earlier: float) -> None:
        """The first step of this session; `earlier`: seconds of work up to the checkpoint it goes on from.
        What came after that, and is done again, does not count twice."""
        self._began, self._earlier = self._clock(), earlier

    @property
    def work(self) -> float | None:
        """None before the first step."""
        return None if self._began is None else self._earlier + self._clock() - self._began

    @property
    def wait(self) -> float:
        return (self._clock() if self._began is None else self._began) - self._made


@dataclass(kw_only=True)
class StageContext:
    """Context of a stage: what it works with beside its data and loss."""

    policy: View
    """The role that trains; without an adapter every parameter does."""
    directory: Path
    identity: Identity
    dtype: str
    logging_steps: int
    starts_as_reference: bool
    stop: Stops
    on_step: Callable[[int, dict[str, Any]], None]
    on_log: Callable[[dict[str, Any]], None]
    note: Callable[[str], None]
    """Tells the user."""
    limits: MeasuredLimits
    """Deadlines of this stage, which is to say how much larger its steps can become."""
    time: WorkTime
    card: Callable[[Path, dict[str, Any]], None] = field(default=lambda path, metrics: None)

    def manifest(self, kind: str, stage: Prepared, **more: Any) -> Manifest:
        """A manifest of this stage's work."""
        return Manifest(
            type=kind,
            stage=stage.name,
            fingerprint=self.identity.fingerprint,
            inputs=self.identity.inputs,
            config=self.identity.config,
            data={"fingerprint": self.identity.data, "rows": stage.data.n_rows},
            seed=stage.seed,
            versions=versions(),
            seconds=round(self.time.work or 0.0, 3),
            **more,
        )


def begins_step(stage: Prepared, stop: Stops, step: int) -> bool:
    """True if step number `step` (from 1) may begin; False where a stop was asked for."""
    last = f", the last of {stage.name}, which is then saved as complete" if step == stage.total_steps else ""
    return stop.begin(f"stopping after step {step}{last or ', then saving'}")


class Saves:
    """Decides when a stage writes checkpoints: every `save_steps` steps and every `save_minutes` minutes, and
    after the last step where a longer stage could go on from there."""

    def __init__(self, stage: Prepared, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`step`: that it goes on from; `clock`: in seconds."""
        self._stage, self._clock = stage, clock
        self.made(step)

    def due(self, step: int) -> bool:
        """True where one has to be written after `step` steps."""
        spec = self._stage.spec
        if step == self._stage.total_steps:
            return not spec.needs_length
        late = spec.save_minutes is not None and self._clock() - self._since >= 60 * spec.save_minutes
        return late or step % spec.save_steps == 0

    def made(self, step: int) -> None:
        """Note that all up to `step` is on disk."""
        self.step, self._since = step, self._clock()


def seconds_before(decision: Decision) -> float:
    """Seconds of work up to the checkpoint that a stage goes on from; 0 for a new one."""
    goes_on = decision.state == "partial" and decision.manifest is not None
    return decision.manifest.seconds if goes_on and decision.manifest is not None else 0.0


def sound_checkpoint(path: Path, manifest: Manifest) -> Path:
    """The checkpoint at `path`, if its files are what its manifest says. Newer ones, which a run that goes
    on from this one found damaged, are set aside.

    Raises:
        UserError: every file that is not.
    """
    damaged = verify(path, manifest)
    if damaged:
        raise UserError(
            [
                f"{path}: corrupt checkpoint, not resumed from: {problem}. The same command goes on from "
                "the checkpoint before it (or from the stage's start); --fresh starts the whole run anew"
                for problem in damaged
            ]
        )
    set_aside_newer(path)
    return path


def finish(stage: Prepared, ctx: StageContext, last: dict[str, Any]) -> Manifest:
    """Write the artifact, then the stage's manifest: only then is the stage done."""
    place = "model" if ctx.policy.role is None else "adapter"
    kind = place if stage.spec.makes == "policy" else stage.spec.makes
    metrics = {name: value for name, value in last.items() if isinstance(value, int | float)}
    with new_directory(ctx.directory / place, ctx.manifest(kind, stage, metrics=metrics)) as aside:
        ctx.policy.save(str(aside))
        ctx.card(aside, metrics)
    load = ctx.policy.router_load()
    if load is not None:
        write_json(ctx.directory / "router_load.json", {"load": load.tolist()})
    manifest = ctx.manifest(kind, stage, metrics=metrics, step=stage.total_steps)
    made = ctx.directory / place
    inner = Manifest.model_validate_json((made / MANIFEST).read_text())
    manifest.files = {f"{place}/{name}": entry for name, entry in inner.files.items()}
    manifest.created = inner.created
    write_json(ctx.directory / MANIFEST, manifest.model_dump())
    return manifest
