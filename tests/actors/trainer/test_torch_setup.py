"""torch's settings for a host: what one host needs stays with no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors.models.spec import ModelSpec
from actors.trainer.spec import HostSpec
from actors.trainer.torch_setup import configure_torch


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_determinism_of_a_host_on_several_cpu_threads_does_not_stay_with_one_on_a_gpu() -> None:
    model = ModelSpec(base="unused")
    configure_torch(HostSpec(model=model, threads=2, sharding="full"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    configure_torch(HostSpec(model=model, threads=2, device="cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
