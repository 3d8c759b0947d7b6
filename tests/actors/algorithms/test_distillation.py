"""Distillation from a teacher's most probable tokens, by literals and against the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actors.algorithms.chunked_logprob import head_further_logps, head_statistics, head_top_logps
from actors.algorithms.distillation import TOP_IDS, TOP_LOGPS, DistillLoss, generalized_jsd, with_rest
from actors.algorithms.logprob import further_logps, label_statistics, top_logps
from actors.algorithms.loss import TokenView
from actors.batches.batch import Batch

VOCABULARY, K = 7, 3
STUDENT = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
LABELS = torch.tensor([1, 4, 6, 0])


def logits(seed: int) -> torch.Tensor:
    return torch.randn(len(LABELS), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def plain(student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """(T,): the divergence over the teacher's K best tokens and the sum of the others, step by step."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher))
    found = []
    for row in range(len(p)):
        best = sorted(range(VOCABULARY), key=lambda j: -float(q[row, j]))
        parts = [[j] for j in best[:K]] + [best[K:]]
        ps, qs = (torch.stack([x[row, part].sum() for part in parts]) for x in (p, q))
        mixed = beta * qs + (1 - beta) * ps
        if beta == 0:
            each = qs * (qs / ps).log()
        elif beta == 1:
            each = ps * (ps / qs).log()
        else:
            each = beta * qs * (qs / mixed).log() + (1 - beta) * ps * (ps / mixed).log()
        found.append(each.sum())
    return torch.stack(found)


def test_forward_reverse_and_jensen_shannon_divergence_by_literals() -> None:
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    middle = 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
    middle += 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3))
    for beta, wanted in ((0.0, forward), (1.0, reverse), (0.5, middle)):
        assert generalized_jsd(STUDENT, TEACHER, beta).item() == pytest.approx(wanted, rel=1e-12)
        assert generalized_jsd(TEACHER, TEACHER, beta).item() == 0.0
    assert forward == pytest.approx(0.3680642, abs=1e-7)
    assert reverse == pytest.approx(0.5108256, abs=1e-7)


def test_all_other_tokens_are_one_more_event() -> None:
    logps = torch.tensor([[0.5, 0.2]], dtype=torch.float64).log()
    assert with_rest(logps).exp().tolist()[0] == pytest.approx([0.5, 0.2, 0.3])
    assert with_rest(torch.zeros(1, 1, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_the_plain_divergence(beta: float, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    mask = np.array([True, True, False, True])
    ids, logps = top_logps(teacher, K, temperature).split(K, dim=1)
    statistics = label_statistics(student, LABELS, temperature)
    further = further_logps(student, LABELS, statistics.logps, ids.long(), temperature)
    columns = {TOP_IDS: ids.long(), TOP_LOGPS: logps, "mask": torch.from_numpy(mask)}
    columns["old_logps"] = statistics.logps.detach().double()
    view = TokenView(
        statistics.logps, torch.tensor([0, 0, 1, 1]), 2, *statistics[1:], token_columns=columns,
        further_logps=further,
    )  # fmt: skip
    batch = Batch.from_sequences([[0, 1, 4], [0, 6, 0]], [[False, True, True]] * 2)
    batch = batch.with_token_columns(**{name: value.numpy() for name, value in columns.items()})
    loss = DistillLoss(beta=beta, temperature=temperature)
    value, metrics = loss(view, loss.totals(batch))
    gradient = torch.autograd.grad(value, student)[0]

    again = logits(0).requires_grad_()
    wanted = plain(again, teacher, beta, temperature)[torch.from_numpy(mask)].mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, again)[0], atol=1e-6, rtol=1e-4)
    assert float(metrics["ratio/beyond"][0]) == 0.0


def test_log_probabilities_of_further_tokens_are_those_of_the_softmax() -> None:
    hidden, weight = torch.randn(len(LABELS), 5, requires_grad=True), torch.randn(VOCABULARY, 5)
    ids = torch.tensor([[0, 1], [4, 2], [5, 3], [6, 6]])
    logps = head_statistics(hidden, weight, LABELS, 0.7).logps
    found = head_further_logps(hidden, weight, LABELS, logps, ids, 0.7)
    whole = torch.log_softmax(hidden @ weight.t() / 0.7, -1)
    torch.testing.assert_close(found, whole.gather(1, ids))
    factors = torch.randn(ids.shape)
    wanted = torch.autograd.grad((whole.gather(1, ids) * factors).sum(), hidden)[0]
    torch.testing.assert_close(
        torch.autograd.grad((found * factors).sum(), hidden)[0], wanted, atol=1e-5, rtol=1e-4
    )
    best = whole.detach().topk(K)
    for top in (
        head_top_logps(hidden, weight, LABELS, K, 0.7),
        top_logps((hidden @ weight.t()).detach(), K, 0.7),
    ):
        assert top[:, :K].long().tolist() == best.indices.tolist()
        torch.testing.assert_close(top[:, K:].float(), best.values)


@pytest.mark.trl
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_with_the_whole_vocabulary_it_is_the_loss_of_trl(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(2).double(), logits(3).double()
    ours = generalized_jsd(student.log_softmax(-1), teacher.log_softmax(-1), beta).mean().item()
    labels = LABELS[None]
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels, beta=beta).item()
    assert ours == pytest.approx(theirs, rel=1e-6)
