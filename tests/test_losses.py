"""Losses against independent float64 formulas: values, gradients, extremes, labels they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfrank.errors import DataError
from halfrank.losses import LOSSES, default_loss


def bce(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    x, y = x[:, 0], y.double()
    return -(y * torch.sigmoid(x).log() + (1 - y) * torch.sigmoid(-x).log()).mean()


def cross_entropy(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    shares = x.exp() / x.exp().sum(1, keepdim=True)
    return -torch.stack([shares[i, int(label)].log() for i, label in enumerate(y)]).mean()


def mse(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    return ((x[:, 0] - y.double()) ** 2).sum() / len(y)


def softmax(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    total = x.new_zeros(())
    for group in range(int(groups.max()) + 1):
        s, t = x[groups == group, 0], y[groups == group].double()
        if t.sum() > 0:
            total = total - (t / t.sum() * (s.exp() / s.exp().sum()).log()).sum()
    return total / (int(groups.max()) + 1)


def by_group(x: Tensor, y: Tensor, groups: Tensor) -> list[tuple[Tensor, list[float]]]:
    return [(x[groups == g, 0], y[groups == g].tolist()) for g in range(int(groups.max()) + 1)]


def mean(terms: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(terms).mean() if terms else x.sum() * 0


def margin_mse(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    totals = []
    for s, t in by_group(x, y, groups):
        best = max(range(len(t)), key=lambda i: (t[i], -i))
        rest = [i for i in range(len(t)) if i != best]
        totals.append(mean([((s[best] - s[i]) - (t[best] - t[i])) ** 2 for i in rest], x))
    return mean(totals, x)


def kl(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    totals = []
    for s, t in by_group(x, y, groups):
        p = s.exp() / s.exp().sum()
        q = torch.tensor(t, dtype=torch.float64).exp()
        q = q / q.sum()
        totals.append((q * (q / p).log()).sum())
    return mean(totals, x)


def ranknet(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    totals = []
    for s, t in by_group(x, y, groups):
        pairs = [(i, j) for i in range(len(t)) for j in range(len(t)) if t[i] > t[j]]
        totals.append(mean([torch.log2(1 + torch.exp(s[j] - s[i])) for i, j in pairs], x))
    return mean(totals, x)


def ndcg_loss(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    totals = []
    for s, t in by_group(x, y, groups):
        rank = {i: r for r, i in enumerate(sorted(range(len(t)), key=lambda i: -s[i].item()), 1)}
        ideal = sum((2**grade - 1) / math.log2(r + 1) for r, grade in enumerate(sorted(t, reverse=True), 1))
        terms = []
        for i in range(len(t)):
            for j in range(len(t)):
                if t[i] > t[j]:
                    apart = abs(rank[i] - rank[j])
                    near = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
                    swap = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                    weight = (10 * near + swap) * (2 ** t[i] - 2 ** t[j]) / ideal
                    terms.append(weight * torch.log2(1 + torch.exp(s[j] - s[i])))
        totals.append(mean(terms, x))
    return mean(totals, x)


def listmle(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    totals = []
    for s, t in by_group(x, y, groups):
        order = sorted(range(len(t)), key=lambda i: -t[i])
        terms = [(s[order[k:]].exp().sum() / s[order[k]].exp()).log() for k in range(len(t))]
        totals.append(torch.stack(terms).sum())
    return mean(totals, x)


EXACT = {
    "bce": bce,
    "cross-entropy": cross_entropy,
    "kl": kl,
    "lambda": ndcg_loss,
    "listmle": listmle,
    "margin-mse": margin_mse,
    "mse": mse,
    "ranknet": ranknet,
    "softmax": softmax,
}


def case(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = 3 if name == "cross-entropy" else 1
    scores = torch.randn(12, labels, generator=draw) * 4
    grades = torch.randint(0, 4, (12,), generator=draw).float()
    y = {
        "bce": torch.rand(12, generator=draw),
        "cross-entropy": torch.randint(0, 3, (12,), generator=draw).float(),
        "softmax": grades,
        "lambda": grades,
        "ranknet": grades,
    }.get(name, torch.randn(12, generator=draw))
    return scores, y, torch.randint(0, 4, (12,), generator=draw).sort().values.unique(return_inverse=True)[1]


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_value_and_gradient_equal_the_float64_formula(name: str, seed: int) -> None:
    scores, labels, groups = case(name, seed)
    ours, exact = scores.clone().requires_grad_(), scores.double().requires_grad_()
    value, expected = LOSSES[name].function(ours, labels, groups), EXACT[name](exact, labels, groups)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-6)
    value.backward()
    expected.backward()
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_logits_stay_finite(name: str) -> None:
    scores, labels, groups = case(name, 1)
    scores = (scores.sign() * 1e4).requires_grad_()
    value = LOSSES[name].function(scores, labels, groups)
    value.backward()
    assert math.isfinite(value.item())
    assert bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_16_bit_scores_are_computed_in_float32(name: str) -> None:
    scores, labels, groups = case(name, 2)
    value = LOSSES[name].function(scores.bfloat16(), labels, groups)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(EXACT[name](scores.bfloat16().double(), labels, groups).item(), rel=1e-5)


def test_a_group_without_a_positive_counts_as_zero() -> None:
    scores = torch.tensor([[1.0], [2.0], [3.0], [0.5]], requires_grad=True)
    value = LOSSES["softmax"].function(scores, torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(1 + math.e) / 2, rel=1e-6)
    assert scores.grad[2:].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "labels", "num_labels", "message"),
    [
        ("bce", [0.0, math.nan], 1, "x.jsonl:2 has nan"),
        ("mse", [math.inf], 1, "x.jsonl:1 has inf"),
        ("bce", [0.5, 2.0], 1, r"from 0 to 1; x.jsonl:2 has 2. Scale"),
        ("bce", [1.0], 3, "Use cross-entropy"),
        ("cross-entropy", [0.0, 3.0, -1.0], 3, r"with 3 labels .* from 0 to 2; x.jsonl:2 has 3 .2 such labels."),
        ("cross-entropy", [0.5], 3, "whole labels"),
        ("cross-entropy", [0.0], 1, "this one has 1. Use bce"),
        ("softmax", [7.0, -1.0], 1, "grades of 0 or more; x.jsonl:2 has -1. Shift"),
        ("lambda", [-1.0], 1, "from 0 to 30.*x.jsonl:1 has -1"),
        ("lambda", [0.0, 7.0, 100.0], 1, "2 to the grade; x.jsonl:3 has 100"),
        ("kl", [math.nan], 1, "x.jsonl:1 has nan"),
        ("listmle", [1.0], 2, "needs a model with one label"),
    ],
)
def test_labels_out_of_range_are_named(name: str, labels: list[float], num_labels: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LOSSES[name].check_labels(torch.tensor(labels), num_labels, lambda index: f"x.jsonl:{index + 1}")


def test_default_loss() -> None:
    assert [default_loss(1, True), default_loss(1, False), default_loss(3, False)] == [
        "softmax",
        "bce",
        "cross-entropy",
    ]
