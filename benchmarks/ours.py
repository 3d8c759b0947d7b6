"""Raylign's side: the host's update, through the actor group that the product uses, or without Ray."""

from __future__ import annotations

import operator
import tempfile
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.loss import Loss
from actors.algorithms.sft import SftLoss
from actors.batches import Batch
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.trainer.remote import ModelWorkers, host_group
from actors.trainer.spec import HostSpec, OptimSpec
from benchmarks.meter import Effort, Meter, Reading, peak_rss_bytes
from benchmarks.workloads import BETA, LEARNING_RATE, LORA_ALPHA, LORA_R, Workload, batches, make_rows

ROLE = "policy"


def through_actor(workload: Workload, base: Path, effort: Effort, threads: int) -> dict[str, Any]:
    """As `raylign run` does it: Ray, one rank in an actor of its own, its next rows ready in time."""
    from actors.cluster import LimitsSpec, RoleSpec, start_ray, stop_ray

    start_ray()
    with tempfile.TemporaryDirectory(prefix="raylign-bench-") as logs:
        group = host_group(ROLE, RoleSpec(threads=threads, cpus=1), LimitsSpec(), logs).start()
        try:
            workers = ModelWorkers(group)
            workers.build(_host_spec(base)).result()
            return measure(workload, base, effort, workers, group.pids())
        finally:
            group.shutdown()
            stop_ray()


def without_ray(workload: Workload, base: Path, effort: Effort, threads: int) -> dict[str, Any]:
    """The same host in this process: what is left of a difference is Ray's."""
    import os

    from actors.trainer.model_host import ModelHost

    host = ModelHost(_host_spec(base))

    class Done:
        def __init__(self, value: Any) -> None:
            self._value = value

        def result(self) -> Any:
            return self._value

    class Here:
        """A group of one rank that works at once, in this process."""

        def submit_alike(self, method: str, *args: Any, phase: str = "call", own: Any = ()) -> Done:
            return Done(operator.attrgetter(method)(host)(*args))

        def call_alike(self, method: str, *args: Any, phase: str = "call") -> Any:
            return self.submit_alike(method, *args).result()

        call = call_alike

    return measure(workload, base, effort, ModelWorkers(Here()), [os.getpid()])  # type: ignore[arg-type]


def measure(
    workload: Workload, base: Path, effort: Effort, workers: ModelWorkers, pids: list[int]
) -> dict[str, Any]:
    """Train; in DPO first with the reference computed on the way, then with its log-probabilities at hand."""
    supply = batches(workload, make_rows(workload, effort.batches * workload.batch_rows, base))
    loss: Loss = SftLoss() if workload.objective == "sft" else DpoLoss(beta=BETA)
    workers.add_adapter(ROLE)
    workers.prepare_training(ROLE, _optimizer(), 1_000_000)
    meter = Meter(effort, pids)
    if workload.objective == "sft":
        readings = {"train": _train(workers, supply, loss, meter)}
    else:
        cold = _train(workers, _with_reference(workers, supply), loss, meter)
        cached = list(islice(_with_reference(workers, supply), effort.batches))
        warm = _train(workers, _again(cached), loss, meter)
        readings = {"cold": cold, "warm": warm}
    return {"readings": readings, "peak_rss_bytes": peak_rss_bytes(pids)}


def _train(workers: ModelWorkers, supply: Iterator[Batch], loss: Loss, meter: Meter) -> Reading:
    step = 0
    for batch in islice(supply, meter.effort.warm_up_steps):
        workers.update(batch, loss, step).result()
        step += 1
    upcoming = next(supply)
    meter.start()
    enough = False
    while not enough:
        tokens, pending = upcoming.n_tokens, workers.update(upcoming, loss, step)
        upcoming = next(supply)
        pending.result()
        step += 1
        enough = meter.step(tokens)
    return meter.reading


def _with_reference(workers: ModelWorkers, supply: Iterator[Batch]) -> Iterator[Batch]:
    """Each batch with the bare base's log-probabilities (reference: {share: policy}).

    One batch is asked for ahead. That of the first measured step is therefore done before the clock
    starts, and one that no step uses before it ends: as many passes as steps are measured.
    """
    asked: deque[tuple[Batch, Any]] = deque()
    while True:
        while len(asked) <= 1:
            batch = next(supply)
            asked.append((batch, workers.logprobs(batch, None)))
        batch, pending = asked.popleft()
        logps = pending.result()
        yield batch.with_columns(ref_chosen_logps=logps[0::2], ref_rejected_logps=logps[1::2])


def _again(made: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from made


def _host_spec(base: Path) -> HostSpec:
    lora = LoraSpec(r=LORA_R, lora_alpha=LORA_ALPHA, targets=["attention", "experts"])
    return HostSpec(model=ModelSpec(base=str(base), lora=lora, moe=MoeSpec(router_aux_loss_coef=0.0)))


def _optimizer() -> OptimSpec:
    return OptimSpec(learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch_fused")
