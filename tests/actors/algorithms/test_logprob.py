"""Label statistics against plain torch."""

from __future__ import annotations

import pytest
import torch

from actors.algorithms import logprob
from actors.algorithms.logprob import label_logps, label_statistics


@pytest.fixture(params=[1 << 19, 50])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "BLOCK_ELEMENTS", request.param)


def sample(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(17, 23, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(0, 23, (17,), generator=generator)


def test_statistics_equal_plain_torch(block_elements: None) -> None:
    logits, labels = sample()
    stats = label_statistics(logits, labels)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(stats.logps, log_p.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(stats.mean_logits, logits.mean(-1))
    torch.testing.assert_close(stats.log_sum_sq, (log_p.exp() ** 2).sum(-1).log())
    assert torch.equal(stats.correct, logits.argmax(-1) == labels)
    torch.testing.assert_close(label_logps(logits, labels), stats.logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_equals_plain_torch(block_elements: None, dtype: torch.dtype) -> None:
    logits, labels = sample(dtype)
    weights = torch.linspace(-1, 2, 17)
    (label_statistics(logits, labels).logps * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    (logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0] * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad)


def test_no_labels_give_empty_statistics() -> None:
    stats = label_statistics(torch.zeros(0, 23), torch.zeros(0, dtype=torch.int64))
    assert stats.logps.shape == (0,)


def test_a_temperature_divides_the_logits(block_elements: None) -> None:
    logits, labels = sample()
    cooler = label_statistics(logits, labels, temperature=0.7)
    log_p = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(cooler.logps, log_p.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(cooler.entropy, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(label_logps(logits, labels, 0.7), cooler.logps)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("of_logps", [0.0, 1.0])
def test_the_entropys_gradient_equals_plain_torch(
    block_elements: None, temperature: float, of_logps: float
) -> None:
    logits, labels = sample()
    weights = torch.linspace(-1, 2, 17)
    stats = label_statistics(logits, labels, temperature, entropy_gradient=True)
    ((stats.entropy + of_logps * stats.logps) * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    log_p = (logits / temperature).log_softmax(-1)
    chosen = log_p.gather(1, labels[:, None])[:, 0]
    ((-(log_p.exp() * log_p).sum(-1) + of_logps * chosen) * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad)
