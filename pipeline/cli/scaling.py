"""Runs `raylign scale`: refuses what can't be, asks the run for the rest, and waits for its answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from actors.errors import EXIT_DONE, RunFailure, UserError
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.artifacts.scaling import answer_of, ask_to_scale, wanted_engines
from pipeline.monitoring import console

POLL_S = 0.5


def scale_run(directory: Path, settings: Sequence[str], *, wait: bool) -> int:
    """Have the run in a directory work with another number of engines.

    Raises:
        UserError: what is asked for can't be, or no run works there; or the run has refused it.
        RunFailure: the run ended before it took the request up.
    """
    number, problems = wanted_engines(settings)
    if not (directory / "config.yaml").is_file():
        problems.append(f"{directory}: no directory of a run; name one, such as runs/my-run")
    elif not RunDirectory.in_use(directory):
        problems.append(
            f"{directory}: no run works there at this moment; set roles.rollout.workers in its config, which "
            "holds from its next start on"
        )
    else:
        problems += _refusals(directory / "config.yaml")
    if problems or number is None:
        raise UserError(problems)
    try:
        key = ask_to_scale(directory, number)
    except OSError as error:
        raise UserError(f"{directory}: the request can't be written there ({error.strerror})") from None
    console.say(f"asked for {number} engines; the run takes it up between two steps of an online stage")
    return _answer(directory, key) if wait else EXIT_DONE


def _refusals(config_file: Path) -> list[str]:
    """Reasons why the engines of a run with this config stay as many as they are."""
    from pipeline.config.load import load_config
    from pipeline.roles import ROLLOUT

    config = load_config(config_file)
    if config.roles.alternates(ROLLOUT):
        return [
            "rollout: these engines take turns with the policy on its devices (roles.rollout.share), one "
            "beside each rank; engines with devices of their own can be added"
        ]
    if not any(stage.online for stage in config.stages.values()):
        return ["rollout: this run has no online stage, which is all that a number of engines matters to"]
    return []


def _answer(directory: Path, key: str) -> int:
    """Wait for what comes of a request, and say it."""
    while True:
        works = RunDirectory.in_use(directory)
        answer = answer_of(directory, key)
        if answer is not None:
            if not answer.done:
                raise UserError(answer.said)
            console.say(answer.said)
            return EXIT_DONE
        if not works:
            raise RunFailure("scale", "wait", "the run has ended, and did not take it up")
        time.sleep(POLL_S)
