"""Readback of parameters, wherever they and what was handed over are; no engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.rollout.vllm.parameter_map import Bindings, Piece, Region
from actors.rollout.vllm.readback import Reader
from actors.sync.digests import Algorithm, digest_of
from tests.actors.pretend_device import There, second_device

WHOLE = torch.arange(24, dtype=torch.float32).reshape(6, 4)
MODULE, NAME = "layer", "layer.weight"
SHARES = [slice(0, 6), slice(2, 5)]


def bound(rows: slice) -> tuple[nn.Module, Bindings]:
    """A module whose parameter begins with rows of `WHOLE`, as one worker of several holds them."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.cat([WHOLE[rows], torch.full((2, 4), -1.0)]))
    shape = (rows.stop - rows.start, 4)
    piece = Piece("weight", Region(shape, (4, 1), rows.start * 4), Region(shape, (4, 1), 0))
    return module, {MODULE: {NAME: [piece]}}


def read(module: nn.Module, bindings: Bindings, handed: torch.Tensor, algorithm: Algorithm) -> Reader:
    reader = Reader(bindings, algorithm)
    reader.hand({NAME: handed})
    reader.finish({MODULE: module})
    return reader


def check_reading(module: nn.Module, bindings: Bindings, handed: torch.Tensor, algorithm: Algorithm) -> None:
    right = {NAME: digest_of(WHOLE, algorithm)}
    found = read(module, bindings, handed, algorithm)
    assert (found.digests, found.differing, [*found.unbound]) == (right, [], [])
    with torch.no_grad():
        module.weight.data[1, 1] += 1.0
    wrong = read(module, bindings, handed, algorithm)
    assert wrong.digests != right
    assert wrong.differing == [NAME]


@pytest.mark.parametrize("rows", SHARES, ids=["whole", "a share"])
@pytest.mark.parametrize("algorithm", ["xxh3", "sums"])
def test_what_is_bound_has_the_digest_of_what_was_handed_over_until_it_changes(
    rows: slice, algorithm: Algorithm
) -> None:
    check_reading(*bound(rows), WHOLE, algorithm)


@pytest.mark.parametrize("rows", SHARES, ids=["whole", "a share"])
@pytest.mark.parametrize("handed_there", [False, True])
def test_no_tensor_of_a_read_back_leaves_its_device(rows: slice, handed_there: bool) -> None:
    module, bindings = bound(rows)
    with second_device() as copied:
        held = There(module.weight.data)
        # A parameter's own `data` would not say where it is.
        del module.weight
        module.weight = held
        check_reading(module, bindings, There(WHOLE) if handed_there else WHOLE, "sums")
        # Of both readings: the sums of what is bound, and of what was handed over.
        assert copied == [16] * (4 if handed_there else 2)
