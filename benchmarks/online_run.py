"""One side of an online comparison: `raylign run` of a config, a step a turn (started by the comparisons)."""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.turns import Gate

CORES = "RAYLIGN_BENCH_CORES"
"""Environment variable: `policy:0,rollout:1` keeps these roles' processes on these cores."""


class Over(BaseException):
    """There is no further turn: leave the run as an interrupt would."""


def main(config: str) -> None:
    """The run of `config`, with its online loop behind a gate."""
    from pipeline.config.load import load_config
    from pipeline.execution.run import run
    from pipeline.stages.online.loop import RlLoop

    gate, real = Gate(), RlLoop.step

    def gated(loop: RlLoop, step: int) -> Any:
        if step == 0:
            _pin(loop)
        if not gate.wait():
            raise Over
        result = real(loop, step)
        kept = ("time/", "sync/", "completions/", "mismatch/", "sampling/", "staleness", "num_tokens")
        metrics = {name: value for name, value in result.metrics.items() if name.startswith(kept)}
        gate.tell({"seconds": result.metrics["time/step"], "metrics": metrics})
        return result

    RlLoop.step = gated  # type: ignore[method-assign]
    try:
        run(load_config(config))
    except Over:
        sys.exit(0)


def _pin(loop: Any) -> None:
    from benchmarks.processes import pin

    for wanted in filter(None, os.environ.get(CORES, "").split(",")):
        role, _, core = wanted.partition(":")
        group = loop.ctx.rollout.group if role == "rollout" else getattr(loop.ctx, role).workers.group
        for pid in group.pids():
            pin(pid, {int(core)})


if __name__ == "__main__":
    main(sys.argv[1])
