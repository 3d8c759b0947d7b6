"""Sizes of the passes that a stage makes: tokens of a micro-batch, sequences of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.planning.costs.activations import PassSize

if TYPE_CHECKING:
    from actors.cluster import RoleSpec
    from pipeline.stages.specs.registry import AnyStage

NO_LIMIT = 4096
"""Tokens of the longest row where neither stage nor base says."""


@dataclass(frozen=True)
class StageWork:
    """Work of one optimizer step, and of the sampling before it."""

    rows: int
    """Of one optimizer step, over all ranks."""
    sequences: int
    """Of a row: two for pairs."""
    longest: int
    """Tokens of a sequence, at most; every one is taken to be as long."""
    counted: int
    """Of them, tokens that the loss counts."""
    shared: int
    """Leading tokens that sequences of one group have in common, computed once where rows are packed on a
    CPU."""
    sharing: int
    """Sequences of such a group."""

    @property
    def tokens(self) -> int:
        """Of one optimizer step, over all ranks."""
        return self.rows * self.sequences * self.longest


def work_of(stage: AnyStage, positions: int | None, longest: int | None = None) -> StageWork:
    """Of a stage whose rows are all as long as they may be.

    `positions`: that the base was made for; `longest`: tokens of a sequence, where that is known better.
    """
    length = longest or stage.max_length or positions or NO_LIMIT
    if stage.online:
        answer = min(stage.max_completion_length, length - 1)
        group = stage.num_generations
        return StageWork(stage.batch_size, 1, length, answer, length - answer, group)
    sequences = 2 if stage.records == "preference" else 1
    return StageWork(stage.batch_size, sequences, length, length - 1, 0, 1)


def largest_pass(
    work: StageWork, role: RoleSpec, budget: int, reads_logps: bool, shares: bool = False
) -> PassSize:
    """The largest micro-batch of one rank: whole rows within `budget` tokens, one at least
    (`actors.batches.packing.micro_batches`).

    `shares`: common prompts are computed once.
    """
    ranks = role.sequence_parallel_size
    groups = max(1, role.workers // (role.tensor_parallel_size * ranks))
    budget *= ranks
    own_rows, row = -(-work.rows // groups), work.sequences * work.longest
    parts = max(1, -(-own_rows * row // budget))
    fit = max(1, min(-(-own_rows // parts), budget // row))
    # How many rows go together follows from all their tokens, also where prompts are computed once.
    once = work.shared * (fit - -(-fit // work.sharing)) if shares else 0
    tokens = fit * row - once
    sequences = fit * work.sequences
    own = -(-tokens // ranks)
    return PassSize(
        tokens=own,
        # All of them, with a part of the heads.
        attended=-(-sequences * work.longest // ranks),
        # Where one answer fills them, all positions of a rank are counted.
        counted=min(own, sequences * work.counted) if reads_logps else 0,
        longest=work.longest,
    )
