"""What a first run on one GPU has to find out, in one process without Ray and vLLM (`make gpu-check`).

    python -m benchmarks.gpu_check                       # at most eight minutes on a card
    python -m benchmarks.gpu_check --device cpu --tiny   # everything small, to try the check itself

Every section writes its figures as JSON lines as soon as it has them; one that fails lets the others run, and
the exit code is 1 then. Sections, in this order:

    ceilings  bandwidth of copies, rate of bfloat16 products, bytes to the host
    groups    NCCL on one card: a process alone, two that it has to refuse, a channel without its peer
    turns     memory that two processes on the card have; a trainer whose weights leave it and come back
    updates   SFT, DPO and GRPO updates in float32 and bfloat16, against the CPU's in float32
    experts   LoRA beside the product of one layer's experts, against PEFT's W + BA
    attention a row of many sequences and one of 32 k, by torch's varlen attention and a call for each
    head      log-probabilities of 8,192 tokens over a vocabulary of 152 k
    weights   merge, digests and packing of a weight sync; the same bits on device and CPU
    whole     Qwen3-30B-A3B with fresh weights: steps of SFT, DPO, GRPO, and of a plain PEFT loop

It needs torch, transformers and peft with what they need, pydantic, numpy, safetensors and xxhash.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.check import Check

SECTIONS = ("ceilings", "groups", "turns", "updates", "experts", "attention", "head", "weights", "whole")
ABSENT = ("ray", "vllm")
"""Nothing here may need these."""
BUDGET_S = 420.0
"""What would begin later is left out. A case takes at most a minute, and eight are given to all."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # Rows of changing length leave holes in fixed segments.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def main() -> int:
    began = time.monotonic()
    arguments = _arguments()
    # Before torch is imported.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        message = f"--device {arguments.device}: torch {torch.__version__} sees no CUDA device"
        print(f"{message}; --device cpu --tiny tries the check itself", file=sys.stderr)
        return 2
    from benchmarks.gpu.check import Check

    if arguments.tiny:
        # More only wait for each other.
        torch.set_num_threads(1)
    out = arguments.out or _default_out(arguments.tiny)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    check = Check(torch.device(arguments.device), arguments.tiny, out, arguments.seconds, began=began)
    for name, section in _sections().items():
        if name in arguments.only:
            check.run(name, section)
    return _end(check)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few repeats")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS), help="sections")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="what would begin later is left out")
    parser.add_argument("--out", type=Path, help="file of JSON lines; default: in benchmarks/results")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only) - set(SECTIONS)):
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return arguments


def _default_out(tiny: bool) -> Path:
    name = "gpu_check-quick.jsonl" if tiny else "gpu_check.jsonl"
    return Path(__file__).resolve().parent / "results" / name


def _sections() -> dict[str, Callable[[Check], None]]:
    from benchmarks.gpu import attention, ceilings, experts, groups, head, turns, updates, weights, whole

    modules: tuple[Any, ...] = (ceilings, groups, turns, updates, experts, attention, head, weights, whole)
    return {name: module.run for name, module in zip(SECTIONS, modules, strict=True)}


def _end(check: Check) -> int:
    check.section = "end"
    loaded = [name for name in ABSENT if name in sys.modules]
    if loaded:
        check.failed.append(f"{', '.join(loaded)} was imported")
    check.tell(failed=check.failed, left_out=check.left_out, seconds=round(time.monotonic() - check.began, 1))
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
