"""Log-probabilities by blocks of hidden states equal those of whole logits, values and gradients."""

import pytest
import torch

from actors.algorithms import chunked_logprob as head_logprob
from actors.algorithms.chunked_logprob import has_float32_products, head_logps, head_statistics
from actors.algorithms.logprob import LabelStatistics, label_statistics

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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("of_entropy", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_head_that_trains_and_an_entropy_in_the_loss_have_the_gradients_of_whole_logits(
    temperature: float, of_entropy: bool, trains: bool
) -> None:
    hidden, weight, labels = drawn()
    weight.requires_grad_(trains)
    by = [hidden, weight] if trains else [hidden]
    upstream = torch.linspace(-1, 2, T)

    def gradients(found: LabelStatistics) -> tuple[torch.Tensor, ...]:
        loss = (found.logps * upstream).sum()
        return torch.autograd.grad(loss + 0.3 * (found.entropy * upstream).sum() if of_entropy else loss, by)

    ours = head_statistics(hidden, weight, labels, temperature, of_entropy)
    theirs = label_statistics(hidden @ weight.t(), labels, temperature, of_entropy)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain)
    for mine, plain in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, plain)


def test_the_entropy_alone_can_be_the_loss() -> None:
    hidden, weight, labels = drawn()
    (mine,) = torch.autograd.grad(head_statistics(hidden, weight, labels, 1.0, True).entropy.sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    logps = (double @ weight.double().t()).log_softmax(-1)
    (plain,) = torch.autograd.grad(-(logps.exp() * logps).sum(), double)
    torch.testing.assert_close(mine.double(), plain, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_head_in_16_bits_are_summed_over_blocks_in_float32() -> None:
    hidden, weight, labels = drawn()
    exact = (hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None]).sum()
    weight16 = weight.bfloat16().requires_grad_()
    found = head_statistics(hidden.detach().bfloat16(), weight16, labels).logps.sum()
    (mine,) = torch.autograd.grad(found, weight16)
    weight.requires_grad_()
    exact = (hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None]).sum()
    (plain,) = torch.autograd.grad(exact, weight)
    assert mine.dtype == torch.bfloat16
    assert (mine - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize(
    ("gib", "elements"), [(16, 2**25), (24, 2**25), (80, 2**27), (141, 2**28), (8, 2**24)]
)
def test_a_block_on_a_device_follows_its_memory_alone(
    gib: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, int(gib * 2**30)))
    head_logprob._block_of_device.cache_clear()
    assert head_logprob.block_elements(torch.device("cuda")) == elements
    head_logprob._block_of_device.cache_clear()


def test_the_cpu_gives_no_products_in_float32() -> None:
    weight = torch.zeros(4, 4)
    assert not has_float32_products(weight)
    assert not has_float32_products(weight.bfloat16())


@pytest.mark.gpu
def test_a_gpu_gives_logits_in_float32() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(n, 256, device="cuda", dtype=torch.bfloat16, generator=generator) for n in (100, 1000)
    )
    labels = torch.arange(100, device="cuda")
    assert has_float32_products(weight)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert (head_logps(hidden, weight, labels).double() - exact).abs().max() < 1e-3
