"""Importance ratios between the engine that drew and the policy that trains: literals, and TRL's own code."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any

import numpy as np
import pytest
import torch

from actors.algorithms.importance_sampling import (
    Correction,
    CorrectionMode,
    CorrectionSettings,
    importance_ratios,
)

LOG2 = float(np.log(2.0))
OFFSETS = np.array([0, 2, 5])
ENGINE = np.full(5, -2.0)
# Ratios of the tokens: 2, 1/2 | 4, 2, 1 (so 1 and 8 of the samples).
LOGPS = ENGINE + LOG2 * np.array([1.0, -1.0, 2.0, 1.0, 0.0])
ALL = np.ones(5, bool)

CASES: dict[str, tuple[Correction, list[float], float]] = {
    "truncated tokens": (Correction("token_truncate", 3.0), [2, 0.5, 3, 2, 1], 0.0),
    "truncated tokens, below too": (Correction("token_truncate", 3.0, 0.8), [2, 0.8, 3, 2, 1], 0.0),
    "IcePop": (Correction("token_mask", 3.0, 0.8), [2, 0, 0, 2, 1], 0.4),
    "truncated samples": (Correction("sequence_truncate", 3.0), [1, 1, 3, 3, 3], 0.0),
    "masked samples": (Correction("sequence_mask", 3.0), [1, 1, 0, 0, 0], 0.6),
    "masked below only": (Correction("token_mask", None, 0.8), [2, 0, 4, 2, 1], 0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_ratios_are_bounded_as_the_mode_says(case: str) -> None:
    how, expected, masked = CASES[case]
    found = importance_ratios(LOGPS, ENGINE, OFFSETS, ALL, how)
    np.testing.assert_allclose(found.ratio, expected, rtol=1e-12)
    assert found.metrics["sampling/masked"] == pytest.approx(masked)
    assert found.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(LOG2)
    assert found.metrics["sampling/sampling_logp_difference/max"] == pytest.approx(2 * LOG2)


def test_means_are_over_tokens_or_over_samples() -> None:
    """TRL's way: a sample's ratio counts once, however long the sample is."""
    of_tokens = importance_ratios(LOGPS, ENGINE, OFFSETS, ALL, Correction("token_truncate", 3.0)).metrics
    of_samples = importance_ratios(LOGPS, ENGINE, OFFSETS, ALL, Correction("sequence_truncate", 3.0)).metrics
    assert of_tokens["sampling/importance_sampling_ratio/mean"] == pytest.approx(8.5 / 5)
    assert of_samples["sampling/importance_sampling_ratio/mean"] == pytest.approx((1 + 3) / 2)


def test_masked_tokens_add_nothing_to_their_sample() -> None:
    mask = np.array([True, False, True, True, True])
    found = importance_ratios(LOGPS, ENGINE, OFFSETS, mask, Correction("sequence_truncate", 3.0))
    np.testing.assert_allclose(found.ratio, [2, 2, 3, 3, 3])


def test_samples_of_the_policy_itself_have_ratios_of_1() -> None:
    found = importance_ratios(ENGINE, ENGINE, OFFSETS, ALL, CorrectionSettings().correction())
    assert found.ratio.tolist() == [1.0] * 5
    assert found.metrics["sampling/masked"] == 0


@pytest.mark.trl
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 2.0), (0.7, None)])
def test_ratios_are_trls(mode: CorrectionMode, low: float | None, high: float | None) -> None:
    """Its formula stands in the middle of a long method; that block of its source is run on our arrays."""
    rng = np.random.default_rng(0)
    lengths, longest = [3, 7, 1, 5], 7
    offsets = np.cumsum([0, *lengths])
    engine, logps = rng.normal(-2, 0.3, (2, offsets[-1]))
    padded_mask = np.arange(longest) < np.array(lengths)[:, None]

    def padded(values: np.ndarray) -> torch.Tensor:
        full = np.zeros(padded_mask.shape)
        full[padded_mask] = values
        return torch.from_numpy(full)

    theirs = _trl_ratios(
        padded(logps), padded(engine), torch.from_numpy(padded_mask).double(), mode, low, high
    ).expand(padded_mask.shape)
    ours = importance_ratios(logps, engine, offsets, np.ones(offsets[-1], bool), Correction(mode, high, low))
    np.testing.assert_allclose(ours.ratio, theirs.numpy()[padded_mask], rtol=1e-12)


def _trl_ratios(
    logps: torch.Tensor,
    engine: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    low: float | None,
    high: float | None,
) -> torch.Tensor:
    from trl import GRPOTrainer

    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    blocks = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.use_vllm and self.vllm_importance_sampling_correction"
        and "per_sequence_logps_diff" in ast.unparse(node)
    ]
    assert len(blocks) == 1, "TRL computes its ratios elsewhere: look at GRPOTrainer"
    names: dict[str, Any] = {
        "self": types.SimpleNamespace(
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        ),
        "old_per_token_logps": logps,
        "sampling_per_token_logps": engine,
        "completion_mask": mask,
        "tool_mask": None,
        "torch": torch,
        "math": __import__("math"),
    }
    exec(ast.unparse(blocks[0]), names)
    ratios: torch.Tensor = names["vllm_importance_sampling_ratio"]
    return ratios
