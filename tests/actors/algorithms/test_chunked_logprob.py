"""Log-probabilities by blocks of hidden states equal those of whole logits, values and gradients."""

import pytest
import torch

from actors.algorithms import chunked_logprob as head_logprob
from actors.algorithms.chunked_logprob import head_logps, head_statistics
from actors.algorithms.logprob import label_statistics

T, H, V = 13, 6, 29


@pytest.fixture(autouse=True)
def blocks_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_logprob, "HEAD_BLOCK_ELEMENTS", 5 * V)


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator)
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_and_gradient_equal_those_of_whole_logits(temperature: float) -> None:
    hidden, weight, labels = drawn()
    upstream = torch.linspace(-1, 2, T)
    ours = head_statistics(hidden, weight, labels, temperature)
    theirs = label_statistics(hidden @ weight.t(), labels, temperature)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain)
    (mine,) = torch.autograd.grad((ours.logps * upstream).sum(), hidden)
    (plain,) = torch.autograd.grad((theirs.logps * upstream).sum(), hidden)
    torch.testing.assert_close(mine, plain)


def test_the_gradient_equals_that_of_log_softmax_in_double_precision() -> None:
    hidden, weight, labels = drawn()
    (mine,) = torch.autograd.grad(head_statistics(hidden, weight, labels).logps.sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    logps = (double @ weight.double().t()).log_softmax(-1).gather(1, labels[:, None])
    (plain,) = torch.autograd.grad(logps.sum(), double)
    torch.testing.assert_close(mine.double(), plain, rtol=1e-5, atol=1e-6)


def test_without_statistics_the_log_probabilities_are_the_same_bits() -> None:
    hidden, weight, labels = drawn()
    assert torch.equal(head_logps(hidden, weight, labels), head_statistics(hidden, weight, labels).logps)


def test_a_batch_without_labels_gives_empty_statistics() -> None:
    hidden, weight, labels = drawn()
    found = head_statistics(hidden[:0], weight, labels[:0])
    assert all(len(x) == 0 for x in found)
