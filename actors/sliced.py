"""Trainable parameters of which each rank holds a slice: gradients arrive sliced, by FSDP2 already summed,
and the optimizer steps on the slices alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from actors.errors import InvariantViolation
from actors.models.parallel.fsdp import holders, own_slice
from actors.trainer.optimizer import Bucket, norms


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
                raise InvariantViolation("host", "update", reason, "report this")
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
