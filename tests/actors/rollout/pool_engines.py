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

from actors.batches.generations import Generations, SamplingSpec

HANG, DIE, DIE_ALWAYS, FAIL = 1001, 1002, 1003, 1004
"""First tokens of prompts that bring a fault: the first two once in all processes together."""


class FakeEngine:
    """Takes `seconds` per sample; the first process to be built takes ten times as long."""

    def __init__(self, directory: str, seconds: float = 0.0) -> None:
        self.directory, self.version = Path(directory), 0
        self.waiting: dict[int, list[tuple[Any, SamplingSpec, Any]]] = {}
        self.made: dict[int, list[Generations]] = {}
        self.seconds = seconds * 10 if self._first("slow") else seconds

    def load(self, version: int) -> None:
        self.version = version

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec, seeds: Sequence[int]
    ) -> Generations:
        began = time.time()
        for prompt in prompts:
            self._fault(prompt[0])
            time.sleep(self.seconds)
        samples = [([seed % 97, sum(prompt), 3], [-0.5] * 3, "stop") for prompt, seed in zip(prompts, seeds)]
        with (self.directory / "calls.jsonl").open("a") as log:
            row = {"pid": os.getpid(), "samples": len(prompts), "start": began, "end": time.time()}
            log.write(json.dumps(row) + "\n")
        return Generations.of(samples, sampling.n, "fake", time.time() - began, self.version)

    def start_requests(
        self,
        key: int,
        seconds: float,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        seeds: Sequence[int],
    ) -> Generations | None:
        """Eight samples a slice."""
        self.waiting[key] = [
            (prompts[i : i + 8], sampling, seeds[i : i + 8]) for i in range(0, len(prompts), 8)
        ]
        self.made[key] = []
        return self.poll(key, seconds)

    def poll(self, key: int, seconds: float) -> Generations | None:
        self.made[key].append(self.generate(*self.waiting[key].pop(0)))
        return None if self.waiting[key] else Generations.join(self.made[key], 1, mixed=True)

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

    def load(self, base: str, adapter: str | None, label: str, updatable: bool) -> None:  # type: ignore[override]
        self.served = f"{label} on {base}"

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec, seeds: Sequence[int]
    ) -> Generations:
        if not self.served:
            raise ValueError("nothing is loaded")
        return super().generate(prompts, sampling, seeds)
