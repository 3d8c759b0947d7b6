"""Batches and samples as processes send them to each other, with their seeds; numpy only."""

from actors.batches.batch import Batch
from actors.batches.episodes import Episode, GrowingSample
from actors.batches.generations import (
    FINISH_REASONS,
    Generations,
    SamplingSpec,
    possible_temperature,
    sample_seed,
)
from actors.batches.slices import Parsing, Request, Said
from actors.batches.trajectories import sample_offsets, sample_sums, trajectory_batch

__all__ = [
    "FINISH_REASONS",
    "Batch",
    "Episode",
    "Generations",
    "GrowingSample",
    "Parsing",
    "Request",
    "Said",
    "SamplingSpec",
    "possible_temperature",
    "sample_offsets",
    "sample_seed",
    "sample_sums",
    "trajectory_batch",
]
