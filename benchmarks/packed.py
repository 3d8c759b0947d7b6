"""A group of a thousand stand-ins in a few processes: to the driver each is a rank like any other.

A thousand actors would need 60 GB. Here 16 processes hold them, and each call goes to the process of its
rank: as many calls as to real ranks, with the same arguments and answers. What is not seen is what Ray itself
does for a thousand processes: their start, and a connection to each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from actors.cluster.worker_group import WorkerGroup

PROCESSES = 16


class Packed:
    """One process with many ranks, in place of one `actors.cluster.worker.Worker` each."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}

    def ping(self, rank: int) -> dict[str, Any]:
        return {"who": f"rank {rank}"}

    def build(
        self, rank: int, target: str, phase: str, limit_s: float, where: None, args: Any, kwargs: Any
    ) -> float:
        import importlib

        module, _, name = target.partition(":")
        made = getattr(importlib.import_module(module), name)
        self._objects[rank] = made(*args, **kwargs, **({"rank": rank} if name == "Trainer" else {}))
        return 0.0

    def call(self, rank: int, asked: Any, *args: Any) -> Any:
        import operator

        method, _, _, kwargs = asked
        return operator.attrgetter(method)(self._objects[rank])(*args, **kwargs)

    def call_alike(self, rank: int, asked: Any, own: Any, exact: bool, hands_over: bool, *args: Any) -> Any:
        from actors.cluster.agreement import Answer, proof_of

        value = self.call(rank, asked, *args)
        return Answer(proof_of(value, own, exact), value if hands_over else None)


class PackedGroup(WorkerGroup):
    """A `WorkerGroup` whose ranks share processes."""

    def start(self) -> PackedGroup:
        import ray

        make = ray.remote(Packed).options(num_cpus=0)
        self._processes = [make.remote() for _ in range(min(PROCESSES, self.size))]
        self._actors = [_rank(self._processes[rank % PROCESSES], rank) for rank in range(self.size)]
        return self

    def shutdown(self, *, kindly: bool = True) -> None:
        import ray

        for process in self._processes:
            ray.kill(process)
        self._actors = []


def _rank(process: Any, rank: int) -> Any:
    """The handle of a rank."""

    def method(name: str) -> Any:
        call = getattr(process, name)
        return SimpleNamespace(remote=lambda *args: call.remote(rank, *args))

    return SimpleNamespace(**{name: method(name) for name in ("ping", "build", "call", "call_alike")})
