"""The grouped functions against what autograd makes of the plain formulas, in float64."""

import pytest
import torch

from actors.models.grouped import Routes, combined, grouped_lora, sorted_rows

N, K, E, IN, OUT, R = 11, 2, 5, 6, 7, 3


@pytest.fixture
def routes() -> Routes:
    # Expert 3 gets no token.
    return Routes.of(_chosen(), E)


def _chosen() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor([0, 1, 2, 4])
    return torch.stack([usable[torch.randperm(4, generator=generator)[:K]] for _ in range(N)])


def _drawn(*shape: int, seed: int = 1, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def test_rows_are_sorted_by_expert_and_found_again(routes: Routes) -> None:
    assert sum(routes.sizes) == N * K
    assert routes.sizes[3] == 0
    experts = _chosen().reshape(-1)[routes.order]
    assert torch.equal(experts, experts.sort().values)
    for place, choice in enumerate(routes.choices):
        assert torch.equal(routes.order[choice], torch.arange(N) * K + place)


def test_a_token_whose_rows_are_weighted_and_added_up_is_its_experts_mixture(routes: Routes) -> None:
    hidden, weights = _drawn(N, IN), _drawn(N, K, seed=2)
    ours = combined(sorted_rows(hidden, routes) * 3, weights, routes)
    torch.testing.assert_close(ours, 3 * hidden * weights.sum(1, keepdim=True))


def test_blocks_of_tokens_change_no_bit() -> None:
    n, k, width = 700, 4, 512
    routes = Routes.of(torch.rand(n, 16, generator=torch.Generator().manual_seed(0)).topk(k).indices, 16)
    y, weights = _drawn(n * k, width).float(), _drawn(n, k, seed=2).float()
    # The end of transformers' grouped_mm_experts_forward.
    theirs = (y * weights.reshape(-1)[routes.order, None])[routes.back].view(n, k, width).sum(dim=1)
    assert torch.equal(combined(y, weights, routes), theirs)


def test_gradients_of_gathering_and_combining_equal_finite_differences(routes: Routes) -> None:
    assert torch.autograd.gradcheck(lambda h: sorted_rows(h, routes), (_drawn(N, IN),))
    y, weights = _drawn(N * K, IN), _drawn(N, K, seed=2)
    assert torch.autograd.gradcheck(lambda y, w: combined(y, w, routes), (y, weights))


@pytest.mark.parametrize("lora", [True, False])
def test_grouped_lora_equals_its_formula_per_expert(routes: Routes, lora: bool) -> None:
    x, weight = _drawn(N * K, IN), _drawn(E, OUT, IN, seed=2, grad=False)
    a, b = (_drawn(E, R, IN, seed=3), _drawn(E, OUT, R, seed=4)) if lora else (None, None)
    ours = grouped_lora(x, weight, routes, a, b, 2.0)
    experts = _chosen().reshape(-1)[routes.order]
    theirs = torch.einsum("si,soi->so", x, weight[experts])
    wanted = [x]
    if a is not None and b is not None:
        theirs = theirs + 2 * torch.einsum("sor,sri,si->so", b[experts], a[experts], x)
        wanted += [a, b]
    torch.testing.assert_close(ours, theirs)
    upstream = _drawn(N * K, OUT, seed=5, grad=False)
    mine, plain = (torch.autograd.grad(y, wanted, upstream) for y in (ours, theirs))
    torch.testing.assert_close(mine, plain)


def test_a_frozen_input_gets_no_gradient(routes: Routes) -> None:
    x, weight = _drawn(N * K, IN, grad=False), _drawn(E, OUT, IN, seed=2, grad=False)
    a, b = _drawn(E, R, IN, seed=3), _drawn(E, OUT, R, seed=4)
    grouped_lora(x, weight, routes, a, b, 1.0).sum().backward()
    assert x.grad is None
    for factor in (a, b):
        assert factor.grad is not None
        assert not factor.grad[3].any()
