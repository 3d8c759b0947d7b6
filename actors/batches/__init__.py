"""Batches and samples as processes send them to each other, with their seeds; numpy only."""

from actors.batches.batch import Batch
from actors.batches.generations import Generations, SamplingSpec, possible_temperature, sample_seed
from actors.batches.trajectories import sample_offsets, sample_sums, trajectory_batch

__all__ = [
    "Batch",
    "Generations",
    "SamplingSpec",
    "possible_temperature",
    "sample_offsets",
    "sample_seed",
    "sample_sums",
    "trajectory_batch",
]
