"""Engines that are added to an online stage and taken from it between its steps, as `raylign scale` asks.

Samples stay the same: one is decided by prompt, seed and weights, whichever engine draws it. Engines that are
added start, load the base and make their first pass beside the steps that go on; then they are admitted, the
next sync brings them its version, and proves it, and from the step after it they draw.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import NoRoom, RunFailure
from pipeline.artifacts.scaling import ScaleAnswer, ScaleRequest, answer_request, take_request

if TYPE_CHECKING:
    from actors.sync.weight_sync import WeightSync

TRIES = 3
"""Of an engine that is lost while it is made."""


@dataclass(frozen=True)
class Coming:
    """Engines on their way, for a request."""

    request: ScaleRequest
    made: dict[int, Future[None]]
    """By rank."""


class Elastic:
    """The number of engines of an online stage."""

    def __init__(self, sync: WeightSync, directory: Path, note: Callable[[str], None]) -> None:
        """`directory`: of the run, where requests are; `note`: tells the user."""
        self._sync, self._directory, self._note = sync, directory, note
        self._coming: Coming | None = None

    def between_steps(self, settle: Callable[[], None]) -> None:
        """Take up what was asked for, and what has become of it. `settle`: waits until nobody generates.

        Raises: what `settle` raises.
        """
        if self._coming is not None:
            if all(made.done() for made in self._coming.made.values()):
                settle()
                self._admit(self._coming)
            return
        request = take_request(self._directory)
        if request is not None:
            self._begin(request, settle)

    def end(self) -> None:
        """End engines that are still on their way when the stage is through."""
        coming, self._coming = self._coming, None
        if coming is not None:
            self._drop(coming, "the stage was through before they were ready")

    # --- Inside -------------------------------------------------------------------------------------

    def _begin(self, request: ScaleRequest, settle: Callable[[], None]) -> None:
        group, has = self._sync.rollout, len(self._sync.engines)
        if request.engines == has:
            self._answer(request, f"{group.name} has {has} already", done=True)
        elif request.engines < 1:
            self._answer(request, f"{group.name} needs an engine at least", done=False)
        elif request.engines < has:
            settle()
            self._sync.dismiss(request.engines)
            self._changed()
            gone = ", ".join(group.who(rank) for rank in range(request.engines, has))
            self._answer(request, f"{gone} ended; {group.name} has {request.engines} of {has}", done=True)
        else:
            self._ask_for(request)

    def _ask_for(self, request: ScaleRequest) -> None:
        group = self._sync.rollout
        try:
            ranks = group.resize(request.engines)
        except NoRoom as failure:
            has = f"{group.name} stays at {group.size}"
            self._answer(request, f"no room for {request.engines}: {failure.reason}; {has}", done=False)
            return
        self._note(
            f"{', '.join(map(group.who, ranks))} start; they are admitted once they have loaded the base"
        )
        self._coming = Coming(request, {rank: Future() for rank in ranks})
        for rank, made in self._coming.made.items():
            # A daemon: a run that ends doesn't wait for an engine that nobody needs.
            threading.Thread(target=self._make, args=(rank, made), daemon=True, name=f"add-{rank}").start()

    def _make(self, rank: int, made: Future[None]) -> None:
        group = self._sync.rollout
        try:
            for tried in range(1, TRIES + 1):
                try:
                    self._sync.make(rank)
                    break
                except NoRoom:
                    raise
                except RunFailure:
                    if tried == TRIES or group.fleet.sound(rank):
                        raise
                    group.restart(rank)
        except BaseException as error:
            made.set_exception(error)
        else:
            group.supervision.back(group.name, [rank])
            made.set_result(None)

    def _admit(self, coming: Coming) -> None:
        self._coming = None
        failed = [error for error in (made.exception() for made in coming.made.values()) if error is not None]
        try:
            if not failed:
                self._sync.admit([*coming.made])
        except RunFailure as failure:
            failed.append(failure)
        if failed:
            self._drop(coming, str(failed[0]))
            return
        self._changed()
        group = self._sync.rollout
        who = ", ".join(map(group.who, coming.made))
        said = f"{who} admitted, to draw once the next sync has proved its version there"
        self._answer(coming.request, f"{said}; {group.name} has {group.size}", done=True)

    def _drop(self, coming: Coming, reason: str) -> None:
        group, has = self._sync.rollout, len(self._sync.engines)
        group.resize(has)
        said = f"{', '.join(map(group.who, coming.made))} not added: {reason}; {group.name} stays at {has}"
        self._answer(coming.request, said, done=False)

    def _changed(self) -> None:
        measured = self._sync.rollout.measured
        if measured is not None:
            measured.forget(self._sync.rollout.name)

    def _answer(self, request: ScaleRequest, said: str, *, done: bool) -> None:
        self._note(said)
        answer_request(self._directory, ScaleAnswer(request.key, said, done))
