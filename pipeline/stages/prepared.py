"""A stage made ready: its data as tokens, its order of rows, its loss, and what identifies its result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from actors.errors import UserError, attempt
from actors.models.turn_ends import turn_ends, vocab_size
from pipeline.data.reading.layouts import Kind
from pipeline.data.reading.records import Records, load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.kto_pairs import with_mismatched
from pipeline.data.tokens.prompts import PromptData, read_prompts
from pipeline.data.tokens.tokenize import EncodedRows, TokenizedData, encode_rows, tokenize
from pipeline.environments.prepared import Conversing, conversing_prompts
from pipeline.monitoring.phases import phase
from pipeline.stages.specs.registry import (
    NamedStage,
    OfflineStage,
    OnlineStage,
    StageSpec,
)

if TYPE_CHECKING:
    from actors.algorithms import Loss
    from actors.batches import Batch, SamplingSpec


@dataclass
class PreparedStage:
    """An offline stage made ready: data + loss, which are all that distinguishes one from another."""

    online: ClassVar[Literal[False]] = False

    name: str
    spec: OfflineStage
    seed: int
    data: TokenizedData
    eval_data: TokenizedData | None
    order: BatchOrder
    """Rows of each optimizer step; a pure function of the seed, so resuming is starting at step k."""
    loss: Loss

    @property
    def total_steps(self) -> int:
        return len(self.order)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest batch that these rows could make."""
        return self.spec.batch_size * self.data.sequences.sequences_per_row * int(self.data.lengths.max())

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

    online: ClassVar[Literal[True]] = True

    name: str
    spec: OnlineStage
    seed: int
    data: PromptData
    order: BatchOrder
    """Prompts of each step; a pure function of the seed, so resuming is starting at step k."""
    sampling: SamplingSpec
    """Request to the engines, with all that ends a turn."""
    added_ends: tuple[int | str, ...] = ()
    """Tokens and texts that end a turn by the template and not by the base (`TurnEnds.added`)."""
    eval_data: None = None
    conversing: Conversing | None = None
    """Conversations with an environment or tools; None: a sample is one turn."""

    @property
    def total_steps(self) -> int:
        return len(self.order)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that there can be: the longest prompt, and all of an answer."""
        prompt = max(map(len, self.data.token_ids)) if self.conversing is None else self.conversing.room
        return prompt + self.spec.max_completion_length

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole stage: what the learning-rate schedule runs over."""
        return self.updates_before(self.total_steps)

    @property
    def critic_warmup_steps(self) -> int:
        """Steps at the start in which only a critic learns."""
        critic = self.spec.critic
        return 0 if critic is None else min(critic.critic_warmup_steps, self.total_steps)

    def updates_before(self, step: int) -> int:
        """Optimizer steps over the samples of all steps before `step`; the last step of an epoch may have
        fewer prompts than the others where the order doesn't fill it up."""
        epochs, rest = divmod(step, self.order.steps_per_epoch)
        whole = last = self._updates(self.order.batch_size)
        if not self.order.whole:
            last = self._updates(self.order.n_rows % self.order.batch_size or self.order.batch_size)
        return epochs * (whole * (self.order.steps_per_epoch - 1) + last) + rest * whole

    def _updates(self, prompts: int) -> int:
        samples = prompts * self.spec.num_generations
        return -(-samples // self.spec.batch_size) * self.spec.num_iterations

    def epoch(self, step: int) -> float:
        """Passes over the prompts after `step` steps."""
        return self.order.epoch(step)


Prepared = PreparedStage | PreparedRl


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
        self, records: Records, spec: OfflineStage, tokenizer: Any, vocab_size: int | None
    ) -> TokenizedData:
        """Rows as the stage's kind of tokens. `vocab_size`: rows of the base's embedding.

        Raises:
            UserError: every row that the template or `max_length` refuses.
        """
        train_on = spec.tokens_trained
        key = id(records), train_on
        encoded = self._encoded.pop(key, None) or encode_rows(records, tokenizer, train_on)
        self._asked[id(records)] -= 1
        if self._asked[id(records)] > 0:  # Another stage will want them; else they would only take memory.
            self._encoded[key] = encoded
        return tokenize(
            records,
            tokenizer,
            kind=spec.records,
            max_length=spec.max_length,
            truncation=spec.truncation_mode,
            train_on=train_on,
            scored=spec.scores_pairs,
            encoded=encoded,
            vocab_size=vocab_size,
        )


def read_records(stage: NamedStage, reader: Reader | None = None) -> StageRecords:
    """Read a stage's rows.

    Raises:
        UserError: every row and source that can't be used, of its data and of its eval_data.
    """
    phase(f"{stage.name}: reading its data")
    reader = reader or Reader()
    spec, seed = stage.spec, stage.seed
    problems: list[str] = []
    train = attempt(problems, "", reader.records, spec.data, spec.records, seed)
    held_out = None
    if sources := spec.eval_data:
        where = f"stages.{stage.name}.eval_data"
        held_out = attempt(problems, where, reader.records, sources, spec.records, seed)
    if train is None or problems:
        raise UserError(problems)
    return StageRecords(train, held_out)


def prepare(
    stage: NamedStage,
    tokenizer: Any,
    records: StageRecords | None = None,
    reader: Reader | None = None,
) -> Prepared:
    """Tokenise a stage's rows (read here unless given) and lay out its steps. `reader`: has read them."""
    reader = reader or Reader()
    spec = stage.spec
    records = records or read_records(stage, reader)
    phase(f"{stage.name}: tokenizing {len(records.train):,} rows")
    if spec.online:
        return _prepare_rl(stage, spec, tokenizer, records)
    known = vocab_size(stage.base)
    problems: list[str] = []
    data = attempt(problems, "", reader.tokens, records.train, spec, tokenizer, known)
    held_out = None
    if (rows := records.held_out) is not None:
        where = f"stages.{stage.name}.eval_data"
        held_out = attempt(problems, where, reader.tokens, rows, spec, tokenizer, known)
    if data is None or problems:
        raise UserError(problems)
    order = _order(spec, data.n_rows, spec.batch_size, stage.seed)
    if spec.needs_mismatched:
        data, held_out = _mismatched(spec, data, held_out, order)
    return PreparedStage(stage.name, spec, stage.seed, data, held_out, order, spec.loss())


def _mismatched(
    spec: OfflineStage, data: TokenizedData, held_out: TokenizedData | None, order: BatchOrder
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


def _prepare_rl(named: NamedStage, spec: OnlineStage, tokenizer: Any, records: StageRecords) -> PreparedRl:
    name, seed, ends = named.name, named.seed, turn_ends(tokenizer, named.base)
    sampling = ends.sampling(spec.sampling(), tokenizer, f"stages.{name}")
    known = vocab_size(named.base)
    talks, train = None, records.train
    if spec.converses:
        where = f"stages.{name}"
        data, talks = conversing_prompts(
            spec, where, train, tokenizer, sampling, key=f"{where}.data", longest=spec.room, known=known
        )
    else:
        data = read_prompts(train, tokenizer, max_prompt_tokens=spec.room, vocab_size=known)
    order = _order(spec, data.n_rows, spec.prompts_per_step, seed)
    stage = PreparedRl(name, spec, seed, data, order, sampling, ends.added, conversing=talks)
    warm = 0 if spec.critic is None else spec.critic.critic_warmup_steps
    if warm >= stage.total_steps:
        raise UserError(
            f"stages.{name}.critic_warmup_steps: only the critic learns in the first {warm} steps, and there "
            f"are {stage.total_steps}: the policy would never learn; lower it, or raise num_train_epochs"
        )
    return stage


def _order(spec: StageSpec, n_rows: int, rows_per_step: int, seed: int) -> BatchOrder:
    """Steps of a stage. Online every step is as wide as the others: the learning rate is for so many samples,
    and a step costs what its longest sample does. Offline the last one is shorter, as TRL's is."""
    return BatchOrder(
        n_rows,
        rows_per_step,
        seed,
        epochs=spec.num_train_epochs,
        max_steps=spec.max_steps,
        shuffle=spec.shuffle,
        whole=spec.online,
    )
