"""Threads that compute with one thread of torch each."""

from __future__ import annotations

from threading import Barrier

import pytest
import torch

from actors.models.threads import each, one_thread


def test_one_thread_and_each_hold_also_where_vllm_has_taken_the_function_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, seen, together = torch.get_num_threads(), [], Barrier(3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def look(item: int) -> None:
        together.wait(20)
        seen.append(torch.get_num_threads())

    with one_thread() as had:
        assert (torch.get_num_threads(), had) == (1, before)
        each([1, 2, 3], look, threads=3)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert seen == [1, 1, 1]
