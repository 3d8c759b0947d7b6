"""Rules of ranks that share out the positions of rows. Pure, as all rules between sections."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.problem import Problem
from pipeline.config.run_config import RunConfig
from pipeline.roles import ENGINE_ROLES, ROLES


def sequence_parallel_problems(config: RunConfig) -> Iterator[Problem]:
    """Settings that `sequence_parallel_size` of a role doesn't go together with."""
    for role in ROLES:
        spec = config.roles.of(role)
        ranks, key = spec.sequence_parallel_size, f"roles.{role}.sequence_parallel_size"
        if ranks == 1:
            continue
        if role in ENGINE_ROLES:
            yield Problem(key, f"{ranks} is for the ranks of a host; engines don't have it, leave it out")
            continue
        if spec.workers % ranks:
            yield Problem(
                key,
                f"{ranks} workers share out the positions of rows, but roles.{role}.workers is "
                f"{spec.workers}; set that to a multiple of {ranks}",
            )
        if spec.tensor_parallel_size > 1:
            yield Problem(
                key,
                f"{ranks}, and roles.{role}.tensor_parallel_size is {spec.tensor_parallel_size}: both share "
                "out the heads of attention; set one of them to 1",
            )
        if config.model.attn_implementation != "sdpa":
            yield Problem(
                key,
                f"{ranks}, but model.attn_implementation is '{config.model.attn_implementation}', which "
                "attends to the positions of one rank only; set sdpa",
            )
        for name, stage in config.stages.items():
            if stage.packing is False:
                yield Problem(
                    f"stages.{name}.packing",
                    f"false, but {key} ({ranks}) shares out the positions of packed rows; set auto",
                )
