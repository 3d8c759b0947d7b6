"""Engines without vLLM that speak the product's protocol over real gloo, as threads: the intake of a worker,
links, tree, phases and rounds are the product's, and so is the trainer's end but for the weights.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from actors.cluster.lasting_group import RanksReplaced
from actors.cluster.spec import LimitsSpec
from actors.rollout.vllm.intake import Intake
from actors.sync.channel import Channel
from actors.sync.payload import Payload, pack_merged
from actors.sync.protocol import EngineFacts, Expected, Prepared, StageAck
from actors.sync.transport import Operation
from actors.trainer.weight_source import WeightSource
from tests.actors.sync.fake_groups import Died, FakeEngines, FakeTrainer, Now, Process

HOST = "127.0.0.1"
ONE_WORKER = SimpleNamespace(world_size=1, rank_in_group=0)


class StandIn(Process):
    """An engine that receives, acknowledges and passes on as one with vLLM does."""

    def __init__(self, rank: int, generation: int, group: StandIns) -> None:
        super().__init__(rank, generation, group)
        self.group: StandIns = group
        self.intake = Intake(ONE_WORKER, torch.device("cpu"))
        self.node = f"node-{rank // group.on_a_node}"

    def describe(self) -> EngineFacts:
        return EngineFacts("float32", self.node)

    def listen(self, engines: list[int], timeout_s: float) -> dict[int, str]:
        return self.intake.listen(engines, HOST, timeout_s)

    def accept(self, engines: list[int], backend: Any) -> dict[int, str]:
        return self.intake.accept(engines, backend)

    def connect(self, address: str, timeout_s: float) -> None:
        self._suffer("connect")
        self.intake.connect(address, timeout_s)

    def open_channel(self, backend: Any) -> None:
        self._suffer("open")
        self.intake.open(backend)

    def stage(self, version: int, pass_on_to: list[int]) -> StageAck:
        self._suffer("stage")
        own = [] if self._has("drops") or self._has("corrupts") else pass_on_to
        with self.intake.passing_on(own) as payload:
            manifest, self.staged = payload.manifest, version
            if self._has("corrupts"):
                other = payload.buffer.clone()
                other[3] ^= 1
                self.intake._outlets.send(Payload(manifest, other), pass_on_to)
            digests = payload.digest, manifest.digest
            self.log.note("staged", version, self)
            return StageAck(version, payload.buffer.numel(), len(manifest.entries), *digests)

    def end(self) -> None:
        """Be killed: connections go with the process."""
        self.alive = False
        self.intake.close()

    def _has(self, fault: str) -> bool:
        return self.group.faults.get(self.rank) == fault

    def _suffer(self, where: str) -> None:
        if self._has(f"dies in {where}"):
            del self.group.faults[self.rank]
            self.group.kill(self.rank)
            raise Died
        if self._has(f"hangs in {where}"):
            until = time.monotonic() + 30
            while self.alive and time.monotonic() < until:
                time.sleep(0.02)


class StandIns(FakeEngines):
    """A group of them."""

    def __init__(self, size: int, on_a_node: int, sync_s: float = 60.0) -> None:
        self.on_a_node, self.faults = on_a_node, dict[int, str]()
        super().__init__(size, lambda: None)
        self.limits, self.deadline_s = LimitsSpec(sync=sync_s), sync_s
        for process in self.processes:
            process.version = -1

    def process(self, rank: int, generation: int) -> Process:
        return StandIn(rank, generation, self)

    def kill(self, rank: int) -> None:
        super().kill(rank)
        self.processes[rank].end()

    def restart(self, rank: int, reason: str = "") -> None:
        self.processes[rank].end()
        self.faults.pop(rank, None)
        super().restart(rank, reason)

    def close(self) -> None:
        for process in self.processes:
            process.end()
        super().close()


class Source(WeightSource):
    """The trainer's end, whose weights are made up."""

    def __init__(self, numbers: int) -> None:
        super().__init__(SimpleNamespace(base=torch.nn.Linear(1, 1)))  # type: ignore[arg-type]
        self.numbers = numbers

    def listen(self, engines: Sequence[int], timeout_s: float) -> dict[int, str]:
        return self._outlets.listen(engines, HOST, timeout_s)

    def prepare(self, version: int, *_: Any) -> Prepared:  # type: ignore[override]
        weights = torch.arange(self.numbers, dtype=torch.float32) + version
        payload = pack_merged(version, "float32", {"model.norm.weight": weights})
        return self._prepared(payload, 0.0, 0.0, Expected({"weight": str(version)}, 0.0))


class Trainer(FakeTrainer):
    """A group of one rank with such a source."""

    def __init__(self, engines: StandIns, numbers: int) -> None:
        super().__init__(engines)
        self.numbers, self.source = numbers, Source(numbers)
        self.dies_at: list[str] = []
        """Calls over which it is lost and replaced, each once, in this order."""

    def submit(self, method: str, *args: Any, phase: str) -> Now:
        return Now([self._work(method, args)])

    def submit_rank(self, rank: int, method: str, *args: Any, phase: str) -> Now:
        return Now(self._work(method, args))

    def _work(self, method: str, args: tuple[Any, ...]) -> Any:
        part, _, name = method.rpartition(".")
        if self.dies_at[:1] == [name]:
            self.be_replaced()
        if name == "prepare":
            self.version = args[0]
        return getattr(self.source if part == "weight_source" else self, name)(*args)

    def be_replaced(self) -> None:
        """As `LastingGroup` has it: without connections, and with the version that was prepared last."""
        self.dies_at.pop(0)
        self.source.close()
        self.source, self.lives = Source(self.numbers), self.lives + 1
        if self.version >= 0:
            self.source.prepare(self.version)
        raise RanksReplaced("policy", "sync", "its processes were replaced")


@contextmanager
def bytes_sent(trainer: Trainer) -> Iterator[Counter[str]]:
    """Bytes that go out meanwhile: of the `trainer`, and of `engines` that pass on."""
    sent: Counter[str] = Counter()
    lock, move = threading.Lock(), Channel._move

    def counted(self: Channel, chunk: torch.Tensor, operation: Operation) -> None:
        move(self, chunk, operation)
        if operation == "send":
            mine = self in trainer.source._outlets._channels.values()
            with lock:
                sent["trainer" if mine else "engines"] += chunk.nbytes

    with mock.patch.object(Channel, "_move", counted):
        yield sent
