"""The fused expert MLP against what autograd makes of the plain formula, in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import silu

from actors.models import threads as workers
from actors.models.moe.grouped_mlp import LowRank, Routes, expert_mlp

N, K, E, H, INNER, R = 11, 2, 5, 6, 4, 3
WANTED = torch.tensor([1, 4, 5, 10])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def chosen() -> torch.Tensor:
    # Expert 3 gets no token.
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor([0, 1, 2, 4])
    return torch.stack([usable[torch.randperm(4, generator=generator)[:K]] for _ in range(N)])


def drawn(*shape: int, seed: int, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


HIDDEN, WEIGHTS = drawn(N, H, seed=1), drawn(N, K, seed=2)
GATE_UP, DOWN = drawn(E, 2 * INNER, H, seed=3, grad=False), drawn(E, H, INNER, seed=4, grad=False)
A1, B1 = drawn(E, R, H, seed=5), drawn(E, 2 * INNER, R, seed=6)
A2, B2 = drawn(E, R, INNER, seed=7), drawn(E, H, R, seed=8)
UPSTREAM = drawn(N, H, seed=9, grad=False)


def plainly(lora: bool) -> torch.Tensor:
    gate_up = GATE_UP + 2.0 * B1 @ A1 if lora else GATE_UP
    down = DOWN + 0.5 * B2 @ A2 if lora else DOWN
    experts = chosen()
    both = torch.einsum("noh,nh->no", gate_up[experts.view(-1)], HIDDEN.repeat_interleave(K, 0))
    act = silu(both[:, :INNER]) * both[:, INNER:]
    y = torch.einsum("nhi,ni->nh", down[experts.view(-1)], act)
    return (y.view(N, K, H) * WEIGHTS[:, :, None]).sum(1)


def fused(lora: bool, wanted: torch.Tensor | None = None, hidden: torch.Tensor = HIDDEN) -> torch.Tensor:
    beside = (LowRank(A1, B1, 2.0), LowRank(A2, B2, 0.5)) if lora else (None, None)
    return expert_mlp(hidden, WEIGHTS, GATE_UP, DOWN, Routes.of(chosen(), E, wanted), *beside)


@pytest.mark.parametrize("lora", [True, False])
def test_value_and_gradients_equal_the_plain_formula(lora: bool, threads: int) -> None:
    ours, theirs = fused(lora), plainly(lora)
    torch.testing.assert_close(ours, theirs)
    by = [HIDDEN, WEIGHTS, *([A1, B1, A2, B2] if lora else [])]
    mine, plain = (torch.autograd.grad(y, by, UPSTREAM) for y in (ours, theirs))
    torch.testing.assert_close(mine, plain)
    if lora:
        assert not any(gradient[3].any() for gradient in mine[2:])


def test_tokens_that_are_left_out_are_zero_and_the_others_as_before(threads: int) -> None:
    ours, theirs = fused(True, WANTED), plainly(True)
    torch.testing.assert_close(ours[WANTED], theirs[WANTED])
    left_out = [n for n in range(N) if n not in WANTED.tolist()]
    assert not ours[left_out].any()
    read = torch.zeros(N, 1, dtype=torch.float64)
    read[WANTED] = 1
    by = [HIDDEN, WEIGHTS, A1, B1, A2, B2]
    mine = torch.autograd.grad(ours, by, UPSTREAM)  # what flows into zeros is lost
    plain = torch.autograd.grad(theirs, by, UPSTREAM * read)
    torch.testing.assert_close(mine, plain)


def test_no_token_at_all() -> None:
    nothing = fused(True, WANTED[:0])
    assert not nothing.any()
    assert not any(g.any() for g in torch.autograd.grad(nothing, [HIDDEN, A1, B2], UPSTREAM))


def test_a_frozen_input_gets_no_gradient() -> None:
    hidden = HIDDEN.detach()
    fused(True, hidden=hidden).sum().backward()
    assert hidden.grad is None
    assert A1.grad is not None
    for factor in (WEIGHTS, A1, B1, A2, B2):
        factor.grad = None


def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).requires_grad_()
    weights, experts = torch.rand(300, 8, generator=generator).topk(K)
    gate_up, down = (torch.randn(8, *s, generator=generator) for s in ((96, 64), (64, 48)))
    a, b = (torch.randn(8, *s, generator=generator).requires_grad_() for s in ((4, 64), (96, 4)))
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = expert_mlp(hidden, weights, gate_up, down, Routes.of(experts, 8), LowRank(a, b, 2.0))
            found.append([y, *torch.autograd.grad(y.sum(), [hidden, a, b])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_workers_do_each_item_once_with_one_thread_of_torch_and_leave_the_callers_number(
    threads: int,
) -> None:
    seen: list[tuple[int, int, bool]] = []
    workers.each(range(50), lambda i: seen.append((i, torch.get_num_threads(), torch.is_grad_enabled())))
    assert sorted(i for i, _, _ in seen) == list(range(50))
    assert {(n, grad) for _, n, grad in seen} == {(1, False)}
    assert torch.get_num_threads() == threads


def test_an_error_in_a_worker_is_the_callers(threads: int) -> None:
    def fails(item: int) -> None:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        workers.each([1, 2, 3], fails)
