"""Calls of many engines at once: answers as they come, under one deadline for all, and a `Failure` of those
that have none.

One that fails hides nothing of what the others did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from actors.cluster.futures import POLL_S, WorkerFuture, first_done
from actors.cluster.patient_clock import patient
from actors.errors import LinkFailure, RunFailure, UserError
from actors.sync.engine_set import EngineSet
from actors.sync.protocol import Failure

Participants = Mapping[int, int]
"""Engines that take part: generation by rank."""
Asked = dict[int, "WorkerFuture[Any] | Failure"]
"""Calls by rank; a `Failure` is one of an engine that can't be called any more."""


def ask(engines: EngineSet, asked: Participants, call: Callable[[int], WorkerFuture[Any]]) -> Asked:
    """`call(rank)` of each engine, which names its generation: it never reaches a successor."""
    calls: Asked = {}
    for rank, generation in asked.items():
        try:
            calls[rank] = engines.submit(rank, generation, call)
        except RunFailure as failure:
            calls[rank] = Failure(failure.reason, died=True)
    return calls


def answers(engines: EngineSet, asked: Participants, calls: Asked) -> dict[int, Any]:
    """Answer of each engine, or why there is none."""
    found = {rank: answer for some in as_answered(engines, asked, calls) for rank, answer in some.items()}
    return {rank: found[rank] for rank in calls}


def as_answered(engines: EngineSet, asked: Participants, calls: Asked) -> Iterator[dict[int, Any]]:
    """Answers as they come, some at a time. The deadline, `limits.sync`, runs for all from the first look."""
    began, limit = patient(), engines.group.limits.of("sync")
    open_calls: dict[int, WorkerFuture[Any]] = {}
    failed = {}
    for rank, call in calls.items():
        if isinstance(call, Failure):
            failed[rank] = call
        else:
            open_calls[rank] = call
    if failed:
        yield failed
    while open_calls:
        done = first_done(open_calls, POLL_S)
        if not done:
            over = patient() - began >= limit
            done = list(open_calls) if over else [*engines.group.lost(open_calls, began, "sync")]
        if done:
            yield {rank: _answer(engines, rank, asked[rank], open_calls.pop(rank), began) for rank in done}


def end_those_that_stand_still(engines: EngineSet, asked: Participants, sending: WorkerFuture[Any]) -> None:
    """Wait until the trainer has sent something, whatever comes of it. An engine that is stopped meanwhile is
    ended: the trainer is free again as soon as the other end of the connection is gone."""
    began = patient()
    while not first_done({0: sending}, POLL_S):
        for rank in engines.group.lost(asked, began, "sync"):
            engines.group.end(rank)
        if patient() - began >= engines.group.limits.of("sync"):
            return


def _answer(engines: EngineSet, rank: int, generation: int, call: WorkerFuture[Any], began: float) -> Any:
    try:
        return call.result(began)
    except (RunFailure, UserError) as error:
        reason = error.reason if isinstance(error, RunFailure) else str(error)
        died = not engines.is_alive(rank, generation)
        return Failure(reason, died, link=isinstance(error, LinkFailure) and not died)
