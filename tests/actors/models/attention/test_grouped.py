"""Attention by groups equals the slow one, and its memory is linear in tokens."""

from __future__ import annotations

import pytest
import torch

from actors.models.attention import grouped
from actors.models.attention.grouped import attend_causally
from tests.actors.models.attention import slow_attention


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("length", "window"), [(9, None), (9, 3), (24, 8), (29, 8), (32, 40), (45, 12), (45, 1)]
)
def test_a_window_in_blocks_equals_a_dense_one(
    length: int, window: int | None, with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "WINDOW_BLOCK", 8)
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(2, heads, length, 6, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    sinks = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() if with_sinks else None
    found = attend_causally(query, key, value, 0.0, 0.3, window, sinks).transpose(1, 2)
    rows = zip(*(x.transpose(1, 2) for x in (query, key, value)), strict=True)
    wanted = torch.stack([slow_attention.attend(*row, 0.3, window, sinks) for row in rows])
    # Sinks go through float32.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    inputs = [x for x in (query, key, value, sinks) if x is not None]
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_values_narrower_than_queries_need_no_scores_of_all_pairs() -> None:
    """As latent attention has them: torch's kernel for one size is taken, which makes no (L, L) tensor."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 20, 12, generator=generator) for _ in range(2))
    value = torch.randn(1, 2, 20, 8, generator=generator)
    with torch.profiler.profile() as profile:
        found = attend_causally(query, key, value, 0.0, None, None, None)
    wanted = slow_attention.attend(*(x[0].transpose(0, 1) for x in (query, key, value)), 12**-0.5, None, None)
    torch.testing.assert_close(found[0].transpose(0, 1), wanted, rtol=1e-5, atol=1e-6)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
