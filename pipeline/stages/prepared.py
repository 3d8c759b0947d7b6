"""A stage made ready: its data as tokens, its order of rows, its loss, and what identifies its result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.errors import UserError
from actors.models.turn_ends import TurnEnds, turn_ends, vocab_size
from pipeline.data.reading.layouts import Kind
from pipeline.data.reading.records import Records, load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.kto_pairs import with_mismatched
from pipeline.data.tokens.order import BatchOrder
from pipeline.data.tokens.prompts import PromptData, read_prompts
from pipeline.data.tokens.tokens import EncodedRows, TokenizedData, encode_rows, tokenize
from pipeline.stages.specs.registry import (
    DpoStage,
    GrpoStage,
    KtoStage,
    OnlineDpoStage,
    PpoStage,
    ReinforcePpStage,
    RewardStage,
    RlooStage,
    RlStage,
    SftStage,
    StageSpec,
)

if TYPE_CHECKING:
    from actors.algorithms.loss import Loss
    from actors.batches.batch import Batch
    from actors.batches.generations import SamplingSpec
    from pipeline.config.run_config import RunConfig

KINDS: dict[type[StageSpec], Kind] = {
    SftStage: "sft",
    RewardStage: "preference",
    DpoStage: "preference",
    KtoStage: "unpaired",
    PpoStage: "prompt",
    GrpoStage: "prompt",
    RlooStage: "prompt",
    ReinforcePpStage: "prompt",
    OnlineDpoStage: "prompt",
}
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


@dataclass
class PreparedRl:
    """An online stage made ready: its prompts, and which of them each step samples from."""

    name: str
    spec: RlStage
    seed: int
    data: PromptData
    order: BatchOrder
    """Prompts of each step; a pure function of the seed, so resuming is starting at step k."""
    sampling: SamplingSpec
    """What the engines are asked for, with all that ends a turn."""
    added_ends: tuple[int | str, ...] = ()
    """Tokens and texts that end a turn by the template and not by the base (`TurnEnds.added`)."""
    eval_data: None = None

    @property
    def total_steps(self) -> int:
        return len(self.order)

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole stage: what the learning-rate schedule runs over."""
        return self.updates_before(self.total_steps)

    @property
    def critic_warmup_steps(self) -> int:
        """Steps at the start in which only a critic learns."""
        return min(getattr(self.spec, "critic_warmup_steps", 0), self.total_steps)

    def updates_before(self, step: int) -> int:
        """Optimizer steps over the samples of all steps before `step`; the last step of an epoch may have
        fewer prompts than the others."""
        epochs, rest = divmod(step, self.order.steps_per_epoch)
        whole = self._updates(self.order.batch_size)
        last = self._updates(self.order.n_rows % self.order.batch_size or self.order.batch_size)
        return epochs * (whole * (self.order.steps_per_epoch - 1) + last) + rest * whole

    def _updates(self, prompts: int) -> int:
        samples = prompts * self.spec.num_generations
        return -(-samples // self.spec.batch_size) * self.spec.num_iterations

    def epoch(self, step: int) -> float:
        """Passes over the prompts after `step` steps."""
        return self.order.epoch(step)


Prepared = PreparedStage | PreparedRl


def make_loss(spec: StageSpec) -> Loss:
    """The loss of an offline stage, from its own settings."""
    from actors.algorithms.dpo import DpoLoss
    from actors.algorithms.kto import KtoLoss
    from actors.algorithms.reward import RewardLoss
    from actors.algorithms.sft import SftLoss

    if isinstance(spec, DpoStage):
        return DpoLoss(**{name: getattr(spec, name) for name in DpoLoss.model_fields})
    if isinstance(spec, KtoStage):
        return KtoLoss(**{name: getattr(spec, name) for name in KtoLoss.model_fields})
    if isinstance(spec, RewardStage):
        return RewardLoss(center_rewards_coefficient=spec.center_rewards_coefficient)
    return SftLoss()


@dataclass(frozen=True)
class StageRecords:
    """A stage's rows as they were read, before any tokenizer."""

    train: Records
    held_out: Records | None


class Reader:
    """Reads rows, and makes tokens of them, once for all stages of a run that train on the same ones: a
    reward model and DPO do, as a rule."""

    def __init__(self) -> None:
        self._records: dict[str, Records] = {}
        self._asked: Counter[int] = Counter()
        """Times that rows were asked for, by the identity of the records."""
        self._encoded: dict[tuple[int, str], EncodedRows] = {}

    def records(self, sources: Sequence[DataSpec], kind: Kind, seed: int) -> Records:
        """Rows of a mixture.

        Raises:
            UserError: every row and source that can't be used.
        """
        key = json.dumps([[spec.model_dump(mode="json") for spec in sources], kind, seed])
        if key not in self._records:
            self._records[key] = load_records(sources, kind, seed=seed)
        found = self._records[key]
        self._asked[id(found)] += 1
        return found

    def tokens(
        self, records: Records, spec: StageSpec, tokenizer: Any, vocab_size: int | None
    ) -> TokenizedData:
        """Rows as the stage's kind of tokens. `vocab_size`: rows of the base's embedding.

        Raises:
            UserError: every row that the template or `max_length` refuses.
        """
        train_on = spec.train_on if isinstance(spec, SftStage) else "answer"
        key = id(records), train_on
        encoded = self._encoded.pop(key, None) or encode_rows(records, tokenizer, train_on)
        self._asked[id(records)] -= 1
        if self._asked[id(records)] > 0:  # Another stage will want them; else they would only take memory.
            self._encoded[key] = encoded
        return tokenize(
            records,
            tokenizer,
            kind=KINDS[type(spec)],
            max_length=spec.max_length,
            truncation=spec.truncation_mode,
            train_on=train_on,
            scored=isinstance(spec, RewardStage),
            encoded=encoded,
            vocab_size=vocab_size,
        )


def read_records(config: RunConfig, name: str, reader: Reader | None = None) -> StageRecords:
    """Read a stage's rows.

    Raises:
        UserError: every row and source that can't be used.
    """
    reader = reader or Reader()
    spec, seed = config.stages[name], config.seed_of(name)
    kind = KINDS[type(spec)]
    held_out = reader.records(spec.eval_data, kind, seed) if spec.eval_data else None
    return StageRecords(reader.records(spec.data, kind, seed), held_out)


def prepare(
    config: RunConfig,
    name: str,
    tokenizer: Any,
    records: StageRecords | None = None,
    reader: Reader | None = None,
) -> Prepared:
    """Tokenise a stage's rows (read here unless given) and lay out its steps. `reader`: has read them."""
    reader = reader or Reader()
    spec, seed = config.stages[name], config.seed_of(name)
    records = records or read_records(config, name, reader)
    if isinstance(spec, RlStage):
        return _prepare_rl(config, name, tokenizer, records)
    known = vocab_size(config.model.base)
    data = reader.tokens(records.train, spec, tokenizer, known)
    held_out = None
    if records.held_out is not None:
        held_out = reader.tokens(records.held_out, spec, tokenizer, known)
    order = _order(spec, data.n_rows, spec.batch_size, seed)
    if isinstance(spec, KtoStage) and spec.loss_type == "kto":
        data, held_out = _mismatched(spec, data, held_out, order)
    return PreparedStage(name, spec, seed, data, held_out, order, make_loss(spec))


def _mismatched(
    spec: KtoStage, data: TokenizedData, held_out: TokenizedData | None, order: BatchOrder
) -> tuple[TokenizedData, TokenizedData | None]:
    """Rows with their mismatched answers, paired along the batches of the first epoch."""
    if data.n_rows < 2:
        raise UserError("kto needs two rows at least: its reference point is made of the others' answers")
    first = (order[step] for step in range(min(len(order), order.steps_per_epoch)))
    data = with_mismatched(data, first, spec.max_length)
    if held_out is None:
        return data, None
    rows = np.arange(held_out.n_rows)
    chunks = (rows[i : i + spec.batch_size] for i in range(0, len(rows), spec.batch_size))
    return data, with_mismatched(held_out, chunks, spec.max_length)


def ends_of(config: RunConfig, tokenizer: Any) -> TurnEnds:
    """What ends a turn in a run."""
    return turn_ends(tokenizer, config.model.base)


def _prepare_rl(config: RunConfig, name: str, tokenizer: Any, records: StageRecords) -> PreparedRl:
    spec, seed, ends = config.stages[name], config.seed_of(name), ends_of(config, tokenizer)
    assert isinstance(spec, RlStage)
    sampling = ends.sampling(spec.sampling(), tokenizer, f"stages.{name}")
    room = None if spec.max_length is None else spec.max_length - spec.max_completion_length
    known = vocab_size(config.model.base)
    data = read_prompts(records.train, tokenizer, max_prompt_tokens=room, vocab_size=known)
    order = _order(spec, data.n_rows, spec.prompts_per_step, seed)
    stage = PreparedRl(name, spec, seed, data, order, sampling, ends.added)
    warm = getattr(spec, "critic_warmup_steps", 0)
    if warm >= stage.total_steps:
        raise UserError(
            f"stages.{name}.critic_warmup_steps: only the critic learns in the first {warm} steps, and there "
            f"are {stage.total_steps}: the policy would never learn; lower it, or raise num_train_epochs"
        )
    return stage


def _order(spec: StageSpec, n_rows: int, rows_per_step: int, seed: int) -> BatchOrder:
    return BatchOrder(
        n_rows,
        rows_per_step,
        seed,
        epochs=spec.num_train_epochs,
        max_steps=spec.max_steps,
        shuffle=spec.shuffle,
    )
