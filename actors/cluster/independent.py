"""Processes that don't need each other, such as engines: one that is lost while its object is made is
replaced, as it would be a moment later."""

from __future__ import annotations

from typing import Any

from actors.cluster.futures import GroupFuture
from actors.cluster.patient_clock import patient
from actors.cluster.worker_group import WorkerGroup
from actors.errors import NoRoom, RunFailure


def bring_up(group: WorkerGroup, building: GroupFuture[Any]) -> dict[int, str]:
    """Wait for what the group's `build` makes in every process; why some were lost meanwhile and replaced, by
    rank.

    Raises:
        RunFailure: a process that lives says why it can't, or one was lost again and again (`supervisor`).
        UserError: what is asked for can't be made.
    """
    began, lost = patient(), {}
    for rank, made in building.each().items():
        try:
            made.result(began)
        except RunFailure as failure:
            _replace(group, rank, failure)
            lost[rank] = failure.reason
    return lost


def _replace(group: WorkerGroup, rank: int, failure: RunFailure) -> None:
    while not group.fleet.sound(rank):
        group.restart(rank, f"start of {group.who(rank)}")
        try:
            group.rebuild(rank)
            return
        except NoRoom:
            raise
        except RunFailure as again:
            failure = again
    raise failure
