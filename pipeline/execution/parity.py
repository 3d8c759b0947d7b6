"""The probe of an architecture that the table lacks, before anything of a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.cluster import WorkerGroup
    from actors.models.spec import ModelSpec
    from actors.rollout.spec import EngineSpec


PROBE = "actors.rollout.parity:probe"


def check_parity(
    model: ModelSpec, engines: WorkerGroup, spec: EngineSpec, say: Callable[[str], None]
) -> None:
    """Let an engine (as in `spec`, in the process of the first of `engines`) and transformers compute the
    same tokens, as loaded and after weights were brought in.

    Raises:
        UserError: they differ by more than rounding; nothing has been trained.
    """
    report = engines.submit_work(0, PROBE, spec, model, phase="load").result()
    if report.problems:
        raise UserError(
            [
                f"model.allow_untested: true, but this base can't be used: {problem}; nothing was trained"
                for problem in report.problems
            ]
        )
    say(f"probe of an untested architecture: {report}")
