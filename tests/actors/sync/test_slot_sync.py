"""The policy's LoRA in slots of two engines: proved before anybody serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation
from actors.models.spec import LoraSpec
from actors.sync.engine_state import WeightsState
from actors.sync.spec import SlotSpec
from actors.sync.weight_sync import WeightSync
from tests.actors.sync.sync_faults import connected, started
from tests.actors.sync.test_weight_sync import apart, clean_log, served

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

LORA = LoraSpec(r=4, lora_alpha=6, targets=["attention"])
SLOTS = SlotSpec(4, ("q_proj", "k_proj", "v_proj", "o_proj"))


@pytest.fixture(scope="module")
def groups(
    ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerGroup, WorkerGroup]]:
    both = started(tiny_base, tmp_path_factory.mktemp("slots") / "logs", engines=2, lora=LORA)
    yield both
    for group in both:
        group.shutdown()


@pytest.fixture(scope="module")
def sync(groups: tuple[WorkerGroup, WorkerGroup], tiny_base: Path) -> WeightSync:
    return connected(tiny_base, *groups, "lora", SLOTS)


def nudged(sync: WeightSync) -> int:
    """The next version, whose weights are others."""
    version = sync.version + 1
    clean_log(sync)
    sync.policy.call("nudge", version)
    return version


def test_every_push_is_proved_before_it_is_committed(sync: WeightSync) -> None:
    for _ in range(2):
        version = nudged(sync)
        before = apart(sync, 0)
        report = sync.push(version)
        assert before > 1e-2 > 1e-4 > max(apart(sync, rank) for rank in (0, 1))
        assert served(sync) == [version, version]
        assert (report.version, report.payload, report.replaced) == (version, "lora", ())
        assert report.probe.arrived == pytest.approx(1, abs=1e-3)
        assert report.tensors == 16
        assert report.share_unchanged_bf16 is None
        assert "sync/unchanged_bf16" not in report.metrics()
        asked = [f"{what} {version}" for what in ("stage", "readback", "commit")]
        assert sync.rollout.call("log") == [asked, asked]
    assert set(report.seconds) == {"gather", "pack", "wire", "verify", "load"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        # Of the last good push: it comes first.
        ("old weights under the new version", "16 of 16 tensors in the engine differ"),
        ("tensors swapped", "4 of 16 tensors in the engine differ"),
        ("tensor dropped", r"2 tensors are not bound in the engine, the first: model\.layers\.1.* A"),
        ("base instead of policy", "8 of 16 tensors in the engine differ"),
        ("bound to no module", "it keeps no LoRA for model.layers.9.self_attn.o_proj"),
    ],
)
def test_what_was_packed_wrongly_in_good_faith_is_seen_and_all_serve_the_version_before(
    sync: WeightSync, fault: str, reason: str
) -> None:
    version = nudged(sync)
    sync.policy.call("weight_source.plant", fault, "packed")
    with pytest.raises(InvariantViolation, match=reason):
        sync.push(version)
    check_unmoved(sync, version)


def test_a_slot_that_holds_something_else_in_one_engine_is_switched_to_in_none(sync: WeightSync) -> None:
    version = nudged(sync)
    sync.rollout.call_rank(1, "plant", "other LoRA in the slot")
    with pytest.raises(InvariantViolation, match=r"1 of 16 tensors .* differ.*o_proj\.weight B"):
        sync.push(version)
    check_unmoved(sync, version)
    assert sync.push(version).replaced == ()
    assert served(sync) == [version, version]


def check_unmoved(sync: WeightSync, refused: int) -> None:
    """Both engines serve the version before `refused`, and forgot that one."""
    assert served(sync) == [refused - 1, refused - 1]
    assert [sync.engines[rank].state for rank in sync.engines] == [WeightsState.SERVING] * 2
    assert all(f"commit {refused}" not in log for log in sync.rollout.call("log"))


def test_an_engine_that_dies_after_its_proof_is_replaced_and_proved_anew(sync: WeightSync) -> None:
    version = nudged(sync)
    sync.rollout.call_rank(1, "plant", "dies before it switches")
    assert sync.push(version).replaced == (1,)
    assert served(sync) == [version, version]
    assert sync.rollout.call("log")[1] == [f"{what} {version}" for what in ("stage", "readback", "commit")]
    assert max(apart(sync, rank) for rank in (0, 1)) < 1e-4
