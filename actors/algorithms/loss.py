"""Base class of losses: their input and their result.

A loss is a small frozen spec, so that it travels to every rank, and a pure function of per-token
log-probabilities. It divides by totals of the *global* batch: the values and gradients of
micro-batches and ranks then simply add up, whatever the split.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from actors.batches.batch import Batch
from actors.batches.generations import possible_temperature
from actors.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import torch

Totals = dict[str, float]
MetricSums = dict[str, tuple["torch.Tensor", "torch.Tensor | float"]]
"""Metric name -> (sum, weight) over the tokens or rows seen; the mean is sum / weight over all
ranks. Weight 0 marks a share of a global value (a loss term): shares add up and are not divided.
Weight `LARGEST` or `SMALLEST` marks an extreme: see `largest` and `smallest`."""
LARGEST, SMALLEST = math.inf, -math.inf


@dataclass(frozen=True)
class TokenView:
    """The counted tokens of some rows, as tensors on one device; T tokens, S sequences, R rows."""

    logps: torch.Tensor
    """float32 (T,): log-probability of each counted label, with gradient while training. For a loss that
    reads values or scores this and the other statistics of logits are zeros: no logits are made."""
    sequence: torch.Tensor
    """int64 (T,), non-decreasing: the sequence that each token belongs to."""
    n_sequences: int
    entropy: torch.Tensor
    """float32 (T,): entropy in nats of the predicting distribution; with gradient only for a loss that
    asks for it."""
    correct: torch.Tensor
    """bool (T,): the label was the most likely token."""
    mean_logits: torch.Tensor
    """float32 (T,): mean over the vocabulary of the predicting logits."""
    log_sum_sq: torch.Tensor
    """float32 (T,): log of the sum over the vocabulary of squared probabilities."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per-row values (R, ...) as the batch has them, e.g. the reference's log-probabilities in float64."""
    sequences_per_row: int = 1
    token_columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values per counted token (T,) as the batch has them, e.g. advantages."""
    values: torch.Tensor | None = None
    """float32 (T,): the value head's output at the state before each counted token, with gradient; only
    for a loss that reads values."""
    scores: torch.Tensor | None = None
    """float32 (S,): the score head's output at each sequence's last token, with gradient; only for a loss
    that reads scores."""
    further_logps: torch.Tensor | None = None
    """float32 (T, k): log-probabilities, with gradient, of the tokens that `Loss.further_tokens` names; None
    where it names none."""

    @property
    def n_rows(self) -> int:
        return self.n_sequences // self.sequences_per_row

    def counts(self) -> torch.Tensor:
        """int64 (S,): counted tokens per sequence."""
        return self.sequence.bincount(minlength=self.n_sequences)

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """(T,) -> (S,): sums over each sequence's tokens."""
        return values.new_zeros(self.n_sequences).index_add(0, self.sequence, values)


def largest(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Metric entry for the largest of all values on all ranks; -inf where there are none."""
    return (values.detach().amax() if values.numel() else values.new_tensor(-math.inf)), LARGEST


def smallest(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Metric entry for the smallest of all values on all ranks; inf where there are none."""
    return (values.detach().amin() if values.numel() else values.new_tensor(math.inf)), SMALLEST


class SamplingTemperature(Spec):
    """Temperature of sampling, for whoever computes log-probabilities of the samples."""

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the logits while sampling, and in the trainer's log-probabilities; 0.01 to 2, as vLLM's."""

    @field_validator("temperature")
    @classmethod
    def _possible(cls, value: float) -> float:
        return possible_temperature(value, greedy=False)

    @property
    def logit_temperature(self) -> float:
        """Logits are divided by it before log-probabilities are taken."""
        return self.temperature


class Loss(Spec, ABC):
    """A loss over token log-probabilities, values or scores: spec and function in one.

    What a user can set of a loss is declared once, in a settings class that the loss and the spec of its
    stages inherit.
    """

    model_config = ConfigDict(frozen=True)

    uses_dropout: ClassVar[bool] = True
    """Dropout stays on in training. Preference losses compare with a reference: off."""

    reads: ClassVar[Literal["logps", "values", "scores"]] = "logps"
    """Input of the loss: token log-probabilities, a value head, or a score head."""

    further_tokens: ClassVar[str | None] = None
    """Token column (T, k) of ids whose log-probabilities the loss reads beside those of the labels."""

    gradient_may_vanish: ClassVar[bool] = False
    """A step without any gradient can be right, as where all advantages of a batch are zero."""

    def loss_problems(self) -> Iterable[tuple[str, str]]:
        """Settings that don't go together: (key, what is wrong with it)."""
        return ()

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        problems = [f"{key} {message}" for key, message in self.loss_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def needs_entropy_gradient(self) -> bool:
        """The loss holds the entropy itself, so that `TokenView.entropy` must carry a gradient."""
        return False

    @property
    def logit_temperature(self) -> float:
        """Logits are divided by it before log-probabilities are taken: RL's sampling temperature."""
        return 1.0

    @property
    def separable(self) -> bool:
        """True if the loss is a sum over rows, given the totals of the global batch.

        A loss that is not (one that sorts the batch) is computed once over all rows of all ranks.
        """
        return True

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns, per row or per counted token, that a batch must carry."""
        return ()

    def completed(self, batch: Batch, logprobs: Callable[[Batch], np.ndarray]) -> Batch:
        """The batch that the loss runs over, where that takes something of the policy as it is now.

        Args:
            batch: as it came to the host.
            logprobs: float64 (sequences,) of a batch by the policy, without gradient.
        """
        return batch

    def check(self, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step before the weights move.

        Raises:
            InvariantViolation: they must not move.
        """
        return

    @abstractmethod
    def totals(self, batch: Batch) -> Totals:
        """Divisors of the loss, counted over the global batch."""

    @abstractmethod
    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        """Loss of these rows as a share of the global batch (a scalar), and metric sums."""
