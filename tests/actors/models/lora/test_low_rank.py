"""The product of an update's factors: the same bits in any order and share, and as near as float32 gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from actors.models.exact_sums import on_grid
from actors.models.lora import low_rank
from actors.models.lora.low_rank import ExactProduct, Factors, low_rank_delta


def factors(r: int = 16, experts: int | None = None, spread: float = 0.0, seed: int = 0) -> Factors:
    """Random ones; `spread`: powers of ten between the sizes of their elements."""
    generator = torch.Generator().manual_seed(seed)
    stack = () if experts is None else (experts,)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*stack, *shape, generator=generator)
        return values * 10 ** (spread * (torch.rand(*stack, *shape, generator=generator) - 0.5))

    return Factors(random(r, 96), random(160, r), 2.0, False)


def reordered(of: Factors, seed: int) -> Factors:
    order = torch.randperm(of.a.shape[-2], generator=torch.Generator().manual_seed(seed))
    return Factors(of.a[..., order, :].contiguous(), of.b[..., order].contiguous(), of.scaling, False)


@pytest.mark.parametrize("spread", [0.0, 12.0])
@pytest.mark.parametrize("r", [1, 2, 8, 33, 64, 512])
def test_no_order_of_the_terms_changes_a_bit(r: int, spread: float) -> None:
    of = factors(r, spread=spread)
    right = low_rank_delta(of)
    assert all(torch.equal(low_rank_delta(reordered(of, seed)), right) for seed in range(5))


def test_a_plain_float32_product_would_change() -> None:
    of = factors(16)
    assert not torch.equal(of.b @ of.a, reordered(of, 1).b @ reordered(of, 1).a)


@pytest.mark.parametrize("block", [1, 100, 5_000, 2**24])
def test_neither_blocks_nor_threads_nor_shares_change_a_bit(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    of = factors(16, experts=5)
    right = low_rank_delta(of)
    monkeypatch.setitem(low_rank.BLOCK, "cpu", block)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(low_rank_delta(of), right)
    finally:
        torch.set_num_threads(threads)
    # One expert by itself, and a rank's share of rows and columns.
    share = Factors(of.a[3, :, 10:50].contiguous(), of.b[3, 20:90].contiguous(), of.scaling, False)
    assert torch.equal(low_rank_delta(share), right[3, 20:90, 10:50])


@pytest.mark.parametrize("r", [8, 32, 64, 256])
def test_the_error_is_that_of_a_float32_product(r: int) -> None:
    of = factors(r)
    exact = 2.0 * (of.b.double() @ of.a.double())
    error = (low_rank_delta(of) - exact).abs().max() / exact.abs().max()
    plain = (2.0 * (of.b @ of.a) - exact).abs().max() / exact.abs().max()
    assert error < 2e-7 * max(1, r / 32)
    assert error < 4 * plain


@pytest.mark.parametrize("scaling", [2.0, -0.25, 0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_added_to_a_base_have_the_bits_of_the_whole_sum(
    scaling: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(low_rank.BLOCK, "cpu", 1000)
    for experts in (None, 3):
        of = dataclasses.replace(factors(8, experts=experts), scaling=scaling)
        bits = low_rank._bits(8)
        exact = on_grid(of.b, -1, bits) @ on_grid(of.a, -2, bits)
        delta = (exact * scaling).float()
        assert torch.equal(low_rank_delta(of), delta)
        base = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        product, rows = ExactProduct(of), slice(20, 90)
        for expert in [None] if experts is None else range(experts):
            own, added = (base, delta) if expert is None else (base[expert], delta[expert])
            assert torch.equal(product.added_to(own[rows], expert, rows), own[rows].float() + added[rows])


def test_a_weight_that_is_stored_the_other_way_round_gets_its_own_shape() -> None:
    of = factors(4, experts=3)
    other = Factors(of.a, of.b, of.scaling, True)
    assert torch.equal(low_rank_delta(other), low_rank_delta(of).transpose(1, 2))


def test_nothing_stays_nothing_and_what_is_no_number_is_seen() -> None:
    of = factors(4)
    zero = Factors(of.a, torch.zeros_like(of.b), 1.0, False)
    assert not low_rank_delta(zero).any()
    tiny = Factors(of.a * 1e-44, of.b, 1.0, False)
    assert torch.isfinite(low_rank_delta(tiny)).all()
    broken = Factors(of.a.clone(), of.b, 1.0, False)
    broken.a[2, 5] = float("nan")
    assert torch.isnan(low_rank_delta(broken)[:, 5]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [None, 5])
@pytest.mark.parametrize("r", [1, 16, 64])
def test_a_card_makes_the_same_bits(r: int, experts: int | None) -> None:
    of = factors(r, experts, spread=6.0)
    there = Factors(of.a.cuda(), of.b.cuda(), of.scaling, of.transposed)
    assert torch.equal(low_rank_delta(there).cpu(), low_rank_delta(of))
