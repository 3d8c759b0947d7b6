"""Policy losses against literals: clipping, dual clip, ratios by level, aggregates, masks, entropy, KL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.algorithms.checks import RATIO_TOLERANCE, check_first_ratio
from actors.algorithms.loss import TokenView
from actors.algorithms.policy import PolicyLoss
from actors.batches.batch import Batch
from actors.errors import InvariantViolation


def view_of(
    logps: list[float], lengths: list[int], entropy: torch.Tensor | None = None, **columns: Any
) -> TokenView:
    """Tokens of samples with the given lengths; `old_logps` 0 and `advantages` 1 unless given."""
    n = len(logps)
    columns = {"old_logps": [0.0] * n, "advantages": [1.0] * n, **columns}
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    tensors = {k: v if v.dtype == torch.bool else v.double() for k, v in tensors.items()}
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    zeros = torch.zeros(n)
    return TokenView(
        torch.tensor(logps, requires_grad=True), sequence, len(lengths),
        zeros if entropy is None else entropy, zeros.bool(), zeros, zeros, token_columns=tensors,
    )  # fmt: skip


def batch_of(lengths: list[int], **token_columns: np.ndarray) -> Batch:
    """Two prompt tokens before every completion."""
    ids = [np.arange(2 + n) for n in lengths]
    batch = Batch.from_sequences(ids, [np.arange(2 + n) >= 2 for n in lengths])
    return batch.with_token_columns(**token_columns)


def value(loss: PolicyLoss, view: TokenView, divisor: float = 1.0) -> float:
    return loss(view, {"divisor": divisor, "tokens": float(view.logps.numel())})[0].item()


BNPO = {"loss_type": "bnpo"}


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected"),
    [
        (1.0, 1.0, -1.2),
        (-1.0, -1.0, 0.8),
        (1.0, -1.0, math.e),
        (-1.0, 1.0, -math.exp(-1)),
        (0.1, 2.0, -2.21034),
    ],
)
def test_the_clipped_surrogate_has_the_literal_values(
    log_ratio: float, advantage: float, expected: float
) -> None:
    view = view_of([log_ratio], [1], advantages=[advantage])
    assert value(PolicyLoss(**BNPO), view) == pytest.approx(expected, rel=1e-5)


def test_clipped_tokens_have_no_gradient_and_are_counted_by_side() -> None:
    view = view_of([1.0, -1.0, 0.1, 1.0], [4], advantages=[1.0, -1.0, 1.0, -1.0])
    loss, metrics = PolicyLoss(**BNPO)(view, {"divisor": 1.0, "tokens": 4.0})
    gradient = torch.autograd.grad(loss, view.logps)[0]
    assert gradient.tolist() == pytest.approx([0.0, 0.0, -math.exp(0.1), math.e], rel=1e-5)
    shares = {n: (s / w).item() for n, (s, w) in metrics.items() if n.startswith("clip_ratio")}
    assert shares == {
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.25,
        "clip_ratio/region_mean": 0.5,
    }


def test_epsilon_high_widens_one_side_only() -> None:
    loss = PolicyLoss(**BNPO, epsilon_high=0.5)
    assert value(loss, view_of([1.0], [1])) == pytest.approx(-1.5)
    assert value(loss, view_of([-1.0], [1], advantages=[-1.0])) == pytest.approx(0.8)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    far = view_of([4.0], [1], advantages=[-2.0])
    assert value(PolicyLoss(**BNPO, delta=3.0), far) == pytest.approx(6.0)
    assert value(PolicyLoss(**BNPO), far) == pytest.approx(2 * math.exp(4), rel=1e-5)
    near = view_of([0.5], [1], advantages=[-2.0])
    assert value(PolicyLoss(**BNPO, delta=3.0), near) == pytest.approx(2 * math.exp(0.5), rel=1e-5)
    assert value(PolicyLoss(**BNPO, delta=3.0), view_of([4.0], [1])) == pytest.approx(-1.2)


def test_before_the_first_update_ratios_are_1_and_the_loss_is_minus_the_mean_advantage() -> None:
    logps = [-0.3, -2.0, -1.1]
    view = view_of(logps, [2, 1], old_logps=torch.tensor(logps).tolist(), advantages=[-1.0, 3.0, -2.0])
    loss, metrics = PolicyLoss(**BNPO)(view, {"divisor": 3.0, "tokens": 3.0})
    assert loss.item() == 0.0
    assert metrics["ratio/max_deviation"][0].item() == 0.0
    assert metrics["ratio/mean"][0].item() == 3.0
    assert metrics["approx_kl"][0].item() == metrics["clip_ratio/region_mean"][0].item() == 0.0


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [0.3, -0.1, 0.4]),
        ("sequence", [0.1, 0.1, 0.4]),  # GSPO: the mean log-ratio
        ("trajectory", [0.2, 0.2, 0.4]),  # RLOO: their sum
    ],
)
def test_ratios_are_of_a_token_a_sequence_or_a_trajectory(level: str, expected: list[float]) -> None:
    view = view_of([0.3, -0.1, 0.4], [2, 1])
    loss = PolicyLoss(**BNPO, epsilon=0.9, importance_sampling_level=level)
    assert value(loss, view) == pytest.approx(-sum(math.exp(x) for x in expected), rel=1e-5)


LOGPS, LENGTHS = [0.1, 0.2, -0.1, 0.3], [3, 1]
RATIOS = [math.exp(x) for x in LOGPS]


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", -(sum(RATIOS[:3]) / 3 + RATIOS[3]) / 2),
        ("bnpo", -sum(RATIOS) / 4),
        ("dr_grpo", -sum(RATIOS) / (2 * 16)),
        ("dapo", -sum(RATIOS) / 2.5),
    ],
)
def test_aggregates_divide_as_their_names_say(loss_type: str, expected: float) -> None:
    loss = PolicyLoss(loss_type=loss_type, epsilon=0.9, max_completion_length=16)
    batch = batch_of(LENGTHS).with_columns(tokens_per_step=np.array([2.5, 2.5]))
    assert loss(view_of(LOGPS, LENGTHS), loss.totals(batch))[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_micro_batches_of_whole_samples_add_up(loss_type: str, level: str) -> None:
    loss = PolicyLoss(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9, beta=0.1)
    totals = loss.totals(batch_of(LENGTHS))
    ref = [0.0, 0.1, 0.2, 0.3]
    whole = loss(view_of(LOGPS, LENGTHS, ref_logps=ref), totals)[0].item()
    parts = [view_of(LOGPS[:3], [3], ref_logps=ref[:3]), view_of(LOGPS[3:], [1], ref_logps=ref[3:])]
    assert sum(loss(part, totals)[0].item() for part in parts) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_masked_samples_change_nothing_but_the_number_of_rows(loss_type: str, level: str) -> None:
    """As TRL's mask_truncated_completions: the row stays in the mean over rows, its tokens are gone."""
    loss = PolicyLoss(
        loss_type=loss_type, importance_sampling_level=level, max_completion_length=9, entropy_coef=0.1
    )
    results = []
    for hidden in (1.0, 5.0):
        mask = [True, True, True, False]
        view = view_of([*LOGPS[:3], hidden], LENGTHS, mask=mask, advantages=[1.0, 1.0, 1.0, hidden])
        totals = loss.totals(batch_of(LENGTHS, mask=np.array(mask)))
        value, metrics = loss(view, totals)
        results.append(
            (value.item(), torch.autograd.grad(value, view.logps)[0].tolist(),
             {n: (float(s), float(w)) for n, (s, w) in metrics.items()})
        )  # fmt: skip
    assert results[0] == results[1]
    assert results[0][1][3] == 0.0


def test_a_bonus_for_entropy_is_its_mean_over_counted_tokens() -> None:
    entropy = torch.tensor([1.0, 2.0, 3.0, 100.0], requires_grad=True)
    mask = [True, True, True, False]
    loss = PolicyLoss(loss_type="grpo", entropy_coef=0.5)
    assert loss.needs_entropy_gradient
    assert not PolicyLoss().needs_entropy_gradient
    view = view_of([0.0] * 4, LENGTHS, entropy, mask=mask, advantages=[0.0] * 4)
    found, metrics = loss(view, loss.totals(batch_of(LENGTHS, mask=np.array(mask))))
    assert found.item() == pytest.approx(-0.5 * 2.0)
    assert torch.autograd.grad(found, entropy)[0].tolist() == pytest.approx([-0.5 / 3] * 3 + [0.0])
    assert metrics["policy_loss"][0].item() == 0.0
    assert not any(torch.is_tensor(x) and x.requires_grad for pair in metrics.values() for x in pair)


@pytest.mark.parametrize(
    ("name", "values"), [("k1", [0.5, -1]), ("k2", [0.125, 0.5]), ("k3", [0.106531, 0.718282])]
)
def test_the_kl_term_has_the_literal_values_and_its_metric(name: str, values: list[float]) -> None:
    view = view_of([-1.0, -2.0], [2], old_logps=[-1.0, -2.0], ref_logps=[-1.5, -1.0], advantages=[0.0, 0.0])
    loss, metrics = PolicyLoss(**BNPO, beta=0.1, kl_estimator=name)(view, {"divisor": 2.0, "tokens": 2.0})
    assert loss.item() == pytest.approx(0.1 * sum(values) / 2, abs=1e-6)
    assert (metrics["kl"][0] / metrics["kl"][1]).item() == pytest.approx(sum(values) / 2, abs=1e-6)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_corrected_every_estimator_has_the_gradient_of_the_kl_to_the_reference(name: str) -> None:
    """In expectation over the policy, as an exact sum over a vocabulary of four; by the logits of the policy.

    Exact for k1 and k3; k2 is biased as a value, and so is its corrected gradient.
    """
    theta = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64)
    log_q = torch.tensor([0.4, 0.1, 0.2, 0.2], dtype=torch.float64).log_softmax(0)
    logits = theta.clone().requires_grad_()
    log_p = logits.log_softmax(0)
    wanted = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)[0]
    loss = PolicyLoss(**BNPO, beta=1.0, kl_estimator=name)
    view = view_of([0.0] * 4, [4], old_logps=log_p.tolist(), ref_logps=log_q.tolist(), advantages=[0.0] * 4)
    parts = loss._kl(replace(view, logps=log_p), (log_p - log_p.detach()).exp())
    found = torch.autograd.grad((log_p.detach().exp() * parts).sum(), logits)[0]
    close = (found - wanted).abs().max() / wanted.abs().max()
    assert close < (0.3 if name == "k2" else 1e-6)


def test_with_beta_0_the_reference_is_a_metric_only() -> None:
    view = view_of([-1.0], [1], old_logps=[-1.0], ref_logps=[-1.5])
    loss, metrics = PolicyLoss(**BNPO)(view, {"divisor": 1.0, "tokens": 1.0})
    assert loss.item() == -1.0
    assert metrics["kl"][0].item() == pytest.approx(0.106531, abs=1e-6)


def test_a_loss_names_the_columns_that_it_needs() -> None:
    assert PolicyLoss(beta=0.1).required_columns == (
        "old_logps",
        "advantages",
        "ref_logps",
        "tokens_per_step",
    )
    assert PolicyLoss(loss_type="grpo").required_columns == ("old_logps", "advantages")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"delta": 1.1}, "delta must be above"), ({"loss_type": "dr_grpo"}, "max_completion_length")],
)
def test_options_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolicyLoss(**settings)


def test_the_sampling_temperature_divides_the_logits() -> None:
    assert PolicyLoss(temperature=0.7).logit_temperature == 0.7


CISPO = {"loss_type": "cispo", "epsilon_high": 2.0}


def test_cispo_bounds_the_weight_of_a_token_and_never_its_gradient() -> None:
    """Ratios e, 1 / e and e: weights 2, 1 / e and 2, each times A log p; no lower bound."""
    view = view_of([1.0, -1.0, 1.0], [3], advantages=[1.0, 3.0, -1.0])
    found, metrics = PolicyLoss(**CISPO)(view, {"divisor": 2.0, "tokens": 3.0})
    assert found.item() == pytest.approx(
        -(2 * 1.0 * 1 + math.exp(-1) * 3.0 * -1 + 2 * -1.0 * 1) / 2, rel=1e-6
    )
    gradient = torch.autograd.grad(found, view.logps)[0]
    assert gradient.tolist() == pytest.approx([-1.0, -1.5 * math.exp(-1), 1.0], rel=1e-6)
    assert {n: float(s / w) for n, (s, w) in metrics.items() if "clip" in n} == {
        "cispo_clip_ratio": pytest.approx(1 / 3)  # TRL counts it where the advantage is positive
    }


def test_cispo_is_averaged_as_dapo_is() -> None:
    loss = PolicyLoss(**CISPO)
    batch = batch_of(LENGTHS).with_columns(tokens_per_step=np.array([2.5, 2.5]))
    assert loss.required_columns == ("old_logps", "advantages", "tokens_per_step")
    assert loss.totals(batch) == {"divisor": 2.5, "tokens": 4.0}


@pytest.mark.parametrize("settings", [{}, {"epsilon_high": 0.28}, {"epsilon_high": 5.0, "delta": 7.0}])
def test_cispo_without_its_bound_or_with_another_ones_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="cispo"):
        PolicyLoss(loss_type="cispo", **settings)


def test_gspo_clips_the_whole_sample_by_its_mean_log_ratio() -> None:
    """Mean log-ratio 0.1 of two tokens: e^0.1 is above 1.0004, so that no token of it has a gradient."""
    loss = PolicyLoss(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4)
    view = view_of([0.3, -0.1, 2e-4], [2, 1])
    found, _ = loss(view, {"divisor": 2.0, "tokens": 3.0})
    assert found.item() == pytest.approx(-(1.0004 + math.exp(2e-4)) / 2, rel=1e-6)
    assert torch.autograd.grad(found, view.logps)[0].tolist() == pytest.approx([0, 0, -0.5 * math.exp(2e-4)])


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_on_policy_is_the_loss_at_its_own_log_probabilities(level: str) -> None:
    logps, columns = [-1.0, -0.5, -2.0], {"advantages": [1.0, -2.0, 3.0]}
    known = view_of(logps, [2, 1], old_logps=logps, **columns)
    own = view_of(logps, [2, 1], engine_logps=logps, **columns)
    del own.token_columns["old_logps"]
    losses, sums = [], []
    for on_policy, view in ((False, known), (True, own)):
        loss = PolicyLoss(loss_type="grpo", importance_sampling_level=level, on_policy=on_policy)
        made = loss(view, {"divisor": 2.0, "tokens": 3.0})
        made[0].backward()
        losses.append(made[0].item())
        sums.append(made[1])
    assert losses[0] == losses[1] == pytest.approx(-1.25)
    assert known.logps.grad is not None
    assert own.logps.grad is not None
    assert known.logps.grad.tolist() == own.logps.grad.tolist()
    assert sums[1]["ratio/max_deviation"][0] == 0
    assert sums[1]["mismatch/k3"] == (0, 3)


def test_on_policy_says_how_far_stored_log_probabilities_and_the_engine_are() -> None:
    """The engine gave 3 times the first token's probability; what was stored is off by 0.1 at the second."""
    view = view_of([-2.0, -1.0], [2], old_logps=[-2.0, -1.1], engine_logps=[-2.0 + math.log(3), -1.0])
    loss = PolicyLoss(**BNPO, on_policy=True, mismatch_limits=(0.5, 0.5))
    _, sums = loss(view, {"divisor": 2.0, "tokens": 2.0})
    assert sums["ratio/mean"][0] == 2
    assert sums["ratio/max_deviation"][0].item() == pytest.approx(math.exp(0.1) - 1, rel=1e-6)
    found = {name: float(sums[f"mismatch/{name}"][0]) for name in ("k1", "k3", "max", "beyond_2x")}
    far = math.log(3)
    assert found == pytest.approx({"k1": far, "k3": 1 / 3 - 1 + far, "max": far, "beyond_2x": 1})
    assert sums["mismatch/k3"][1] == 2
    means = {"mismatch/k1": 0.5, "mismatch/k3": 0.2, "mismatch/max": far, "mismatch/beyond_2x": 0.5}
    loss.check(means)
    with pytest.raises(InvariantViolation, match=r"50\.00% of tokens beyond a factor of 2"):
        loss.model_copy(update={"mismatch_limits": (0.5, 0.4)}).check(means)
    assert loss.required_columns == ("engine_logps", "advantages")


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_tokens_off_their_stored_log_probability_are_counted_whatever_the_ratio_is_of(level: str) -> None:
    """Off by 0, by 0.15 of -1, by 0.15 of -30 (half a percent of it), by what is no number."""
    logps, off = [-1.0, -1.0, -30.0, -1.0], [0.0, 0.15, 0.15, math.nan]
    view = view_of(logps, [2, 2], old_logps=[a - b for a, b in zip(logps, off)], advantages=[1.0] * 4)
    loss = PolicyLoss(loss_type="grpo", importance_sampling_level=level, ratio_tolerance=0.1)
    _, sums = loss(view, {"divisor": 2.0, "tokens": 4.0})
    assert (sums["ratio/beyond"][0], sums["ratio/beyond"][1]) == (2, 4)
    assert sums["ratio/beyond_tenth"][0] == 2
    _, sums = loss.model_copy(update={"ratio_tolerance": 0.04})(view, {"divisor": 2.0, "tokens": 4.0})
    assert sums["ratio/beyond_tenth"][0] == 3


def test_a_long_sample_whose_route_flips_once_in_bfloat16_passes_the_first_update() -> None:
    """1,000 tokens with a noise of 0.003 each and one that is off by 1.1: their product is far from 1."""
    generator = np.random.default_rng(0)
    logps = -generator.uniform(0.1, 5, 1000)
    old = logps + generator.normal(0, 0.003, 1000)
    old[500] += 1.1
    view = view_of(logps.tolist(), [1000], old_logps=old.tolist(), advantages=[1.0] * 1000)
    loss = PolicyLoss(
        loss_type="grpo", importance_sampling_level="trajectory", ratio_tolerance=RATIO_TOLERANCE["bfloat16"]
    )
    _, sums = loss(view, {"divisor": 1.0, "tokens": 1000.0})
    means = {name: float(total) / float(weight) for name, (total, weight) in sums.items() if "beyond" in name}
    assert sums["ratio/max_deviation"][0] > 0.6
    check_first_ratio(means, RATIO_TOLERANCE["bfloat16"])
