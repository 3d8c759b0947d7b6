"""Memory and CPU time of one long row in an update of SFT and of DPO, on the tiny base.

python -m benchmarks.long_rows                      # rows of 4,096 to 32,768 tokens: some minutes
python -m benchmarks.long_rows --lengths 4096 8192
python -m benchmarks.long_rows --ranks 2            # that share out the positions of each row

An SFT row has a quarter of its tokens as prompt. A DPO row is a pair of so many tokens each, half of them a
prompt in common: one and a half times as many positions. A process for each loss updates with a short row
first, then with the others, the shortest first.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.sharding_memory import Memory
from benchmarks.workloads import ROOT, TRAINED_TINY

LOSSES = ("sft", "dpo")
LENGTHS = (4_096, 8_192, 16_384, 32_768)
SHORT = 64
TIMEOUT_S = 1_800
LINE = "{:5} {:>7} {:>9} {:>16} {:>7}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--case", help="internal: JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(work(**json.loads(args.case))))
        return
    print(LINE.format("loss", "tokens", "MiB", "MiB / 1k tokens", "CPU s"))
    for loss in LOSSES:
        for length, found in zip(args.lengths, measured(loss, args.lengths, args.checkpointing, args.ranks)):
            mib = found["peak"] / 2**20
            numbers = f"{mib:,.0f}", f"{mib / length * 1024:.1f}", f"{found['cpu_seconds']:.1f}"
            print(LINE.format(loss, length, *numbers), flush=True)


def measured(
    loss: str, lengths: Sequence[int], checkpointing: bool = False, ranks: int = 1
) -> list[dict[str, float]]:
    """Of each length, in one process for all (or one for each rank): `peak` in bytes of the largest rank
    beyond what it held before the first, and `cpu_seconds` of all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        init = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    case = {"loss": loss, "lengths": list(lengths), "checkpointing": checkpointing, "ranks": ranks}
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.long_rows", "--case"]
    processes = [
        subprocess.Popen(
            [*command, json.dumps({**case, "rank": rank, "init": init})],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("a process failed, see above")
    by_rank = [json.loads(output.splitlines()[-1]) for output in outputs]
    return [
        {"peak": max(x["peak"] for x in found), "cpu_seconds": sum(x["cpu_seconds"] for x in found)}
        for found in zip(*by_rank, strict=True)
    ]


def work(
    loss: str, lengths: list[int], checkpointing: bool, ranks: int, rank: int, init: str
) -> list[dict[str, float]]:
    """An update with one row of each length."""
    from actors.models.spec import ModelSpec
    from actors.trainer.model_host import ModelHost
    from actors.trainer.spec import HostSpec, OptimSpec

    model = ModelSpec(base=str(TRAINED_TINY), gradient_checkpointing=checkpointing)
    host = ModelHost(HostSpec(model=model, sequence_parallel_size=ranks), rank, ranks, init)
    host.add_adapter("policy")
    host.updates.prepare_training("policy", OptimSpec(), 2)
    update(host, loss, SHORT)
    memory, found = Memory(), []
    for length in lengths:
        began = time.process_time()
        update(host, loss, length)
        seconds = time.process_time() - began
        found.append({"peak": float(memory.since_start()[1]), "cpu_seconds": seconds})
    host.close()
    return found


def update(host: Any, loss: str, length: int) -> dict[str, float]:
    """A step with one row of so many tokens; for DPO with the reference's log-probabilities before."""
    from actors.algorithms.dpo import DpoLoss
    from actors.algorithms.sft import SftLoss
    from actors.batches.batch import Batch

    generator = np.random.default_rng(0)
    if loss == "sft":
        ids = generator.integers(3, 250, (1, length))
        batch = Batch.from_sequences(ids, np.arange(length)[None] >= length // 4)
        return host.updates.update(batch, SftLoss(), 0)
    ids = generator.integers(3, 250, (2, length))
    ids[1, : length // 2] = ids[0, : length // 2]
    counted = np.arange(length) >= length // 2
    batch = Batch.from_sequences(ids, np.stack([counted, counted]), 2)
    logps = host.scores.logprobs(batch, None)
    batch = batch.with_columns(ref_chosen_logps=logps[0::2], ref_rejected_logps=logps[1::2])
    return host.updates.update(batch, DpoLoss(), 0)


if __name__ == "__main__":
    main()
