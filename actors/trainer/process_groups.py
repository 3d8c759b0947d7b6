"""Ranks of one group of model workers: torch's process groups, or nothing at all for a single rank.

Ranks have two dimensions. Each run of `tensor_parallel_size` consecutive ones holds one model together and
computes the same rows, or each run of `sequence_parallel_size` shares out the positions of the same rows;
rows are shared out among these groups. With sizes of 1, the usual case, every rank has rows of its own.

Weights that are split among some ranks, each with rows of its own, have a mesh besides (`split_mesh`).
"""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from actors.cluster.meeting_point import open_meeting_point
from actors.cluster.pulse import count_collectives

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Ranks:
    """Sums over ranks. With one rank every call returns what it was given."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
        timeout_s: float = 600.0,
        device: str = "cpu",
        tensor_parallel_size: int = 1,
        sequence_parallel_size: int = 1,
    ) -> None:
        """Join the group at `init_method` (tcp://host:port); waits for all ranks, at most `timeout_s`.

        Of `tensor_parallel_size` and `sequence_parallel_size` one is 1, and the other divides `world_size`.
        """
        self.rank, self.world_size = rank, world_size
        self.tensor_parallel_size = tensor_parallel_size
        self.sequence_parallel_size = sequence_parallel_size
        of_same_rows = tensor_parallel_size * sequence_parallel_size
        self.share, self.shares = rank // of_same_rows, world_size // of_same_rows
        """Number of this rank's share of the rows, and how many shares there are."""
        self.position_share = rank % sequence_parallel_size
        """Number of this rank's share of their positions."""
        self._device = torch.device(device)
        self._sharing: dist.ProcessGroup | None = None
        self._copies: dist.ProcessGroup | None = None
        if world_size == 1:
            return
        self._wait = wait = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=_meet(str(init_method), rank, world_size, wait),
            rank=rank,
            world_size=world_size,
            timeout=wait,
        )
        self._same_rows = self._one_each = None
        self._joined: dict[str, dist.ProcessGroup] = {}
        """Groups that this rank is in, by their ranks."""
        self._know(dist.group.WORLD)
        count_collectives(self._entered)
        if of_same_rows > 1:
            numbers = torch.arange(world_size).view(self.shares, of_same_rows)
            self._same_rows = self._know(_own_group(numbers.tolist(), wait))
            self._one_each = self._know(_own_group(numbers.t().tolist(), wait))

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """The ranks that hold one model together with this one; None: it holds one alone."""
        if self.tensor_parallel_size == 1:
            return None
        from torch.distributed.device_mesh import DeviceMesh

        # Without a name: by its names PEFT would make LoRA's factors for this rank's part only.
        return DeviceMesh.from_group(self._same_rows, self._device.type)

    def split_mesh(self, size: int) -> DeviceMesh:
        """The ranks among which this one's weights are split: `size` consecutive ones, which divides
        `world_size`. Other groups of as many hold the same. Collective."""
        from torch.distributed.device_mesh import DeviceMesh

        if size < self.world_size:
            numbers = torch.arange(self.world_size).view(-1, size)
            self._sharing = self._know(_own_group(numbers.tolist(), self._wait))
            self._copies = self._know(_own_group(numbers.t().tolist(), self._wait))
        group = self._sharing or dist.group.WORLD
        assert group is not None, "this rank has joined the others"
        # By another name PEFT would make LoRA's factors for this rank's part only.
        return DeviceMesh.from_group(group, self._device.type, mesh_dim_names=("fsdp",))

    def sum_copies_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, of this rank's slices of weights that are split by `split_mesh`, by the sum over
        the ranks that hold the same ones."""
        if self._copies is not None:
            dist.all_reduce(tensor, group=self._copies)
        return tensor

    @property
    def row_group(self) -> dist.ProcessGroup | None:
        """The ranks that share out the positions of the same rows with this one; None: it has them all."""
        return self._same_rows if self.sequence_parallel_size > 1 else None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, of this rank's rows, by the sum over all shares of the rows; bit-equal everywhere
        if ranks of the same rows came with equal bits."""
        if self.shares > 1:
            dist.all_reduce(tensor, group=self._one_each)
        return tensor

    def sum_gradient_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the sum over all ranks, bit-equal everywhere."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_positions_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, of this rank's positions, by the sum over all positions of its rows."""
        if self.sequence_parallel_size > 1:
            dist.all_reduce(tensor, group=self._same_rows)
        return tensor

    def sum_slices_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, of slices of weights, by the sum over the ranks that hold one copy of them: all,
        or those of the same rows, or of `split_mesh`."""
        if self.world_size > 1:
            same_copy = self._same_rows if self.tensor_parallel_size > 1 else self._sharing
            dist.all_reduce(tensor, group=same_copy)
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
            count_collectives(None)
            self._joined.clear()
            dist.destroy_process_group()

    def _know(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """Count the collectives of a group that this rank is in."""
        if group is not None:
            self._joined[_ranks_of(group)] = group
        return group

    def _entered(self) -> dict[str, int]:
        """Collectives of each group that this rank has entered, by torch's own count."""
        return {ranks: group._get_sequence_number_for_group() for ranks, group in [*self._joined.items()]}


def _meet(init_method: str, rank: int, world_size: int, wait: timedelta) -> dist.TCPStore:
    """The store of all ranks, at which they have met; the first one's process has its listening end."""
    place = urlsplit(init_method)
    host, port = str(place.hostname), int(place.port or 0)
    if rank == 0:
        return open_meeting_point(host, port, world_size, wait, wait=True)
    return dist.TCPStore(host, port, world_size, False, wait, wait_for_workers=True)


def _ranks_of(group: dist.ProcessGroup) -> str:
    """The ranks of a group, in short: "0-3", or "0, 2"."""
    ranks = dist.get_process_group_ranks(group)
    first, last = ranks[0], ranks[-1]
    return f"{first}-{last}" if ranks == [*range(first, last + 1)] else ", ".join(map(str, ranks))


def _own_group(groups: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make all of these groups, as every rank has to; the one that this rank is in."""
    own, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
    return own
