"""Flat buffers step exactly like separate tensors; decay is left off where transformers leaves it off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.trainer import parameter_buckets
from actors.trainer.optimizer import GradientCheck, make_optimizer, make_scheduler, names_without_decay
from actors.trainer.parameter_buckets import FlatParameters
from actors.trainer.spec import OptimSpec

SPEC = OptimSpec(learning_rate=1e-2, weight_decay=0.1, warmup_steps=0.25)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


@pytest.mark.parametrize("bucket_elements", [1 << 26, 70])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_flat_buffers_step_like_separate_tensors(
    name: str, bucket_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_buckets, "BUCKET_ELEMENTS", bucket_elements)
    spec = SPEC.model_copy(update={"optim": name})
    ours, theirs = two_layers(), two_layers()
    exempt = names_without_decay(ours)
    assert exempt == {"0.bias", "1.weight", "1.bias", "2.bias"}
    flat = FlatParameters(dict(ours.named_parameters()), exempt)
    optimizer = make_optimizer(flat.buckets, spec)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if (n in exempt) == off], "weight_decay": decay}
        for off, decay in ((False, 0.1), (True, 0.0))
    ]
    plain = torch.optim.SGD(groups, lr=1e-2) if name == "sgd" else torch.optim.AdamW(groups, lr=1e-2)
    for step in range(5):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        flat.zero_grad()
        ours(x).square().sum().backward()
        optimizer.step()
        plain.zero_grad()
        theirs(x).square().sum().backward()
        plain.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_the_norm_of_many_small_gradients_is_exact() -> None:
    parameters = {"big": nn.Parameter(torch.zeros(1_000_003)), "small": nn.Parameter(torch.zeros(5))}
    flat = FlatParameters(parameters)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))
    exact = torch.cat([p.grad.double() for p in parameters.values() if p.grad is not None]).norm()
    assert flat.grad_norm().item() == pytest.approx(exact.item(), rel=2e-7)


def test_the_schedule_is_transformers_own_and_a_small_warm_up_is_a_share() -> None:
    flat = FlatParameters(dict(two_layers().named_parameters()))
    optimizer = make_optimizer(flat.buckets, SPEC)
    scheduler = make_scheduler(optimizer, SPEC, total_steps=8)
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.0, 0.5e-2, 1e-2])
    assert rates[-1] == pytest.approx(1e-2 / 6)


def test_a_lora_a_waits_until_its_b_has_moved() -> None:
    parameters = {
        "x.lora_A.policy.weight": nn.Parameter(torch.ones(2)),
        "x.lora_B.policy.weight": nn.Parameter(torch.zeros(2)),
        "y.lora_B.policy.weight": nn.Parameter(torch.zeros(2)),
    }
    a, b, unused = parameters.values()
    for parameter in parameters.values():
        parameter.grad = torch.zeros(2)
    b.grad = torch.ones(2)
    check = GradientCheck(parameters)
    assert check.missing() == ["y.lora_B.policy.weight"]
    unused.grad = torch.ones(2)
    assert check.missing() == []
    with torch.no_grad():
        b.add_(1)
    assert check.missing() == ["x.lora_A.policy.weight"]
    a.grad = torch.ones(2)
    assert check.missing() == []
