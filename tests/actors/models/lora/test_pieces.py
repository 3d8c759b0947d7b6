"""Rows of weights in memory that are tensors of a checkpoint."""

from __future__ import annotations

import pytest
import torch

from actors.models.architectures.conversion import checkpoint_tensors
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.lora.low_rank import Factors
from actors.models.lora.merge import base_tensors
from actors.models.lora.pieces import Pieces, WeightRows, _piece
from tests.actors.models.tiny_models import tiny_model

WHOLE = {"gpt_oss", "granitemoe"}
"""Keep the experts of a layer together in their checkpoints."""


def factors(weight: torch.Tensor, transposed: bool = False) -> Factors:
    *experts, out, into = weight.shape
    return Factors(torch.zeros(*experts, 2, into), torch.zeros(*experts, out, 2), 1.0, transposed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pieces_of_all_weights_are_the_tensors_of_the_checkpoint(architecture: str) -> None:
    model = tiny_model(architecture)
    pieces, in_pieces = Pieces(model), set()
    for name, weight in base_tensors(model).items():
        if weight.ndim < 2:
            continue
        right = checkpoint_tensors(model, {name: weight})
        found = pieces.of(name, factors(weight))
        assert all(torch.equal(piece.of(weight), right[there]) for there, piece in found.items())
        assert found.keys() in ({}.keys(), right.keys()), "all of a weight or nothing"
        if found and weight.ndim == 3:
            in_pieces.add(name)
        assert pieces.of(name, factors(weight)) is found
    stacks = {name for name in base_tensors(model) if name.endswith(("gate_up_proj", "down_proj"))}
    assert in_pieces == (set() if architecture in WHOLE else stacks)


def test_a_weight_that_is_stored_the_other_way_round_is_in_no_pieces() -> None:
    model = tiny_model("gpt_oss")
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert Pieces(model).of("model.layers.0.mlp.experts.down_proj", factors(weight, True)) == {}


@pytest.mark.parametrize(
    ("first", "piece"),
    [(0, WeightRows(0, slice(0, 4))), (8, WeightRows(1, slice(2, 6))), (4, None)],
    ids=["the first rows", "rows of the second expert", "rows of two experts"],
)
def test_rows_are_of_one_expert_or_no_piece(first: int, piece: WeightRows | None) -> None:
    numbers = torch.arange(first, first + 4)[:, None].expand(-1, 2)
    assert _piece(numbers, 6, True) == piece
    assert _piece(numbers.flip(0), 6, True) is None
    assert _piece(numbers.T, 6, True) is None
