"""What the device can do at most: copies, bfloat16 products, bytes to the host."""

from __future__ import annotations

import platform

import torch

from benchmarks.gpu.check import Check


def run(check: Check) -> None:
    """Measure, and keep the rates for the floors beside later figures."""
    _machine(check)
    check.bytes_per_s = _copied(check, 2**20 if check.tiny else 2**31)
    check.flops_per_s = _multiplied(check, 256 if check.tiny else 8_192)
    check.tell(
        copy_tb_per_s=check.bytes_per_s / 1e12,
        bf16_tflops=check.flops_per_s / 1e12,
        **_to_host(check, 2**20 if check.tiny else 2**30),
    )


def _machine(check: Check) -> None:
    import peft
    import transformers

    facts = {"device": platform.processor() or platform.machine()}
    if check.on_cuda:
        card = torch.cuda.get_device_properties(check.device)
        facts = {
            "device": card.name,
            "memory_gib": card.total_memory / 2**30,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    check.tell(**facts, **versions, python=platform.python_version(), tiny=check.tiny)


def _copied(check: Check, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    return 2 * size / check.seconds(lambda: target.copy_(source))


def _multiplied(check: Check, edge: int) -> float:
    factor = torch.randn(edge, edge, device=check.device, dtype=torch.bfloat16)
    return 2 * edge**3 / check.seconds(lambda: factor @ factor, repeats=10, warm_ups=3)


def _to_host(check: Check, size: int) -> dict[str, float]:
    source = torch.zeros(size, dtype=torch.uint8, device=check.device)
    host = torch.empty(size, dtype=torch.uint8)
    found = {"to_host_gb_per_s": size / check.seconds(lambda: host.copy_(source), 3, 1) / 1e9}
    if check.on_cuda:
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        copied = check.seconds(lambda: pinned.copy_(source, non_blocking=True), 3, 1)
        found["to_pinned_host_gb_per_s"] = size / copied / 1e9
    return found
