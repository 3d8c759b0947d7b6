"""Rules of length: prompts and samples have to fit into the engines. Checked before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.rollout.spec import positions_of
from pipeline.stages.prepared import Prepared

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.evaluation.held_out import EvalSet

LIMIT = "an engine holds {} (roles.rollout.engine.max_model_len, or 4,096; at most what the base has)"


def engine_positions(config: RunConfig, base_positions: int | None) -> int:
    """Positions of prompt and completion that an engine of this run holds; the base was made for
    `base_positions`, where its config says so."""
    return positions_of(config.roles.rollout.engine.max_model_len, base_positions)


def sample_problems(prepared: Prepared, positions: int) -> list[str]:
    """Problems of an online stage whose samples have no room in `positions`."""
    if not prepared.online:
        return []
    longest, limit = prepared.data.stats.longest, prepared.spec.max_completion_length
    if longest + limit <= positions:
        return []
    return [
        f"stages.{prepared.name}.max_completion_length: the longest prompt has {longest} tokens, with "
        f"{limit} new ones it is {longest + limit}, and {LIMIT.format(positions)}; lower it, or set a "
        "max_length that leaves such prompts out"
    ]


def held_out_problems(held_out: EvalSet, positions: int) -> list[str]:
    """Held-out prompts that leave no room in `positions` for an answer, or for a whole conversation."""
    lengths = [len(ids) for ids in held_out.data.token_ids]
    if held_out.talks is not None:
        longest, limit = max(lengths), held_out.sampling.max_tokens
        if longest + limit <= positions:
            return []
        return [
            f"eval.sampling.max_tokens: the longest prompt has {longest} tokens, with {limit} of a "
            f"conversation it is {longest + limit}, and {LIMIT.format(positions)}; lower it"
        ]
    beyond = sum(length >= positions for length in lengths)
    if not beyond:
        return []
    return [
        f"eval.data: {beyond} of {len(lengths)} prompts leave no room for an answer: the longest has "
        f"{max(lengths)} tokens, and {LIMIT.format(positions)}"
    ]
