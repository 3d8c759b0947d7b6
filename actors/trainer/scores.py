"""Log-probabilities, values and scores: what a rank computes without training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from actors.algorithms.dpo import ld_weights
from actors.batches.batch import Batch
from actors.batches.packing import MicroBatch, counted_places
from actors.trainer.host_state import HostState


class Scores:
    """The computing part of a `ModelHost`."""

    def __init__(self, state: HostState) -> None:
        self._state = state
        self._agreement: np.ndarray | None = None

    def token_logprobs(self, batch: Batch, role: str | None, temperature: float = 1.0) -> np.ndarray:
        """float64 (counted tokens,): log-probability of each counted token, in the batch's order.

        Under softmax(logits / temperature), as tokens sampled at that temperature have it. A batch that comes
        with experts is computed with these.
        """
        runner = self._state.runner
        replay = runner.scorer.replay
        if replay is not None:
            replay.reset()
        found = self._per_token(batch, role, lambda micro: runner.scorer.logps(micro, temperature))
        if replay is not None and batch.experts is not None:
            ranks = self._state.ranks
            self._agreement = replay.agreement(ranks.sum_(ranks.sum_positions_(replay.totals())))
        return found

    def top_logprobs(self, batch: Batch, role: str | None, k: int, temperature: float) -> np.ndarray:
        """float64 (counted tokens, 2 k): the k most probable tokens in place of each counted one, then their
        log-probabilities under softmax(logits / temperature)."""
        scorer = self._state.runner.scorer
        return self._per_token(batch, role, lambda micro: scorer.top(micro, k, temperature), (2 * k,))

    def logprobs(self, batch: Batch, role: str | None, ld_alpha: float | None = None) -> np.ndarray:
        """float64 (sequences,): log-probability of each sequence's counted tokens.

        With `ld_alpha` (pairs only) as `DpoLoss.ld_alpha` sums them, for the reference of such a loss.
        """
        tokens = self.token_logprobs(batch, role)
        if ld_alpha is not None:
            tokens = tokens * ld_weights(batch, ld_alpha)
        sequence = np.repeat(np.arange(batch.n_sequences), batch.label_counts)
        return np.bincount(sequence, weights=tokens, minlength=batch.n_sequences)

    def values(self, batch: Batch, role: str) -> np.ndarray:
        """float64 (counted tokens,): the role's head at the state before each counted token."""
        head, scorer = self._head_of(role), self._state.runner.scorer
        return self._per_token(batch.unrouted(), role, lambda micro: scorer.values(micro, head))

    def scores(self, batch: Batch, role: str) -> np.ndarray:
        """float64 (sequences,): the role's head at each sequence's last token."""
        head, scorer, k = self._head_of(role), self._state.runner.scorer, batch.sequences_per_row
        return self._gathered(
            batch.unrouted(),
            role,
            (batch.n_sequences,),
            lambda rows: torch.from_numpy((rows[:, None] * k + np.arange(k)).reshape(-1)),
            lambda micro: scorer.scores(micro, head),
        )

    def route_agreement(self) -> np.ndarray | None:
        """float64 (layers,): share of the given experts that the routers would have chosen too, over all
        ranks, in the last log-probabilities of a batch that came with experts; None before."""
        return self._agreement

    def _head_of(self, role: str) -> nn.Linear:
        heads = self._state.heads
        if role not in heads:
            raise KeyError(f"role '{role}' has no head (with one: {', '.join(heads) or 'none'})")
        return heads[role]

    def _per_token(
        self,
        batch: Batch,
        role: str | None,
        compute: Callable[[MicroBatch], torch.Tensor],
        each: tuple[int, ...] = (),
    ) -> np.ndarray:
        def places(rows: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(counted_places(batch, rows))

        return self._gathered(batch, role, (int(batch.loss_mask.sum()), *each), places, compute)

    def _gathered(
        self,
        batch: Batch,
        role: str | None,
        shape: tuple[int, ...],
        places: Callable[[np.ndarray], torch.Tensor],
        compute: Callable[[MicroBatch], torch.Tensor],
    ) -> np.ndarray:
        """float64 of this shape: what `compute` says of all ranks' micro-batches, at the `places` of their
        rows."""
        state = self._state
        state.set_mode(train=False)
        rows, micros = state.runner.shard(batch)
        idle = state.runner.idle(len(micros), batch)
        found = torch.zeros(shape, dtype=torch.float64, device=state.spec.device)
        with state.as_role(role), torch.no_grad():
            for micro in micros:
                found[places(rows[micro.rows]).to(found.device)] = compute(micro).double()
            for micro in idle:
                compute(micro)
        state.free_gathered()
        return state.ranks.sum_(found).cpu().numpy()
