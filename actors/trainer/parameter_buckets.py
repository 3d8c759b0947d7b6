"""Trainable parameters in flat buckets, one tensor per decay group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actors.errors import InvariantViolation
from actors.models.parallel.fsdp import holders, own_slice

BUCKET_ELEMENTS = 1 << 26
"""Elements of one buffer (256 MiB in float32): bounds the copy made while parameters move in."""


ALIGNMENT = 64
"""Elements to which parameters are aligned in a buffer; grouped_mm wants rows at 16 bytes."""


@dataclass(frozen=True)
class Bucket:
    """Some parameters as consecutive slices of one tensor, and their gradients as slices of another."""

    names: tuple[str, ...]
    flat: nn.Parameter
    decays: bool
    shapes: tuple[torch.Size, ...]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """By parameter, its part of a tensor that is laid out as `flat`."""
        found, at = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            found[name] = flat.reshape(-1)[at : at + shape.numel()].view(shape)
            at += _room(shape.numel())
        return found


class FlatParameters:
    """Named parameters whose data and gradients are views of a few flat buffers.

    The parameters stay where they are in the model; only their storage moves.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], without_decay: Iterable[str] = ()) -> None:
        self.parameters = dict(parameters)
        exempt = set(without_decay)
        groups: dict[tuple[torch.dtype, torch.device, bool], list[list[str]]] = {}
        for name, parameter in self.parameters.items():
            runs = groups.setdefault((parameter.dtype, parameter.device, name not in exempt), [[]])
            if runs[-1] and sum(_room(self.parameters[n].numel()) for n in runs[-1]) >= BUCKET_ELEMENTS:
                runs.append([])
            runs[-1].append(name)
        self.buckets = [
            self._move_in(tuple(run), decays) for (_, _, decays), runs in groups.items() for run in runs
        ]

    def _move_in(self, names: tuple[str, ...], decays: bool) -> Bucket:
        members = [self.parameters[name] for name in names]
        flat = nn.Parameter(members[0].new_zeros(sum(_room(p.numel()) for p in members)))
        flat.grad = torch.zeros_like(flat)
        bucket = Bucket(names, flat, decays, tuple(p.shape for p in members))
        data, grads = bucket.views(flat.data), bucket.views(flat.grad)
        for name, parameter in zip(names, members, strict=True):
            data[name].copy_(parameter.data)
            parameter.data = data[name]
            parameter.grad = grads[name]
        return bucket

    @property
    def grads(self) -> list[Tensor]:
        """The flat gradients, one tensor per bucket."""
        return [bucket.flat.grad for bucket in self.buckets if bucket.flat.grad is not None]

    def named_grads(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's gradient, a view of a flat one."""
        for bucket in self.buckets:
            if bucket.flat.grad is not None:
                yield from bucket.views(bucket.flat.grad).items()

    def zero_grad(self) -> None:
        for grad in self.grads:
            grad.zero_()

    def grad_norm(self) -> Tensor:
        """Euclidean norm over all gradients, in two levels (see `norms`)."""
        if not self.grads:
            return torch.zeros(())
        pieces = [norms(grad) for grad in self.grads]
        return torch.linalg.vector_norm(torch.stack([piece.double().norm() for piece in pieces])).float()

    def release(self) -> None:
        """Drop the gradients; the parameters keep their values."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.buckets = []


def norms(grad: Tensor) -> Tensor:
    """Euclidean norms of short pieces of a gradient, one after the other.

    torch's float32 norm of one long vector on the CPU was off by 7e-5 at 6e5 elements.
    """
    flat = grad.reshape(-1)
    even = len(flat) // ALIGNMENT * ALIGNMENT
    pieces = torch.linalg.vector_norm(flat[:even].view(-1, ALIGNMENT), dim=1)
    rest = torch.linalg.vector_norm(flat[even:]).view(1)
    return torch.cat([pieces, rest]) if even < len(flat) else pieces


def _room(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


class SlicedParameters:
    """Named DTensor parameters; one bucket for each slice that isn't empty."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], without_decay: Iterable[str] = ()) -> None:
        self.parameters = dict(parameters)
        exempt = set(without_decay)
        self.buckets = []
        for name, parameter in self.parameters.items():
            own = own_slice(parameter)
            if own.numel():
                # The same storage: a step on the bucket is a step of the parameter.
                self.buckets.append(Bucket((name,), nn.Parameter(own), name not in exempt, (own.shape,)))

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        for bucket in self.buckets:
            bucket.flat.grad = None

    def collect(self) -> None:
        """Hand each bucket its gradient, after the backward pass.

        Raises:
            InvariantViolation: FSDP has moved a parameter, so that a step would change a copy.
        """
        for bucket in self.buckets:
            parameter = self.parameters[bucket.names[0]]
            if own_slice(parameter).data_ptr() != bucket.flat.data_ptr():
                reason = f"the storage of {bucket.names[0]} has moved since training began"
                raise InvariantViolation("model worker", "update", reason, "report this")
            grad = parameter.grad
            bucket.flat.grad = torch.zeros_like(bucket.flat) if grad is None else own_slice(grad)

    @property
    def grads(self) -> list[Tensor]:
        """This rank's slices of gradients, once collected."""
        return [bucket.flat.grad for bucket in self.buckets if bucket.flat.grad is not None]

    def square_norm(self) -> Tensor:
        """float64: sum of squares of this rank's gradients; what several ranks have is shared among them."""
        found = [
            norms(b.flat.grad).double().square().sum() / holders(self.parameters[b.names[0]])
            for b in self.buckets
            if b.flat.grad is not None
        ]
        device = next(iter(self.parameters.values())).device
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=device)

    def release(self) -> None:
        self.zero_grad()
        self.buckets = []
