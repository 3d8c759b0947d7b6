"""Rules of who can be on which GPU: fractions, and engines that take turns with the policy. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.problem import Problem
from pipeline.config.run_config import RunConfig
from pipeline.roles import ENGINE_ROLES, MODEL_ROLES, POLICY, ROLES, ROLLOUT, RolloutRoleSpec

INSTEAD = "`roles: {policy: {gpus: 1}, rollout: {share: policy}}`"
"""How trainer and engine have one GPU."""


def device_problems(config: RunConfig) -> Iterator[Problem]:
    """Every placement that can't work."""
    yield from _fraction_problems(config)
    for role in ENGINE_ROLES:
        share = config.roles.of(role).share
        if share is None:
            yield from _offload_problems(role, config)
        elif share == ROLES[role].may_alternate:
            yield from _turn_problems(role, config)


def _fraction_problems(config: RunConfig) -> Iterator[Problem]:
    for role in MODEL_ROLES:
        gpus, workers = config.roles.of(role).gpus, config.roles.of(role).workers
        if workers > 1 and 0 < gpus <= 0.5:
            yield Problem(
                f"roles.{role}.gpus",
                f"{gpus:g} lets Ray put several of the {workers} workers on one GPU, and NCCL refuses ranks "
                "of a group that are on the same one; write `gpus: 1`, or one worker",
            )
    policy, rollout = config.roles.of(POLICY).gpus, config.roles.of(ROLLOUT).gpus
    if policy > 0 and rollout > 0 and policy + rollout <= 1 and config.online_stages():
        yield Problem(
            f"roles.{ROLLOUT}.gpus",
            f"{rollout:g} beside roles.{POLICY}.gpus {policy:g} lets Ray put trainer and engine on one GPU, "
            f"and NCCL, over which weights are sent, refuses that; for one GPU write {INSTEAD}, by which "
            "they take turns on it; otherwise `gpus: 1` for each",
        )


def _offload_problems(role: str, config: RunConfig) -> Iterator[Problem]:
    spec = config.roles.of(role)
    assert isinstance(spec, RolloutRoleSpec)
    if "offload" in spec.model_fields_set and spec.offload != "auto":
        yield Problem(
            f"roles.{role}.offload",
            f"{spec.offload}: engines with devices of their own need no room of the policy's; leave it out, "
            f"or add `share: {POLICY}`",
        )


def _turn_problems(role: str, config: RunConfig) -> Iterator[Problem]:
    """Of engines that take turns with the policy: engine i with rank i, on its GPU."""
    engines, policy = config.roles.of(role), config.roles.of(POLICY)
    if engines.workers > policy.workers:
        yield Problem(
            f"roles.{role}.workers",
            f"{engines.workers} engines beside {policy.workers} ranks: engine i is on the device of rank i; "
            f"lower it to {policy.workers} or less, or raise roles.{POLICY}.workers",
        )
    if 0 < policy.gpus < 1:
        yield Problem(
            f"roles.{POLICY}.gpus",
            f"{policy.gpus:g}: each rank computes on one GPU, which it has in turns with its engine; set it "
            "to 1",
        )
    parallel = config.roles.engine_of(role).tensor_parallel_size
    if parallel > 1 and policy.gpus > 0:
        yield Problem(
            f"roles.{role}.engine.tensor_parallel_size",
            f"{parallel}: an engine that takes turns has the GPU of one rank, and can't spread over "
            f"{parallel}; leave it out, or give engines GPUs of their own: `{role}: {{gpus: {parallel}}}` "
            "without share",
        )
    for name, stage in config.online_stages().items():
        if stage.staleness:
            yield Problem(
                f"stages.{name}.staleness",
                f"{stage.staleness}: samples of later steps would be generated while the policy trains, and "
                f"engines sleep then (roles.{role}.share: {POLICY}); set it to 0, or give engines devices of "
                "their own",
            )
