"""Work of the ranks in the tests of groups: small, real, and with every way to fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.batches.batch import Batch
from actors.errors import InvariantViolation, UserError


class Duty:
    """An object on one rank."""

    def __init__(self, greeting: str = "hello", rank: int = 0, world_size: int = 1, **where: Any) -> None:
        self.greeting, self.rank, self.world_size, self.where = greeting, rank, world_size, where
        self.ranks: Any = None

    def greet(self, name: str) -> str:
        print(f"greeting {name}")
        return f"{self.greeting}, {name}, from {self.rank} of {self.world_size}"

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def place(self) -> tuple[str, str | None]:
        """The node, and the GPUs that this process and all that it starts can see there."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")

    def total(self, batch: Batch, twice: bool = False) -> int:
        return int(batch.token_ids.sum()) * (2 if twice else 1)

    def megabytes(self, number: int, differs: int | None = None) -> dict[str, Any]:
        """The same on every rank but one."""
        found = np.arange(number * 131072, dtype=np.float64)
        found[-1] += self.rank == differs
        return {"values": found, "seconds": float(self.rank)}

    def sleep(self, seconds: float, rank: int | None = None) -> float:
        if rank is None or rank == self.rank:
            time.sleep(seconds)
        return seconds

    def spin(self, seconds: float) -> None:
        """Hold the interpreter in native code, where no handler and no thread of Python gets a turn."""
        import re

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            re.match("(a|a)*b", "a" * 24)

    def die(self, rank: int, after: float = 0.0) -> None:
        """That rank is killed with -9; the others go on for half a minute."""
        time.sleep(after)
        if rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    def fail(self, kind: str, rank: int = 0) -> None:
        if rank != self.rank:
            return
        if kind == "user":
            raise UserError(["first problem", "second problem"])
        if kind == "invariant":
            raise InvariantViolation(f"rank {self.rank}", "update", "the loss is NaN")
        raise KeyError("no such adapter")

    def gather(self, die: int | None = None) -> list[float]:
        """A real all-gather over gloo; rank `die` is gone before it joins in."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", init_method=self.where["init_method"], rank=self.rank, world_size=self.world_size
            )
        if die == self.rank:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        out = [torch.zeros(1) for _ in range(self.world_size)]
        dist.all_gather(out, torch.full((1,), float(self.rank)))
        return [float(t) for t in out]

    def meet(self, hangs: int | None = None) -> float:
        """A sum over all ranks, as models do it; rank `hangs` does not come to a second one."""
        import torch

        from actors.trainer.process_groups import Ranks

        if self.ranks is None:
            self.ranks = Ranks(self.rank, self.world_size, **self.where)
        found = float(self.ranks.sum_gradient_(torch.ones(1)))
        if hangs is not None:
            if hangs == self.rank:
                time.sleep(60)
            self.ranks.sum_gradient_(torch.ones(1))
        return found

    def array(self, n: int) -> np.ndarray:
        return np.arange(n)


class Stillborn:
    """Killed while it is made, on rank 1."""

    def __init__(self, rank: int = 0, **others: Any) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)


class Frail:
    """Lost while it is made, `lives` times; each leaves a file in `marks`."""

    def __init__(self, marks: str, lives: int, how: str) -> None:
        """`how`: `killed`, `stopped`, or `raises`."""
        for life in range(lives):
            try:
                (Path(marks) / f"{life}").touch(exist_ok=False)
            except FileExistsError:
                continue
            if how == "raises":
                raise ValueError("no such model")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    def well(self) -> bool:
        return True


class Ledger:
    """Accounts whose sums depend on everything that happened, in its order; of one state on all ranks."""

    def __init__(self, rank: int = 0, kept: bool = True, **where: Any) -> None:
        self.rank, self.kept = rank, kept
        self.sums: dict[str, int] = {}
        self.printed: dict[str, int] = {}
        self.session = ""

    def open(self, name: str, like: str | None = None) -> None:
        self.sums[name] = 1 if like is None else self.sums[like]

    def book(self, name: str, amount: int) -> int:
        self.sums[name] = (self.sums[name] * 31 + amount) % 1_000_003
        return self.sums[name]

    def ask(self, name: str) -> int:
        return self.sums[name]

    def publish(self) -> dict[str, int]:
        self.printed = dict(self.sums)
        return self.printed

    def read(self) -> dict[str, int]:
        return self.printed

    def log_in(self, word: str) -> str:
        self.session = word
        return word

    def who_is_in(self) -> str:
        return self.session

    def take(self, whole: bool) -> tuple[Any, Any]:
        return SimpleNamespace(kept=self.kept, seconds=0.0, nbytes=8), dict(self.sums)

    def put(self, *states: dict[str, int]) -> None:
        for state in states:
            self.sums |= {name: value for name, value in state.items() if name in self.sums}
