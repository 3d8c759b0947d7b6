"""Readback of parameters, wherever they and what was handed over are; no engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.rollout.vllm.parameter_map import Piece, Region
from actors.rollout.vllm.readback import _found
from actors.sync.payload import digest_of
from tests.actors.pretend_device import There, second_device

WHOLE = torch.arange(24, dtype=torch.float32).reshape(6, 4)


def bound(rows: slice) -> tuple[nn.Module, list[Piece]]:
    """A module whose parameter begins with rows of `WHOLE`, as one worker of several holds them."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.cat([WHOLE[rows], torch.full((2, 4), -1.0)]))
    shape = (rows.stop - rows.start, 4)
    return module, [Piece("weight", Region(shape, (4, 1), rows.start * 4), Region(shape, (4, 1), 0))]


@pytest.mark.parametrize("rows", [slice(0, 6), slice(2, 5)], ids=["whole", "a share"])
@pytest.mark.parametrize("handed_there", [False, True])
@pytest.mark.parametrize("bound_there", [False, True])
def test_what_is_read_has_one_digest_on_all_devices(
    rows: slice, bound_there: bool, handed_there: bool
) -> None:
    module, pieces = bound(rows)
    with second_device():
        if bound_there:
            module.weight.data = There(module.weight.data)
        handed = There(WHOLE) if handed_there else WHOLE
        assert digest_of(_found(module, pieces, handed)) == digest_of(WHOLE)
        with torch.no_grad():
            module.weight.data[1, 1] += 1.0
        assert digest_of(_found(module, pieces, handed)) != digest_of(WHOLE)
