"""The driver's side of a model worker: what it calls is there, and takes and gives what the face says."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest

from actors.cluster.futures import GroupFuture
from actors.cluster.worker_group import WorkerGroup
from actors.trainer.model_host import ModelHost
from actors.trainer.remote import HOST, HOST_MODULES, ModelWorkers
from tests.actors.faces import calls_of, mismatches


def test_every_call_of_the_face_fits_the_method_that_it_names() -> None:
    assert mismatches(ModelWorkers, ModelHost) == {}
    assert {"build", "update", "save_checkpoint"} <= set(calls_of(ModelWorkers))


def test_the_class_that_a_group_is_told_to_build_is_the_model_host() -> None:
    module, _, name = HOST.partition(":")
    assert getattr(importlib.import_module(module), name) is ModelHost
    assert module in HOST_MODULES


@dataclass(frozen=True)
class Wrong:
    """A face each of whose calls has drifted from `ModelHost` in one way."""

    group: WorkerGroup

    def renamed(self) -> str:
        return self.group.call("digest_of_frozen")[0]  # type: ignore[no-any-return]

    def no_such_part(self) -> None:
        self.group.call("sharing.save_model")

    def one_too_few(self, source: str) -> None:
        self.group.call("copy_adapter", source)

    def swapped(self, source: str, target: str) -> None:
        self.group.call("copy_adapter", target, source)

    def another_order(self, path: str, name: str) -> None:
        self.group.call("add_adapter", name, path=path)

    def another_type(self, packing: str, max_tokens_per_micro_batch: int) -> None:
        self.group.call("set_batching", packing, max_tokens_per_micro_batch)

    def another_default(self, source: str, target: str, trainable: bool = True) -> None:
        self.group.call("copy_adapter", source, target, trainable)

    def another_answer(self) -> GroupFuture[bytes]:
        return self.group.submit("frozen_digest")


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("renamed", "digest_of_frozen"),
        ("no_such_part", "sharing"),
        ("one_too_few", "missing a required argument: 'target'"),
        ("swapped", "source is given <target>, target is given <source>"),
        ("another_order", "['path', 'name'] are ['name', 'path'] there"),
        ("another_type", "'packing: str' is 'packing: bool | str' there"),
        ("another_default", "'trainable: bool = True' is 'trainable: bool = False' there"),
        ("another_answer", "returns bytes, and there str"),
    ],
)
def test_a_call_that_does_not_fit_is_found(call: str, wrong: str) -> None:
    assert wrong in mismatches(Wrong, ModelHost)[call]
