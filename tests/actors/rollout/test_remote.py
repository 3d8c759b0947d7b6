"""The driver's side of engines and of the weight source: each call fits the method that it names."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

import pytest

from actors.cluster.futures import WorkerFuture
from actors.cluster.worker_group import WorkerGroup
from actors.rollout.engine import RolloutEngine
from actors.rollout.remote import ROLLOUT, RolloutEngines
from actors.rollout.weight_updater import WeightUpdater
from actors.sync.remote import WEIGHTS, RemoteWeightSource, UpdatableEngines
from actors.trainer.model_host import ModelHost
from tests.actors.faces import calls_of, mismatches

PARTS = {WEIGHTS: WeightUpdater}


def test_every_call_of_engines_fits_the_method_that_it_names() -> None:
    assert mismatches(RolloutEngines, RolloutEngine, parts=PARTS) == {}
    of_sync = {"load", "describe", "listen", "accept", "connect", "open_channel", "stage", "discard"}
    of_sync |= {"commit", "readback", "score_tokens"}
    assert set(calls_of(UpdatableEngines)) == of_sync
    assert set(calls_of(RolloutEngines)) == of_sync | {"generate", "advance", "expert_load", "check_parser"}


def test_every_call_of_the_weight_source_fits_the_method_that_it_names() -> None:
    assert mismatches(RemoteWeightSource, ModelHost) == {}
    assert {"prepare", "send", "expected", "token_logprobs"} <= set(calls_of(RemoteWeightSource))


def test_the_part_that_takes_weights_is_what_its_calls_are_compared_with() -> None:
    weights = inspect.getattr_static(RolloutEngine, WEIGHTS)
    assert weights.fget.__annotations__["return"] == WeightUpdater.__name__


def test_the_class_that_a_group_is_told_to_build_is_the_engine() -> None:
    module, _, name = ROLLOUT.partition(":")
    assert getattr(importlib.import_module(module), name) is RolloutEngine


@dataclass(frozen=True)
class Wrong:
    """Calls that have drifted from an engine's part in one way each."""

    group: WorkerGroup

    def renamed(self, rank: int, version: int) -> WorkerFuture[None]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.forget", version)

    def another_name(self, rank: int, number: int) -> WorkerFuture[None]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.discard", number)

    def another_answer(self, rank: int, version: int) -> WorkerFuture[int]:
        return self.group.submit_rank(rank, f"{WEIGHTS}.stage", version)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("renamed", "forget"),
        ("another_name", "version is given <number>"),
        ("another_answer", "returns int, and there StageAck"),
    ],
)
def test_a_call_to_a_part_that_does_not_fit_is_found(call: str, wrong: str) -> None:
    assert wrong in mismatches(Wrong, RolloutEngine, parts=PARTS)[call]
