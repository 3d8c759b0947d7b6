"""The obvious attention of one sequence: all scores, then a mask. And torch's varlen kernels made of it, for
tensors of the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import varlen


class Made(NamedTuple):
    """Attention of one sequence, (heads, n, m)."""

    scores: Tensor
    """-inf where a query doesn't look."""
    value: Tensor
    """(heads, m, D), as many heads as the query has."""


def made(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Made:
    """query (n, heads, D), key and value (m, kv heads, D): the last query is at the last key."""
    n, m, repeats = len(query), len(key), query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (key, value))
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
    seen = (distance >= 0) & (distance < (m if window is None else window))
    scores = scale * query.transpose(0, 1) @ key.transpose(1, 2)
    return Made(scores.masked_fill(~seen, -torch.inf), value)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """As `made`; (n, heads, D of value)."""
    scores, value = made(query, key, value, scale, window)
    if sinks is not None:
        scores = torch.cat([sinks[:, None, None].expand(-1, len(query), 1), scores], dim=-1)
    shares = scores.softmax(-1)
    return (shares[..., -len(key) :] @ value).transpose(0, 1)


def register_kernels() -> None:
    """Let `torch.nn.attention.varlen.varlen_attn`, with its own backward pass, take tensors of the CPU."""
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert cu_seq_k is not None
    assert scale is not None
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window_size)
    outputs, sums = [], []
    for q, k in _spans(cu_seq_q, cu_seq_k):
        scores, values = made(query[q], key[k], value[k], scale, _window(window_size))
        sums.append(scores.logsumexp(-1))
        outputs.append(((scores - sums[-1][..., None]).exp() @ values).transpose(0, 1))
    return torch.cat(outputs), torch.cat(sums, dim=1).float(), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities come from the sums that are given, as in the kernel (arXiv 2307.08691, algorithm 2)."""
    assert scale is not None
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window_size)
    by_query, by_key, by_value = (torch.zeros_like(x) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    for q, k in _spans(cu_seq_q, cu_seq_k):
        scores, values = made(query[q], key[k], value[k], scale, _window(window_size))
        p = (scores - lse[:, q, None]).exp()
        grad = grad_out[q].transpose(0, 1)
        delta = (grad * out[q].transpose(0, 1)).sum(-1, keepdim=True)
        by_score = scale * p * (grad @ values.transpose(1, 2) - delta)
        keys = key[k].repeat_interleave(repeats, dim=1).transpose(0, 1)
        by_query[q] = (by_score @ keys).transpose(0, 1)
        of_heads = by_score.transpose(1, 2) @ query[q].transpose(0, 1), p.transpose(1, 2) @ grad
        for total, part in zip((by_key, by_value), of_heads, strict=True):
            total[k] = part.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return by_query, by_key, by_value


def _spans(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
    for q, k in zip(*(itertools.pairwise(x.tolist()) for x in (queries, keys)), strict=True):
        yield slice(*q), slice(*k)


def _window(size: list[int] | None) -> int | None:
    assert size is not None
    return None if size[0] < 0 else size[0] + 1


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    window: list[int] | None,
) -> None:
    """What the kernel asks of its arguments."""
    assert window is not None
    assert window[1] == 0
    assert is_causal == (window[0] < 0)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    for rows, ends, longest in ((query, queries, max_q), (key, keys, max_k), (value, keys, max_k)):
        assert ends.dtype == torch.int32
        assert ends[0] == 0
        assert ends[-1] == len(rows)
        assert int(ends.diff().max()) == longest
        assert rows.is_contiguous()
