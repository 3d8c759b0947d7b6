"""Objectives of online stages: from samples to the rows that a loss reads, the loss, the first check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from actors.algorithms import DistillLoss, KlController, OnlineDpoLoss, PolicyLoss
from actors.algorithms import checks as rl_checks
from pipeline.stages.checks import check_first_step
from pipeline.stages.online.estimates import Estimates, TokenScores, estimate, teacher_tokens
from pipeline.stages.online.preference_pairs import pairs_of
from pipeline.stages.specs.registry import OnlineDpoStage, OnlineStage, PolicyGradientStage

if TYPE_CHECKING:
    from actors.algorithms import Loss
    from actors.batches import Batch


class Objective(ABC):
    """One algorithm's part in a step of the online loop. Pure: it holds the stage's settings and no state."""

    @abstractmethod
    def kl_controller(self) -> KlController:
        """beta at the start of the stage, and how it moves."""

    @abstractmethod
    def needs_reference(self, step: int) -> bool:
        """The reference is asked about this step's samples."""

    @property
    def teacher_top_k(self) -> int | None:
        """Most probable tokens that the reference is asked for in place of each sampled one; None: not at
        all."""
        return None

    @property
    def on_policy(self) -> bool:
        """The update itself can find the log-probabilities of the policy that sampled, and nothing before it
        reads them."""
        return False

    @abstractmethod
    def estimate(self, batch: Batch, rewards: np.ndarray, scores: TokenScores, beta: float) -> Estimates:
        """From rewards, float64 (samples,), to the rows that the loss reads."""

    @abstractmethod
    def loss(self, beta: float, dtype: str) -> Loss:
        """The policy's loss at the present KL coefficient; `dtype`: of the policy."""

    @abstractmethod
    def minibatches(self, rows: int, samples: int, seed: int, step: int) -> list[np.ndarray]:
        """Rows of every optimizer step: each iteration goes through all of them, in an order of its own.

        Args:
            rows: of the estimates' batch.
            samples: that they were made of; their number decides how many optimizer steps there are.
        """

    @abstractmethod
    def check_first(self, metrics: Mapping[str, float], dtype: str, at_reference: bool) -> None:
        """Hold the first update of a step against what is known of it beforehand.

        Args:
            metrics: of that update.
            dtype: of the base.
            at_reference: the policy is still the reference: the first step of a stage that starts there.

        Raises:
            InvariantViolation: the policy that trains is not the one that was asked about the samples.
        """


class PolicyGradient(Objective):
    """Advantages of tokens, ratios to the policy that the step started with."""

    def __init__(self, spec: PolicyGradientStage) -> None:
        self.spec = spec

    def kl_controller(self) -> KlController:
        return KlController(self.spec.beta, self.spec.kl_target, self.spec.kl_horizon)

    def needs_reference(self, step: int) -> bool:
        # At step 0 for the check that policy and reference are the same.
        return self.spec.beta > 0 or step == 0

    def estimate(self, batch: Batch, rewards: np.ndarray, scores: TokenScores, beta: float) -> Estimates:
        return estimate(self.spec, batch, rewards, scores, beta)

    @property
    def on_policy(self) -> bool:
        spec = self.spec
        return spec.updates_per_step == 1 and spec.beta == 0 and not spec.staleness and not spec.corrected

    def loss(self, beta: float, dtype: str) -> Loss:
        return PolicyLoss.from_settings(
            self.spec,
            beta=self._in_loss(beta),
            on_policy=self.on_policy,
            ratio_tolerance=rl_checks.RATIO_TOLERANCE[dtype],
        )

    def _in_loss(self, beta: float) -> float:
        return beta if self.spec.kl_in == "loss" else 0.0

    def minibatches(self, rows: int, samples: int, seed: int, step: int) -> list[np.ndarray]:
        size = self.spec.batch_size
        orders = [_order(seed, step, i, rows) for i in range(self.spec.num_iterations)]
        return [np.sort(order[i : i + size]) for order in orders for i in range(0, rows, size)]

    def check_first(self, metrics: Mapping[str, float], dtype: str, at_reference: bool) -> None:
        # A step that takes the log-probabilities of its own pass has none that were stored before.
        stored = not self.on_policy or "ratio/beyond" in metrics
        if stored and not self.spec.clips_to_engine:
            rl_checks.check_first_ratio(metrics, rl_checks.RATIO_TOLERANCE[dtype])


class TeacherTopK(PolicyGradient):
    """The divergence from a teacher itself, over its most probable next tokens on the policy's samples."""

    @property
    def teacher_top_k(self) -> int | None:
        return self.spec.top_k_asked

    def kl_controller(self) -> KlController:
        return KlController(self.spec.beta)

    def needs_reference(self, step: int) -> bool:
        return True

    @property
    def on_policy(self) -> bool:
        return False

    def estimate(self, batch: Batch, rewards: np.ndarray, scores: TokenScores, beta: float) -> Estimates:
        return teacher_tokens(self.spec, batch, scores)

    def loss(self, beta: float, dtype: str) -> Loss:
        return DistillLoss.from_settings(self.spec, ratio_tolerance=rl_checks.RATIO_TOLERANCE[dtype])

    def check_first(self, metrics: Mapping[str, float], dtype: str, at_reference: bool) -> None:
        rl_checks.check_first_ratio(metrics, rl_checks.RATIO_TOLERANCE[dtype])


class PreferencePairs(Objective):
    """Online DPO: of each prompt's samples the best and the worst, as a pair."""

    def __init__(self, spec: OnlineDpoStage) -> None:
        self.spec = spec

    def kl_controller(self) -> KlController:
        return KlController(self.spec.beta)

    def needs_reference(self, step: int) -> bool:
        return True

    def estimate(self, batch: Batch, rewards: np.ndarray, scores: TokenScores, beta: float) -> Estimates:
        return pairs_of(self.spec, batch, rewards, scores)

    def loss(self, beta: float, dtype: str) -> OnlineDpoLoss:
        return OnlineDpoLoss.from_settings(self.spec)

    def minibatches(self, rows: int, samples: int, seed: int, step: int) -> list[np.ndarray]:
        # Always as many, as even as can be: the schedule runs over optimizer steps, whatever number of pairs
        # there is. A step without a pair has no gradient.
        steps = -(-samples // self.spec.batch_size)
        orders = [_order(seed, step, i, rows) for i in range(self.spec.num_iterations)]
        return [np.sort(part) for order in orders for part in np.array_split(order, steps)]

    def check_first(self, metrics: Mapping[str, float], dtype: str, at_reference: bool) -> None:
        if at_reference:
            check_first_step(self.spec.type, self.loss(self.spec.beta, dtype), metrics, dtype)


def objective_of(spec: OnlineStage) -> Objective:
    """The objective of a stage's type."""
    if spec.learns_from == "pairs":
        return PreferencePairs(spec)
    return PolicyGradient(spec) if spec.top_k_asked is None else TeacherTopK(spec)


def _order(seed: int, step: int, iteration: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, step, iteration]).permutation(rows)
