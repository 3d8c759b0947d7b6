"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test-fast`: a process a core, a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# A runner in the background may have them ignored, which processes inherit: then nothing could be stopped.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where torch finds a card, and say elsewhere why they do not."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, and torch {torch.__version__} finds none; make test-gpu")


REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real cluster; its workers can import `duties`, in tests/actors."""
    from actors.cluster.connection import start_ray, stop_ray

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY / "tests" / "actors"), before]))
    start_ray(num_cpus=2)
    yield
    stop_ray()
    if before is None:
        os.environ.pop("PYTHONPATH")
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Qwen3-MoE with random weights, the byte tokenizer and its chat template."""
    from actors.models.tiny import write_tiny_base

    path = tmp_path_factory.mktemp("models") / "tiny-base"
    write_tiny_base(path, seed=0, num_hidden_layers=2)
    return path
