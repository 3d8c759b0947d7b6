"""Processes and engines that tests of actors share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from actors.cluster.worker_group import WorkerGroup


@pytest.fixture(scope="module")
def process(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    """One process for all engines of a file: vLLM is imported once, and what one engine leaves behind would
    show in the next."""
    from actors.cluster.spec import LimitsSpec, RoleSpec
    from actors.rollout.remote import rollout_group

    group = rollout_group(RoleSpec(), LimitsSpec(stop=5), tmp_path_factory.mktemp("engines") / "logs")
    group.start().ready()
    yield group
    group.shutdown()


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """base_of(architecture, dtype=float32): directory of a tiny random base, made once per file."""
    import torch

    from tests.actors.rollout.vllm import vllm_cases as cases

    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in made:
            path = tmp_path_factory.mktemp(architecture)
            made[architecture, dtype] = cases.write_base(path, architecture, dtype)
        return made[architecture, dtype]

    return make
