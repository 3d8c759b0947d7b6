"""Linear layers with LoRA in one function against PEFT's own forward."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import Linear

from actors.models.lora import adapters
from actors.models.lora import linear as lora_linear
from actors.models.spec import LoraSpec


def drawn(*shape: int, seed: int, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def test_value_and_gradients_equal_the_formula() -> None:
    x, weight = drawn(2, 5, 7, seed=1), drawn(6, 7, seed=2, grad=False)
    a, b = drawn(3, 7, seed=3), drawn(6, 3, seed=4)
    ours, theirs = lora_linear.lora_linear(x, weight, a, b, 0.5), x @ (weight + 0.5 * b @ a).t()
    torch.testing.assert_close(ours, theirs)
    upstream = drawn(2, 5, 6, seed=5, grad=False)
    mine, plain = (torch.autograd.grad(y, (x, a, b), upstream) for y in (ours, theirs))
    torch.testing.assert_close(mine, plain)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Scalings of the calls that ran fused."""
    seen: list[float] = []
    plain = lora_linear.lora_linear
    monkeypatch.setattr(lora_linear, "lora_linear", lambda *args: (seen.append(args[-1]), plain(*args))[1])
    return seen


def q_proj(peft) -> Linear:
    return next(m for n, m in peft.named_modules() if n.endswith("q_proj"))


def test_it_runs_fused_and_equals_peft(adapted, calls) -> None:
    layer = q_proj(adapted("qwen3_moe", LoraSpec(r=4, lora_alpha=12, targets=["attention"])))
    x = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(0))
    ours = layer(x)
    assert calls == [3.0]
    assert type(layer).__name__ == "Linear"
    torch.testing.assert_close(ours, Linear.forward(layer, x), rtol=0, atol=1e-6)


def test_a_fresh_adapter_changes_no_bit(adapted, calls) -> None:
    peft = adapted("qwen3_moe", LoraSpec(r=4, targets=["attention"]))
    layer = q_proj(peft)
    torch.nn.init.zeros_(layer.lora_B["policy"].weight)
    x = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        on = layer(x)
        with adapters.role(peft, None):
            assert torch.equal(on, layer(x))
    assert len(calls) == 1


def test_what_is_not_plain_lora_runs_pefts_way(adapted, calls) -> None:
    dropping = q_proj(adapted("qwen3_moe", LoraSpec(r=4, targets=["attention"], lora_dropout=0.5))).train()
    half = q_proj(adapted("qwen3_moe", LoraSpec(r=4, targets=["attention"]), dtype="bfloat16"))
    peft = adapted("qwen3_moe", LoraSpec(r=4, targets=["attention"]))
    adapters.add_adapter(peft, "second", LoraSpec(r=4, targets=["attention"]), seed=9)
    peft.base_model.set_adapter(["policy", "second"])
    for layer in (dropping, half, q_proj(peft)):
        layer(torch.ones(1, 3, layer.in_features, dtype=layer.weight.dtype))
    assert calls == []
