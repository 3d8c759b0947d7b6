"""Intake of a payload into the memory of a worker's device, without processes."""

from __future__ import annotations

import types
from typing import Any
from unittest import mock

import pytest
import torch

from actors.rollout.vllm.intake import Intake
from actors.sync.payload import Payload, pack_merged
from tests.actors.pretend_device import DEVICE, second_device

SENT = pack_merged(3, "float32", {"w": torch.arange(40.0)}, algorithm="sums")


def first_of(workers: int) -> Intake:
    """The worker with the channel, over which the payload has come into the host's memory."""
    group = types.SimpleNamespace(rank_in_group=0, world_size=workers, broadcast_object=lambda _: None)
    intake = Intake(group, DEVICE)
    intake._channel = types.SimpleNamespace(receive=lambda: SENT)  # type: ignore[assignment]
    return intake


def other() -> Intake:
    announced = SENT.manifest, SENT.buffer.numel(), "cpu"
    group = types.SimpleNamespace(rank_in_group=1, world_size=2, broadcast_object=lambda: announced)
    return Intake(group, DEVICE)


def spread(intake: Intake, buffer: torch.Tensor) -> None:
    """What the first worker sends arrives."""
    buffer.copy_(SENT.buffer)


@pytest.mark.parametrize(
    "made", [lambda: first_of(1), lambda: first_of(2), other], ids=["one", "first", "other"]
)
def test_a_payload_goes_to_the_workers_device_and_only_sums_come_back(made: Any) -> None:
    with second_device() as copied, mock.patch.object(Intake, "_spread", spread):
        got: Payload = made().receive()
        assert got.buffer.device == DEVICE
        assert {tensor.device for tensor in got.tensors().values()} == {DEVICE}
        assert got.digest == SENT.digest
        assert copied == [16]
