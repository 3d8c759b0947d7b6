"""Trainer and engine on one device in turns: memory that both have, and weights that leave the device and
come back."""

from __future__ import annotations

import numpy as np
import torch

from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.groups import END_S, START_S, Peer
from benchmarks.gpu.models import ROLE, batches, fresh_host

TIMEOUT_S = 20.0
"""Of every operation of a process."""
LAYERS = 8
"""Of Qwen3-30B-A3B, which are parked: 10 GB."""
IN_PLACE = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
"""CUDA's handles of memory that grows in place need rights over the other process."""
STAYS_AT_MOST = 0.05
"""Of the memory of a trainer that is parked."""


def run(check: Check) -> None:
    """Carry weights between two processes on the device, and park a trainer."""
    wrong = [_carried(check), _parked(check)]
    if found := [reason for reason in wrong if reason]:
        raise Deviation("; ".join(found))


def _carried(check: Check) -> str:
    ends = {name: Peer(name, check, TIMEOUT_S, **IN_PLACE) for name in ("lender", "borrower")}
    try:
        ready = {name: peer.answer(START_S) for name, peer in ends.items()}
        for peer in ends.values():
            peer.go(str(ready["lender"].get("address")))
        said = {name: peer.answer(TIMEOUT_S + END_S) for name, peer in ends.items()}
    finally:
        for peer in ends.values():
            peer.end()
    check.tell(case="memory that two processes have", **said)
    sums = {end.get("carried") for end in said.values()}
    return "" if len(sums) == 1 and None not in sums else f"memory that two processes have: {said}"


def _parked(check: Check) -> str:
    host = fresh_host(check, LoraSpec(r=8), **({} if check.tiny else {"num_hidden_layers": LAYERS}))
    batch, loss = batches(host, vocabulary=300, prompt=24, answer=12, n=8)["sft"]
    host.updates.prepare_training(ROLE, OptimSpec(), 2)
    host.updates.update(batch, loss, 0)
    before, held = host.scores.token_logprobs(batch, ROLE), _held(check)
    size = host.residence.bytes()
    parking = check.once(lambda: host.residence.park("all"))
    stays = _held(check) / held if check.on_cuda else 0.0
    waking = check.once(host.residence.wake)
    different = int(np.sum(host.scores.token_logprobs(batch, ROLE) != before))
    _goes_on(host, check)
    gigabytes = (size.base + size.optimizer) / 1e9
    check.tell(
        case="a trainer that is parked",
        gb=gigabytes,
        park_s=parking,
        wake_s=waking,
        park_gb_per_s=gigabytes / parking,
        wake_gb_per_s=gigabytes / waking,
        share_that_stays=stays,
        different=different,
    )
    right = not different and stays <= STAYS_AT_MOST
    return "" if right else f"a trainer that was parked: {different} tokens differ, {stays:.2g} stayed"


def _held(check: Check) -> int:
    """Bytes of tensors on the device."""
    return torch.cuda.memory_allocated() if check.on_cuda else 0


def _goes_on(host: ModelHost, check: Check) -> None:
    """Take one more optimizer step, with moments that were away. Raises: InvariantViolation: it can't."""
    batch, loss = batches(host, vocabulary=300, prompt=24, answer=12, n=8)["sft"]
    host.updates.update(batch, loss, 1)
    check.wait()
