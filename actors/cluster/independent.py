"""Processes that don't need each other, such as engines: one that is lost while its object is made is
replaced, as it would be a moment later."""

from __future__ import annotations

from typing import Any

from actors.cluster.futures import POLL_S, GroupFuture, first_done
from actors.cluster.patient_clock import patient
from actors.cluster.worker_group import WorkerGroup
from actors.errors import NoRoom, RunFailure


def bring_up(group: WorkerGroup, building: GroupFuture[Any]) -> None:
    """Wait for what the group's `build` makes in every process; those that are lost meanwhile are replaced,
    whichever is lost first.

    Raises:
        RunFailure: a process that lives says why it can't, or one was lost again and again (`supervisor`).
        UserError: what is asked for can't be made.
    """
    began, phase, open_calls = patient(), building._phase, building.each()
    while open_calls:
        there = first_done(open_calls, POLL_S)
        failed = group.lost([rank for rank in open_calls if rank not in there], began, phase)
        if not there and not failed and patient() - began >= group.limits.of(phase):
            there = [*open_calls]
        for rank in there:
            try:
                open_calls[rank].result(began)
            except RunFailure as failure:
                failed[rank] = failure
        for rank in (*there, *failed):
            open_calls.pop(rank, None)
        for rank, lost in failed.items():
            _replace(group, rank, lost)


def _replace(group: WorkerGroup, rank: int, failure: RunFailure) -> None:
    while not group.fleet.sound(rank):
        group.restart(rank, f"start of {group.who(rank)}")
        try:
            group.rebuild(rank)
        except NoRoom:
            raise
        except RunFailure as again:
            failure = again
            continue
        group.supervision.back(group.name, [rank])
        return
    raise failure
