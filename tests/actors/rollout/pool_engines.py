"""Engines of the pool tests: real processes whose samples are a function of prompt and seed, and which are
slow, hang, die or fail where a prompt says so."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.batches.generations import Generations
from actors.batches.slices import Asked, Progress, Work
from actors.sync.spec import SlotSpec

HANG, DIE, DIE_ALWAYS, FAIL = 1001, 1002, 1003, 1004
"""First tokens of prompts that bring a fault: the first two once in all processes together."""


class FakeEngine:
    """Takes `seconds` per sample; the first process to be built takes ten times as long."""

    def __init__(self, directory: str, seconds: float = 0.0) -> None:
        self.directory, self.version = Path(directory), 0
        self.waiting: dict[int, dict[int, tuple[Any, int]]] = {}
        """Call -> number of a sample -> prompt and seed."""
        self.seconds = seconds * 10 if self._first("slow") else seconds

    def load(self, version: int) -> None:
        self.version = version

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def advance(
        self, key: int, seconds: float | None, asked: Asked | None = None, give_back: Sequence[int] = ()
    ) -> Progress:
        """One sample after the other."""
        began = time.time()
        waiting = self.waiting.setdefault(key, {})
        returned = [number for number in give_back if waiting.pop(number, None)]
        if asked is not None:
            waiting |= dict(zip(asked.numbers, zip(asked.prompts, asked.seeds)))
        made = {}
        while waiting and (seconds is None or not made or time.time() - began < seconds):
            number = next(iter(waiting))
            prompt, seed = waiting.pop(number)
            self._fault(prompt[0])
            time.sleep(self.seconds)
            made[number] = ([seed % 97, sum(prompt), 3], [-0.5] * 3, "stop")
        spent = time.time() - began
        with (self.directory / "calls.jsonl").open("a") as log:
            row = {"pid": os.getpid(), "samples": len(made), "start": began, "end": time.time()}
            log.write(json.dumps(row | {"returned": len(returned)}) + "\n")
        drawn = Generations.of(list(made.values()), 1, "fake", 0.0, self.version) if made else None
        work = Work(3 * len(made), 3 * len(made), spent)
        return Progress(list(made), drawn, dict.fromkeys(waiting, 0), returned, spent, work)

    def _fault(self, token: int) -> None:
        if token == HANG and self._first("hang"):
            time.sleep(60)
        if token == DIE_ALWAYS or (token == DIE and self._first("die")):
            self.die()
        if token == FAIL:
            raise ValueError("a kernel failed")

    def _first(self, name: str) -> bool:
        try:
            (self.directory / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class ServedEngine(FakeEngine):
    """Is told which model to serve, as before an evaluation; without that it has nothing to generate with."""

    served = ""

    def load(  # type: ignore[override]
        self, base: str, adapter: str | None, label: str, updatable: bool, slots: SlotSpec | None
    ) -> None:
        self.served = f"{label} on {base}"

    def advance(
        self, key: int, seconds: float | None, asked: Asked | None = None, give_back: Sequence[int] = ()
    ) -> Progress:
        if not self.served:
            raise ValueError("nothing is loaded")
        return super().advance(key, seconds, asked, give_back)
