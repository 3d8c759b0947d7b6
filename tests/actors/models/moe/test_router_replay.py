"""Experts that a trainer is told to use: their gates, their gradients, and what is counted of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from actors.errors import InvariantViolation, UserError
from actors.models.architectures.lookup import ARCHITECTURES, architecture_of, replay_problem
from actors.models.architectures.row import GateKind
from actors.models.moe.router_replay import GATES, RouteReplay
from actors.models.moe.router_stats import RouterStats, routers_of
from tests.actors.models.tiny_models import architectures, tiny_model

FAMILIES = [name for name, row in ARCHITECTURES.items() if row.router is not None and row.router.gates]
EACH_KIND = [
    "qwen3_moe", "mixtral", "granitemoe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "minimax_m2"
]  # fmt: skip
"""One family for each way of making gates."""
IDS = torch.from_numpy(np.random.default_rng(3).integers(5, 250, (2, 9)))
LOGITS = torch.tensor([[1.0, 2.0, 3.0]])
"""e, e^2 and e^3 are 2.718, 7.389 and 20.086: 30.193 in all, 22.804 for the first and the third."""


def choices_of(model: Any) -> np.ndarray:
    """int64 (tokens, layers, top_k) that the model's routers choose for `IDS`."""
    row = architecture_of(model.config)
    assert row.router is not None
    router, found = row.router, []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(router.read(output, 2)[1]))
        for module in routers_of(model, router.module).values()
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1).numpy()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("softmax", {"norm_topk_prob": True}, [0.1192, 0.8808]),
        ("softmax", {"norm_topk_prob": False}, [0.0900, 0.6652]),
        ("scaled_softmax", {"routed_scaling_factor": 2.0, "norm_topk_prob": True}, [0.1801, 1.3305]),
        ("normalised_softmax", {}, [0.1192, 0.8808]),
        ("floored_softmax", {"moe_norm_min": 1e-12}, [0.1192, 0.8808]),
        ("floored_softmax", {"moe_norm_min": 1.0}, [0.0900, 0.6652]),
        ("softmax_of_chosen", {}, [0.1192, 0.8808]),
        # The sigmoids of 1 and 3 are .7311 and .9526.
        ("scaled_sigmoid", {"norm_topk_prob": True, "routed_scaling_factor": 2.0}, [0.8684, 1.1316]),
        ("scaled_sigmoid", {"norm_topk_prob": False, "routed_scaling_factor": 0.5}, [0.3655, 0.4763]),
        ("normalised_sigmoid", {}, [0.4342, 0.5658]),
    ],
)
def test_gates_of_given_experts_are_made_as_the_architecture_does(
    kind: GateKind, config: dict[str, Any], expected: list[float]
) -> None:
    gates = GATES[kind](LOGITS, torch.tensor([[0, 2]]), cast(Any, SimpleNamespace(**config)))
    np.testing.assert_allclose(gates[0].numpy(), expected, atol=5e-5)


def test_every_way_of_making_gates_has_an_architecture_among_the_fast_tests() -> None:
    kinds = [row.router.gates for name in EACH_KIND if (row := ARCHITECTURES[name]).router is not None]
    assert sorted(map(str, kinds)) == sorted(GATES)


@pytest.mark.parametrize("model_type", architectures(FAMILIES, fast=EACH_KIND))
def test_a_model_that_replays_its_own_choices_is_itself_to_the_bit(model_type: str) -> None:
    model = tiny_model(model_type).eval()
    expected, own = logits(model), choices_of(model)
    replay = RouteReplay(model)
    replay.force(own[..., ::-1].copy())
    # Another order of a token's experts adds them up in another order.
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    replay.force(own)
    assert torch.equal(logits(model), expected)
    assert replay.agreement(replay.totals()).tolist() == [1.0] * replay.n_layers
    replay.force(np.full_like(own, -1))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", architectures(FAMILIES, fast=EACH_KIND))
def test_given_experts_are_what_is_computed_and_counted(model_type: str) -> None:
    model = tiny_model(model_type).eval()
    routers, replay = RouterStats(model), RouteReplay(model)
    own = choices_of(model)
    given = (own + 1) % 8
    given[::3] = -1
    replay.force(given)
    with routers.collecting():
        changed = logits(model)
    assert (changed - logits(tiny_model(model_type).eval())).abs().max() > 1e-2
    load = routers.read().load
    for layer in range(replay.n_layers):
        forced = np.bincount(given[1::3, layer].ravel(), minlength=8)
        forced += np.bincount(given[2::3, layer].ravel(), minlength=8)
        assert (load[layer] >= forced).all()
        assert load[layer].sum() == 2 * IDS.numel()


def test_agreement_is_the_share_of_given_experts_that_the_router_would_have_chosen() -> None:
    model = tiny_model("qwen3_moe").eval()
    own = choices_of(model)
    unchosen = np.array([[[min(set(range(8)) - set(token))] for token in layers] for layers in own])
    given = own.copy()
    # The first layer's half as well: with it changed the second layer's router sees something else.
    given[:, 0, 1:] = unchosen[:, 0]
    given[4:, :, :] = -1
    replay = RouteReplay(model)
    replay.force(given)
    logits(model)
    assert replay.totals()[0].item() == 4
    assert replay.agreement(replay.totals())[0] == 0.5


def test_gradients_flow_through_the_gates_into_the_router() -> None:
    model = tiny_model("qwen3_moe").double().eval()
    model.set_experts_implementation("eager")
    replay = RouteReplay(model)
    replay.force((choices_of(model) + 3) % 8)

    def loss() -> torch.Tensor:
        return model(input_ids=IDS, labels=IDS).loss

    loss().backward()
    weight = model.model.layers[0].mlp.gate.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, step = float((weight.grad * direction).sum()), 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * step * direction
            ends.append(float(loss()))
            weight -= sign * step * direction
    # Gates and loss are float32 inside transformers: the difference has 1e-3 of noise.
    assert abs(expected) > 1e-3
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=0.01)


def test_experts_of_another_model_are_refused() -> None:
    replay = RouteReplay(tiny_model("qwen3_moe"))
    with pytest.raises(InvariantViolation, match="3 layers with 2 experts a token, the trainer 2 with 2"):
        replay.force(np.zeros((18, 3, 2), np.int64))


def test_architectures_whose_experts_cannot_be_replayed_are_refused_with_the_reason() -> None:
    assert set(ARCHITECTURES) - set(FAMILIES) == {
        "llama", "mistral", "qwen2", "qwen3", "phimoe", "dbrx", "qwen3_next"
    }  # fmt: skip
    assert [name for name in ARCHITECTURES if replay_problem(name) is None] == FAMILIES
    assert replay_problem("llama") == "a llama model has no router"
    for name in ("dbrx", "qwen3_next", "unheard_of"):
        objection = replay_problem(name)
        assert objection is not None
        assert "can't be replayed: i" in objection
        assert objection.endswith("minimax_m2, hunyuan_v1_moe, gpt_oss")
    with pytest.raises(
        UserError, match="router_replay: 'rollout', but the experts of a phimoe model can't be"
    ):
        RouteReplay(tiny_model("phimoe"))
