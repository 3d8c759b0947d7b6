"""The data-parallel ranks of one host: a process group, or nothing at all for a single rank."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Sums over ranks. With one rank every call returns what it was given."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
        timeout_s: float = 600.0,
        device: str = "cpu",
    ) -> None:
        """Join the group at `init_method` (tcp://host:port); waits for all ranks, at most `timeout_s`."""
        self.rank, self.world_size = rank, world_size
        if world_size == 1:
            return
        dist.init_process_group(
            "nccl" if torch.device(device).type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` on every rank by the sum over ranks, bit-equal everywhere."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` on every rank by the largest over ranks, element by element."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def agree(self, values: Tensor) -> bool:
        """True if every rank holds the same values."""
        if self.world_size == 1:
            return True
        both = torch.cat([values, -values])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return bool(torch.equal(both[: len(values)], -both[len(values) :]))

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
