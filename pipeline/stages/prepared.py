"""A stage made ready: its data as tokens, its order of rows, its loss, and what identifies its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.layouts import Kind
from pipeline.data.order import BatchOrder
from pipeline.data.records import Records, load_records
from pipeline.data.tokens import TokenizedData, tokenize
from pipeline.stages.spec import DpoStage, SftStage, StageSpec

if TYPE_CHECKING:
    from actors.algorithms.base import Loss

    from actors.batch import Batch
    from pipeline.config.schema import RunConfig

KINDS: dict[type[StageSpec], Kind] = {SftStage: "sft", DpoStage: "preference"}
"""Which records each stage type reads."""


@dataclass
class PreparedStage:
    """Data + loss: everything that distinguishes one training stage from another."""

    name: str
    spec: StageSpec
    seed: int
    data: TokenizedData
    eval_data: TokenizedData | None
    order: BatchOrder
    """Rows of each optimizer step; a pure function of the seed, so resuming is starting at step k."""
    loss: Loss

    @property
    def total_steps(self) -> int:
        return len(self.order)

    def batch(self, step: int) -> Batch:
        """The global batch of one optimizer step."""
        return self.data.batch(self.order[step])

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return self.order.epoch(step)

    def eval_batches(self) -> list[tuple[np.ndarray, Batch]]:
        """Held-out rows in order, in batches of the training size."""
        if self.eval_data is None:
            return []
        rows = np.arange(self.eval_data.n_rows)
        chunks = [rows[i : i + self.spec.batch_size] for i in range(0, len(rows), self.spec.batch_size)]
        return [(chunk, self.eval_data.batch(chunk)) for chunk in chunks]


def make_loss(spec: StageSpec) -> Loss:
    """The loss of a stage, from its own settings."""
    from actors.algorithms.dpo import DpoLoss
    from actors.algorithms.sft import SftLoss

    if isinstance(spec, DpoStage):
        return DpoLoss(**{name: getattr(spec, name) for name in DpoLoss.model_fields})
    return SftLoss()


@dataclass(frozen=True)
class StageRecords:
    """A stage's rows as they were read, before any tokenizer."""

    train: Records
    held_out: Records | None


def read_records(config: RunConfig, name: str) -> StageRecords:
    """Read a stage's rows.

    Raises:
        UserError: every row and source that can't be used.
    """
    spec, seed = config.stages[name], config.seed_of(name)
    kind = KINDS[type(spec)]
    held_out = load_records(spec.eval_data, kind, seed=seed) if spec.eval_data else None
    return StageRecords(load_records(spec.data, kind, seed=seed), held_out)


def to_tokens(records: Records, spec: StageSpec, tokenizer: Any) -> TokenizedData:
    """Rows as the stage's kind of tokens.

    Raises:
        UserError: every row that the template or `max_length` refuses.
    """
    return tokenize(
        records,
        tokenizer,
        kind=KINDS[type(spec)],
        max_length=spec.max_length,
        truncation=spec.truncation_mode,
        train_on=spec.train_on if isinstance(spec, SftStage) else "answer",
    )


def prepare(
    config: RunConfig, name: str, tokenizer: Any, records: StageRecords | None = None
) -> PreparedStage:
    """Tokenise a stage's rows (read here unless given) and lay out its steps."""
    spec, seed = config.stages[name], config.seed_of(name)
    records = records or read_records(config, name)
    data = to_tokens(records.train, spec, tokenizer)
    held_out = to_tokens(records.held_out, spec, tokenizer) if records.held_out is not None else None
    order = BatchOrder(
        data.n_rows,
        spec.batch_size,
        seed,
        epochs=spec.num_train_epochs,
        max_steps=spec.max_steps,
        shuffle=spec.shuffle,
    )
    return PreparedStage(name, spec, seed, data, held_out, order, make_loss(spec))
