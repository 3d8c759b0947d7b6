"""LoRA on one layer's experts, unmerged beside the grouped product, against PEFT's W + BA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.models import ROLE, fresh_host, settings, stir

RANKS: tuple[tuple[int, Any], ...] = ((16, "r"), (16, "r/top_k"))
"""LoRA's rank, and that of each expert."""
FARTHEST = 0.05
"""Largest distance of the two ways' outputs and gradients as a share of their norm: both round to bfloat16 at
places of their own."""


def run(check: Check) -> None:
    """Forward and backward pass of a layer, by rank and tokens, each way and without LoRA."""
    far: list[str] = []
    for r, expert_rank in RANKS:
        far += _of_rank(check, r, expert_rank)
        check.free()
    if far:
        raise Deviation("; ".join(far))


def _of_rank(check: Check, r: int, expert_rank: Any) -> list[str]:
    """Every number of tokens; where the two ways are too far apart."""
    lora = LoraSpec(r=r, expert_rank=expert_rank, expert_impl="unmerged")
    host = fresh_host(check, lora, num_hidden_layers=1)
    stir(host)
    far = []
    for tokens in check.cases((64,) if check.tiny else (2_048, 8_192, 32_768)):
        case = {"r": r, "expert_rank": expert_rank, "tokens": tokens}
        with check.case(**case):
            off = _compare(check, host, tokens, case)
            far += [f"{case} {name}: {x:.2g}" for name, x in off.items() if not x <= FARTHEST]
    if check.on_cuda:
        inputs = _input(check, 8_192)
        check.tell(r=r, expert_rank=expert_rank, **check.kernels(lambda: _pass(host, ROLE, *inputs)))
    return far


def _compare(check: Check, host: ModelHost, tokens: int, case: dict[str, Any]) -> dict[str, float]:
    """Tell times and memory; how far the two ways are apart."""
    base, x_and_gradient = host.state.base, _input(check, tokens)
    unmerged = base.config._experts_implementation
    found: dict[str, Any] = {"implementation": unmerged}
    found |= _measured(check, "base", lambda: _pass(host, None, *x_and_gradient))
    found |= _measured(check, "unmerged", lambda: _pass(host, ROLE, *x_and_gradient))
    ours = _pass(host, ROLE, *x_and_gradient)
    base.set_experts_implementation("grouped_mm")
    try:
        found |= _measured(check, "peft", lambda: _pass(host, ROLE, *x_and_gradient))
        theirs = _pass(host, ROLE, *x_and_gradient)
    finally:
        base.set_experts_implementation(unmerged)
    off = {name: _distance(ours[name], theirs[name]) for name in ours}
    check.tell(
        **case,
        **found,
        floor_s=check.floor_s(_flops(check, tokens)),
        unmerged_over_base=found["unmerged_s"] / found["base_s"],
        peft_over_unmerged=found["peft_s"] / found["unmerged_s"],
        **{f"{name}_apart": x for name, x in off.items()},
    )
    return off


def _measured(check: Check, name: str, work: Callable[[], Any]) -> dict[str, Any]:
    check.free()
    check.watch_memory()
    seconds = check.seconds(work)
    return {f"{name}_s": seconds, f"{name}_gib": check.peak_gib()}


def _input(check: Check, tokens: int) -> tuple[Tensor, Tensor]:
    shape = (1, tokens, settings(check)["hidden_size"])
    x = torch.randn(shape, device=check.device, dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn_like(x)


def _pass(host: ModelHost, role: str | None, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output, and gradients by the input and by all factors of the adapter."""
    layer = host.state.base.model.layers[0].mlp
    factors = [p for p in layer.parameters() if p.requires_grad] if role is not None else []
    with host.state.as_role(role):
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        by_input, *by_factors = torch.autograd.grad(y, [x, *factors], gradient)
    found = {"output": y.detach(), "gradient": by_input}
    return found | ({"factors": torch.cat([g.flatten() for g in by_factors])} if by_factors else {})


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _flops(check: Check, tokens: int) -> float:
    """Of the base's three products by expert, forward and by the input."""
    size = settings(check)
    matrices = 3 * size["hidden_size"] * size["moe_intermediate_size"]
    return 2.0 * 2.0 * tokens * size["num_experts_per_tok"] * matrices
