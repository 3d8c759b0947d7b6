"""Loss and gradient of GRPO and RLOO equal TRL's on one batch, whose samples come from another policy."""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from actors.algorithms.importance_sampling import CORRECTION
from actors.algorithms.policy import PolicyLoss
from tests.actors.algorithms.test_policy import batch_of, view_of

pytestmark = pytest.mark.trl

LENGTHS, LONGEST = [3, 7, 1, 5], 7


class Stub:
    """What TRL's `_compute_loss` asks of its trainer: settings, and log-probabilities handed in."""

    def __init__(self, logps: torch.Tensor, entropy: torch.Tensor, **settings: Any) -> None:
        defaults = {
            "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "loss_type": "grpo", "temperature": 1.0,
            "importance_sampling_level": "token", "max_completion_length": LONGEST, "entropy_coef": 0.0,
        }  # fmt: skip
        args = types.SimpleNamespace(
            delta=settings.pop("delta", None), steps_per_generation=1,
            use_bias_correction_kl=settings.pop("use_bias_correction_kl", True),
        )  # fmt: skip
        self.__dict__.update({**defaults, **settings}, args=args)
        self._entropy_bonus_enabled = self.entropy_coef != 0.0
        self.outputs = logps, entropy, None
        self.model = types.SimpleNamespace(training=True)
        self.accelerator = types.SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True,
            gather_for_metrics=lambda x: x,
        )  # fmt: skip
        self.aux_loss_enabled = self.use_vllm = self.use_adaptive_entropy = False
        self.top_entropy_quantile, self.current_gradient_accumulation_steps = 1.0, 1
        self.off_policy_mask_threshold = None
        self._metrics: Any = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


def padded(values: np.ndarray, lengths: list[int]) -> torch.Tensor:
    """(T,) -> (S, longest), zeros at the end of each row."""
    rows = np.zeros((len(lengths), LONGEST))
    rows[np.arange(LONGEST) < np.array(lengths)[:, None]] = values
    return torch.tensor(rows)


def of_trl(trainer: type, columns: dict[str, np.ndarray], mask: np.ndarray, **settings: Any) -> Any:
    """TRL's loss, its gradient by log-probability (T,), and its metrics."""
    logps = padded(columns["logps"], LENGTHS).requires_grad_()
    keep = padded(mask.astype(float), LENGTHS)
    offsets = np.cumsum([0, *LENGTHS])[:-1]
    old = padded(columns["old_logps"], LENGTHS)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 2), "prompt_mask": torch.ones(len(LENGTHS), 2),
        "completion_ids": torch.zeros(len(LENGTHS), LONGEST), "completion_mask": keep,
        "advantages": torch.tensor(columns["advantages"][offsets]), "num_items_in_batch": keep.sum(),
        "old_per_token_logps": old, "old_logps": (old * keep).sum(1),
        "ref_per_token_logps": padded(columns["ref_logps"], LENGTHS),
    }  # fmt: skip
    entropy = padded(columns["entropy"], LENGTHS).requires_grad_()
    stub = Stub(logps, entropy, **settings)
    if CORRECTION in columns:
        inputs[CORRECTION] = padded(columns[CORRECTION], LENGTHS)
        stub.use_vllm = stub.vllm_importance_sampling_correction = True
    loss = trainer._compute_loss(stub, None, inputs)  # type: ignore[attr-defined]
    gradient = torch.autograd.grad(loss, logps, retain_graph=True)[0]
    real = np.arange(LONGEST) < np.array(LENGTHS)[:, None]
    metrics = {name: values[0] for name, values in stub._metrics["train"].items()}
    return loss.item(), gradient.numpy()[real], metrics


def of_ours(loss: PolicyLoss, columns: dict[str, np.ndarray], mask: np.ndarray) -> Any:
    read = ("old_logps", "ref_logps", "advantages", CORRECTION)
    tokens = {name: columns[name] for name in read if name in columns}
    batch = batch_of(LENGTHS, mask=mask, **tokens)
    batch = batch.with_columns(tokens_per_step=np.full(len(LENGTHS), float(mask.sum())))
    given = {name: values.tolist() for name, values in tokens.items()}
    view = view_of(
        columns["logps"].tolist(), LENGTHS, torch.tensor(columns["entropy"]), mask=mask.tolist(), **given
    )
    value, sums = loss(view, loss.totals(batch))
    metrics = {name: float(total / weight) for name, (total, weight) in sums.items() if weight}
    return value.item(), torch.autograd.grad(value, view.logps)[0].numpy(), metrics


def off_policy_batch(seed: int) -> dict[str, np.ndarray]:
    """Ratios from 0.3 to 3 to the old policy; advantages of both signs, one a sample."""
    generator = np.random.default_rng(seed)
    n = sum(LENGTHS)
    logps = -generator.exponential(1.0, size=n).astype(np.float32).astype(np.float64)
    return {
        "logps": logps,
        "old_logps": logps + generator.uniform(-1.1, 1.1, size=n),
        "ref_logps": logps + generator.normal(0, 0.5, size=n),
        "advantages": np.repeat(generator.normal(size=len(LENGTHS)), LENGTHS),
        "entropy": generator.exponential(1.0, size=n),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": LONGEST},
    "KL": {"loss_type": "grpo", "beta": 0.3},
    "KL without correction": {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    "one-sided": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.28},
    "two-sided clipping": {"loss_type": "bnpo", "delta": 1.5},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.05},
    "CISPO": {"loss_type": "cispo", "epsilon_high": 1.3},
    "CISPO with KL": {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.3},
}


CORRECTED = ("dapo", "KL", "GSPO", "CISPO with KL", "entropy bonus")


EXTREMES = {"clip_ratio/low_min", "clip_ratio/high_max"}
"""TRL's, of single samples; not logged here."""


@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_losses_and_gradients_equal_trls(name: str) -> None:
    """The surrogate is multiplied, some tokens by 0; the divergence and the entropy bonus are not."""
    from trl import GRPOTrainer

    columns, settings = off_policy_batch(3), SETTINGS[name]
    ratio = np.random.default_rng(4).uniform(0, 3, size=sum(LENGTHS))
    columns[CORRECTION] = np.where(ratio < 0.5, 0.0, ratio)
    mask = np.ones(sum(LENGTHS), bool)
    theirs = {("epsilon_low" if k == "epsilon" else k): v for k, v in settings.items()}
    expected, gradient, _ = of_trl(GRPOTrainer, columns, mask, **theirs)
    found, our_gradient, _ = of_ours(PolicyLoss(**settings), columns, mask)
    without, _, _ = of_ours(PolicyLoss(**settings), off_policy_batch(3), mask)
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found - without) > 1e-3
    assert our_gradient == pytest.approx(gradient, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("masked", [False, True], ids=["all samples", "a sample masked"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_of_grpo_equal_trls(name: str, masked: bool) -> None:
    from trl import GRPOTrainer

    columns, settings = off_policy_batch(len(name)), SETTINGS[name]
    mask = np.repeat([True, not masked, True, True], LENGTHS)
    theirs = {("epsilon_low" if k == "epsilon" else k): v for k, v in settings.items()}
    value, gradient, metrics = of_trl(GRPOTrainer, columns, mask, **theirs)
    ours = of_ours(PolicyLoss(**settings), columns, mask)
    assert ours[0] == pytest.approx(value, rel=1e-6)
    assert ours[1] == pytest.approx(gradient, rel=1e-5, abs=1e-9)
    names = {"entropy"} | ({"kl"} if "beta" in settings else set())
    if (
        settings.get("importance_sampling_level") != "sequence"
    ):  # there TRL's clip ratios are means of samples
        clipped = "cispo_clip_ratio" if settings["loss_type"] == "cispo" else "clip_ratio/region_mean"
        names |= {name for name in metrics if name.startswith(("clip_ratio/", "cispo"))} - EXTREMES
        assert metrics[clipped] > 0 or settings.get("epsilon_high") == 5.0
    for key in names:
        assert ours[2][key] == pytest.approx(metrics[key], rel=1e-5), key


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_of_rloo_equal_trls(seed: int) -> None:
    from trl import RLOOTrainer

    columns, mask = off_policy_batch(seed), np.ones(sum(LENGTHS), bool)
    # near the old policy, or every trajectory is clipped: log-ratios add up over tokens
    columns["old_logps"] = columns["logps"] + (columns["old_logps"] - columns["logps"]) / 10
    value, gradient, _ = of_trl(RLOOTrainer, columns, mask)
    loss = PolicyLoss(loss_type="grpo", importance_sampling_level="trajectory")
    ours = of_ours(loss, columns, mask)
    assert ours[0] == pytest.approx(value, rel=1e-6)
    assert ours[1] == pytest.approx(gradient, rel=1e-5, abs=1e-9)
    assert np.abs(gradient).max() > 0
