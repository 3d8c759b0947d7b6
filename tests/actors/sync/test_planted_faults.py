"""Every way in which wrong weights can reach an engine, planted, and the check that catches it.

Some faults are planted twice: `sent`, on the wire, where what arrives is not what was offered; and `packed`,
in the trainer, where offer and payload agree and only the engine's bound tensors can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation
from actors.sync.engine_state import WeightsState
from actors.sync.weight_sync import WeightSync
from tests.actors.sync.sync_faults import PARTS, connected, started

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

Syncs = Callable[[str], WeightSync]


@pytest.fixture(scope="module")
def groups(
    ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerGroup, WorkerGroup]]:
    """A trainer and one engine for all faults: none of them may outlive the next good push."""
    both = started(tiny_base, tmp_path_factory.mktemp("faults") / "logs", engines=1)
    yield both
    for group in both:
        group.shutdown()


@pytest.fixture(scope="module")
def syncs(groups: tuple[WorkerGroup, WorkerGroup], tiny_base: Path) -> Syncs:
    """A sync per payload on the same processes."""
    made: dict[str, WeightSync] = {}

    def sync_of(payload: str) -> WeightSync:
        if list(made) != [payload]:
            made.clear()
            made[payload] = connected(tiny_base, *groups, payload)
        return made[payload]

    return sync_of


def caught(sync: WeightSync) -> str:
    """Error of a push with a planted fault; the next one has to be good again."""
    version = sync.version + 1
    with pytest.raises(InvariantViolation) as violation:
        sync.push(version)
    assert f"version {version}" in violation.value.reason
    assert sync.version == version - 1
    return violation.value.reason


REFUSED_BEFORE_LOADING = [
    ("tensor dropped", "sent", "adapter", "acknowledged tensors 22, the trainer offered 24"),
    ("tensors swapped", "sent", "adapter", "acknowledged digest"),
    ("byte flipped", "sent", "adapter", "acknowledged digest"),
    ("old version", "sent", "adapter", "got version"),
    ("bound to no module", "packed", "adapter", "layers.9"),
    ("bound to no module", "packed", "merged", "layers.9"),
    ("half a group", "packed", "merged", "q_proj"),
    ("tensor dropped", "sent", "merged", "acknowledged tensors 55, the trainer offered 56"),
    ("tensors swapped", "sent", "merged", "acknowledged digest"),
    ("byte flipped", "sent", "merged", "acknowledged digest"),
]
SEEN_AFTER_LOADING = [
    ("tensors swapped", "packed", "merged", "2 of 56 tensors in the engine differ from the trainer's, "),
    ("tensors swapped", "packed", "adapter", "2 of 56 tensors in the engine differ from the trainer's, "),
    ("half a group", "packed", "adapter", "1 of 56 tensors in the engine differ from the trainer's, "),
    (
        "tensor dropped",
        "packed",
        "adapter",
        "1 tensors are not bound in the engine, the first: model.layers.1",
    ),
    ("old weights under the new version", "packed", "adapter", "56 of 56 tensors in the engine differ"),
    ("base instead of policy", "packed", "adapter", "56 of 56 tensors in the engine differ"),
]
"""(fault, where, payload, what the error says). Grouped by payload: another one means another connection."""


@pytest.mark.parametrize(("fault", "where", "payload", "says"), REFUSED_BEFORE_LOADING)
def test_what_can_be_told_from_the_payload_is_refused_while_staging(
    syncs: Syncs, fault: str, where: str, payload: str, says: str
) -> None:
    sync = syncs(payload)
    sync.policy.call("weight_source.plant", fault, where)
    assert says in caught(sync)
    assert sync.engines[0].state is WeightsState.SERVING, "the engine goes on with what it had"
    assert not sync.push(sync.version + 1).replaced


@pytest.mark.parametrize(("fault", "where", "payload", "says"), SEEN_AFTER_LOADING)
def test_what_the_payload_hides_is_read_back_from_the_engine(
    syncs: Syncs, fault: str, where: str, payload: str, says: str
) -> None:
    sync = syncs(payload)
    sync.policy.call("weight_source.plant", fault, where)
    sync.policy.call("nudge", sync.version)
    assert says in caught(sync)
    assert sync.engines[0].state is WeightsState.LOST, "an engine that holds something else serves nobody"
    sync.push(sync.version + 1)
    assert sync.engines[0].state is WeightsState.SERVING


@pytest.mark.slow
def test_a_byte_flipped_in_a_part_that_was_not_staged_is_seen_before_anything_is_generated(
    syncs: Syncs,
) -> None:
    sync = syncs(PARTS)
    sync.policy.call("weight_source.plant", "byte flipped", "later")
    sync.policy.call("nudge", sync.version)
    assert " as part 2, the trainer sent " in caught(sync)
    assert sync.engines[0].state is WeightsState.LOST
    sync.push(sync.version + 1)
    assert sync.engines[0].state is WeightsState.SERVING


def test_experts_that_were_not_repacked_are_seen_by_the_probes(syncs: Syncs) -> None:
    sync = syncs("adapter")
    sync.policy.call("nudge", sync.version)
    sync.rollout.call("plant", "repack left out")
    assert "probes beyond 0.0001 (relative: median" in caught(sync)
    sync.push(sync.version + 1)


def test_a_version_that_is_served_already_is_not_loaded_again(syncs: Syncs) -> None:
    sync = syncs("adapter")
    before = sync.rollout.call("log")[0]
    for version in (sync.version, sync.version - 1):
        with pytest.raises(
            InvariantViolation, match=f"version {version} is not newer than version {sync.version}"
        ):
            sync.push(version)
    assert sync.rollout.call("log")[0] == before, "no engine was asked"
