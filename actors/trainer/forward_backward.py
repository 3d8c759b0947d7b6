"""One pass of a loss over a global batch: micro-batches forward and backward, and what ranks add up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actors.algorithms.logprob import LabelStatistics
from actors.algorithms.loss import Loss, TokenView, Totals
from actors.batches.batch import Batch
from actors.batches.packing import LayOut, MicroBatch, counted_places, in_bins, micro_batches, padded
from actors.batches.padding_free import lay_out_padding_free
from actors.batches.position_shares import PositionShare, position_share
from actors.models.moe.router_stats import RouterStats, aux_loss
from actors.trainer.process_groups import Ranks
from actors.trainer.sums import Sums
from actors.trainer.token_scorer import TokenScorer


class Outputs(NamedTuple):
    """Numbers of a micro-batch that a loss reads: statistics of logits, or a head's outputs and zeros."""

    statistics: LabelStatistics
    values: Tensor | None = None
    scores: Tensor | None = None
    further: Tensor | None = None


@dataclass(frozen=True)
class PassRunner:
    """Runs losses on one rank's share of global batches. The caller sets mode and adapter."""

    scorer: TokenScorer
    routers: RouterStats
    ranks: Ranks
    aux_coef: float
    """Weight of the routers' load-balancing loss; 0: none."""
    packing: bool
    max_tokens: int
    hidden_size: int
    seed: int
    device: torch.device
    head: nn.Linear | None = None
    """Head of the role that runs, for losses that read values or scores."""
    lockstep: bool = False
    """Ranks hold slices of the weights, so that each has to make as many passes as the others."""

    def shard(self, batch: Batch) -> tuple[np.ndarray, list[MicroBatch]]:
        """This rank's rows of a global batch, and the micro-batches made of them, or its part of each."""
        shares = self.shares_prompts
        rows = batch.shard_rows(self.ranks.share, self.ranks.shares, shares)
        own = batch if self.ranks.shares == 1 else batch.select(rows)
        most = self.max_tokens * self.ranks.sequence_parallel_size
        micros = micro_batches(own, most, self._lay_out(), shares)
        return rows, [self._own_positions(micro) for micro in micros]

    def _own_positions(self, micro: MicroBatch) -> MicroBatch:
        return position_share(micro, self.ranks.position_share, self.ranks.sequence_parallel_size)

    @property
    def shares_prompts(self) -> bool:
        """True where a prompt that several sequences share is computed once.

        Not with the auxiliary loss: TRL's averages over tokens, and has a shared prompt in each sequence.
        """
        return self.packing and self.scorer.by_sequence and not self.aux_coef

    def _lay_out(self) -> LayOut:
        if not self.packing:
            return padded
        if self.scorer.by_sequence:
            return partial(lay_out_padding_free, share_prompts=self.shares_prompts)
        return in_bins(self.hidden_size)

    def idle(self, own: int, batch: Batch) -> list[MicroBatch]:
        """Dummy micro-batches that a rank runs after its `own`, so that ranks with more of them can gather
        its slices: two tokens a sequence, with a loss that is multiplied by 0. None without lockstep.

        Collective: call it before the first pass.
        """
        if not self.lockstep:
            return []
        most = int(self.ranks.max_(torch.tensor(own, device=self.device)))
        k = batch.sequences_per_row
        nothing = Batch.from_sequences([[0, 0]] * k, [[False, True]] * k, k)
        return [self._own_positions(self._lay_out()(nothing, np.arange(1)))] * (most - own)

    def places(self, batch: Batch, rows: np.ndarray, micro: MicroBatch) -> Tensor:
        """int64 (T,): where a micro-batch's counted tokens stand among those of the global batch."""
        return torch.from_numpy(counted_places(batch, rows[micro.rows])).to(self.device)

    def run(self, batch: Batch, loss: Loss, step: int, train: bool) -> Sums:
        """The loss of `batch`; gradients are added to the parameters when training."""
        if train:
            self.routers.reset()
        counts_routing = train and bool(self.routers.layers)
        sums = Sums(
            torch.zeros((), dtype=torch.float64, device=self.device), self.routers if counts_routing else None
        )
        assert loss.separable or loss.reads == "logps", "a loss over all rows at once reads log-probabilities"
        walk = self._by_micro_batch if loss.separable else self._jointly
        with torch.set_grad_enabled(train):
            walk(batch, loss, step, train, sums)
        return sums

    def _by_micro_batch(self, batch: Batch, loss: Loss, step: int, train: bool, sums: Sums) -> None:
        totals = loss.totals(batch)
        rows, micros = self.shard(batch)
        idle = self.idle(len(micros), batch)
        for index, micro in enumerate(micros):
            columns = {name: values[rows[micro.rows]] for name, values in batch.columns.items()}
            of_tokens = self._token_columns(batch, rows[micro.rows])
            seed, ids = self._seed(step, index), of_tokens.get(loss.further_tokens or "")
            outputs, extra = self._forward(batch, micro, loss, seed, train, sums, ids)
            value, metrics = loss(
                self._view(outputs, micro.sequence, micro.n_sequences, batch, columns, of_tokens), totals
            )
            sums.add(value, metrics)
            if train:
                (value + extra).backward()
        for micro in idle:
            self._pass_idly(micro, loss, train)
        if not micros:
            self._add_nothing(batch, loss, totals, train, sums)

    def _pass_idly(self, micro: MicroBatch, loss: Loss, train: bool, keep: bool = False) -> Tensor:
        """Run a dummy micro-batch; its loss, 0. With `keep` the caller runs the backward pass of it."""
        outputs = self._outputs(micro, loss)
        read = {"logps": outputs.statistics.logps, "values": outputs.values, "scores": outputs.scores}
        nothing = read[loss.reads].sum() * 0
        if train and not keep:
            nothing.backward()
        return nothing

    def _add_nothing(self, batch: Batch, loss: Loss, totals: Totals, train: bool, sums: Sums) -> None:
        """A rank without rows takes part in the sums with the same metrics, all zero."""
        empty = torch.zeros(0, device=self.device)
        columns = {name: values[:0] for name, values in batch.columns.items()}
        of_tokens = {name: values[:0] for name, values in batch.token_columns.items()}
        ids = of_tokens.get(loss.further_tokens or "")
        further = None if ids is None else empty.reshape(ids.shape)
        outputs = Outputs(_no_statistics(empty), empty, empty, further)
        view = self._view(outputs, np.zeros(0, dtype=np.int64), 0, batch, columns, of_tokens)
        sums.add(*loss(view, totals))
        if train and self.aux_coef:
            sums.add(empty.sum(), {"aux_loss": (empty.sum(), 0.0), "aux_loss_term": (empty.sum(), 0.0)})

    def _jointly(self, batch: Batch, loss: Loss, step: int, train: bool, sums: Sums) -> None:
        """For a loss over all rows at once: first its gradient by log-probability, then each micro-batch.

        With more than one micro-batch the forward pass runs twice, so that memory stays bounded.
        """
        rows, micros = self.shard(batch)
        places = [self.places(batch, rows, micro) for micro in micros]
        gathered = torch.zeros(5, int(batch.loss_mask.sum()), device=self.device)
        idle = self.idle(len(micros), batch)
        keep = train and len(micros) + len(idle) == 1
        kept: list[tuple[Outputs, Tensor]] = []
        for index, (micro, place) in enumerate(zip(micros, places, strict=True)):
            with torch.set_grad_enabled(keep):
                scored = self._forward(batch, micro, loss, self._seed(step, index), keep, sums)
            gathered[:, place] = torch.stack([x.detach().float() for x in scored[0].statistics])
            kept = [scored] if keep else []
        with torch.set_grad_enabled(keep):
            unread = [self._pass_idly(micro, loss, train=keep, keep=keep) for micro in idle]
        if not micros and train and self.aux_coef:
            zero = torch.zeros((), device=self.device)
            sums.add(zero, {"aux_loss": (zero, 0.0), "aux_loss_term": (zero, 0.0)})
        gradient = self._loss_of_all(batch, loss, self.ranks.sum_(gathered), train, sums)
        if not train:
            return
        for index, (micro, place) in enumerate(zip(micros, places, strict=True)):
            seed = self._seed(step, index)
            outputs, extra = kept[0] if kept else self._forward(batch, micro, loss, seed, True, sums)
            ((outputs.statistics.logps * gradient[place]).sum() + extra).backward()
        for micro, nothing in zip(idle, unread, strict=True):
            if keep:
                nothing.backward()
            else:
                self._pass_idly(micro, loss, train)

    def _loss_of_all(self, batch: Batch, loss: Loss, gathered: Tensor, train: bool, sums: Sums) -> Tensor:
        """Adds loss and metrics of the global batch (once, on rank 0); returns d loss / d log-probability."""
        logps = gathered[0].clone().requires_grad_(train)
        outputs = Outputs(LabelStatistics(logps, gathered[1], gathered[2] > 0.5, gathered[3], gathered[4]))
        sequence = np.repeat(np.arange(batch.n_sequences), batch.label_counts)
        view = self._view(outputs, sequence, batch.n_sequences, batch, batch.columns, batch.token_columns)
        value, metrics = loss(view, loss.totals(batch))
        mine = float(self.ranks.share == 0)
        sums.add(value * mine, {n: (total * mine, weight * mine) for n, (total, weight) in metrics.items()})
        return torch.autograd.grad(value, logps)[0] if train else torch.zeros_like(logps)

    def _forward(
        self,
        batch: Batch,
        micro: MicroBatch,
        loss: Loss,
        seed: int,
        train: bool,
        sums: Sums,
        further: np.ndarray | None = None,
    ) -> tuple[Outputs, Tensor]:
        """Outputs of a micro-batch for the loss, and its weighted auxiliary loss; routing is counted when
        training. `further`: ids of the tokens that `Loss.further_tokens` names.

        The auxiliary loss is not linear in the batch: micro-batches are averaged by their tokens.
        """
        if not train:
            return self._outputs(micro, loss, further), torch.zeros((), device=self.device)
        torch.manual_seed(seed)
        copies = None if micro.copies is None else torch.from_numpy(micro.copies).to(self.device)
        # Where positions have copies, padding has none.
        every = copies is not None or micro.real.all()
        real = None if every else torch.from_numpy(micro.real).to(self.device)
        with self.routers.collecting(real, keep_logits=self.aux_coef > 0, copies=copies) as logits:
            outputs = self._outputs(micro, loss, further)
        if not self.aux_coef:
            return outputs, torch.zeros((), device=self.device)
        if isinstance(micro, PositionShare):
            logits = self.scorer.of_all_positions(logits, micro)
        aux = aux_loss(logits, self.routers.top_k) * (micro.n_tokens / batch.n_tokens)
        term = self.aux_coef * aux
        sums.add(term, {"aux_loss": (aux.detach(), 0.0), "aux_loss_term": (term.detach(), 0.0)})
        return outputs, term

    def _outputs(self, micro: MicroBatch, loss: Loss, further: np.ndarray | None = None) -> Outputs:
        if loss.reads == "logps":
            ids = None if further is None else torch.from_numpy(further).to(self.device)
            temperature, entropy_gradient = loss.logit_temperature, loss.needs_entropy_gradient
            statistics, others = self.scorer.with_further(micro, temperature, entropy_gradient, ids)
            return Outputs(statistics, further=others)
        if self.head is None:
            raise KeyError(f"{type(loss).__name__} reads {loss.reads}, and this role has no head")
        nothing = _no_statistics(torch.zeros(len(micro.sequence), device=self.device))
        if loss.reads == "values":
            return Outputs(nothing, values=self.scorer.values(micro, self.head))
        return Outputs(nothing, scores=self.scorer.scores(micro, self.head))

    def _view(
        self,
        outputs: Outputs,
        sequence: np.ndarray,
        n_sequences: int,
        batch: Batch,
        columns: dict[str, np.ndarray],
        token_columns: dict[str, np.ndarray],
    ) -> TokenView:
        statistics = outputs.statistics
        return TokenView(
            logps=statistics.logps,
            sequence=torch.from_numpy(sequence).to(self.device),
            n_sequences=n_sequences,
            entropy=statistics.entropy,
            correct=statistics.correct,
            mean_logits=statistics.mean_logits,
            log_sum_sq=statistics.log_sum_sq,
            columns=self._tensors(columns),
            sequences_per_row=batch.sequences_per_row,
            token_columns=self._tensors(token_columns),
            values=outputs.values,
            scores=outputs.scores,
            further_logps=outputs.further,
        )

    def _tensors(self, columns: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
            for name, values in columns.items()
        }

    @staticmethod
    def _token_columns(batch: Batch, rows: np.ndarray) -> dict[str, np.ndarray]:
        if not batch.token_columns:
            return {}
        places = counted_places(batch, rows)
        return {name: values[places] for name, values in batch.token_columns.items()}

    def _seed(self, step: int, micro_batch: int) -> int:
        # Ranks that compute the same positions drop the same things.
        numbers = self.seed, step, self.ranks.share, micro_batch
        return _hashed((*numbers, self.ranks.position_share) if self.ranks.position_share else numbers)


def _no_statistics(zeros: Tensor) -> LabelStatistics:
    return LabelStatistics(zeros, zeros, zeros.bool(), zeros, zeros)


def _hashed(numbers: Iterable[int]) -> int:
    """63 bits: neighbouring steps and ranks share no random stream."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
