"""Rank changes and weights against plain enumerations, float64 formulas and scipy."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy import stats

from halfrank.certify import weights
from halfrank.certify.scores import agreement, kendall_tau, new_ties, top_overlap
from halfrank.data.pairs import Group

GENERATOR = np.random.default_rng(0)
LISTS = [
    (GENERATOR.integers(0, 6, 9).astype(np.float32), GENERATOR.integers(0, 6, 9).astype(np.float32)) for _ in range(40)
]


def tau_b(a: np.ndarray, b: np.ndarray) -> float:
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    agree = sum(x * y for x, y in signs)
    return float(agree / np.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)))


def test_tau_is_that_of_the_definition_and_of_scipy() -> None:
    for a, b in LISTS:
        assert kendall_tau(a, b) == pytest.approx(tau_b(a, b), abs=1e-12)
        assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b)[0], abs=1e-12)
    assert kendall_tau(np.ones(4), np.ones(4)) == 1.0
    assert kendall_tau(np.arange(4.0), np.ones(4)) == 0.0


def test_new_ties_are_counted_pair_by_pair() -> None:
    for a, b in LISTS:
        counted = sum(b[i] == b[j] and a[i] != a[j] for i, j in combinations(range(len(a)), 2))
        assert new_ties(a, b) == counted


def test_overlap_is_that_of_sorted_lists() -> None:
    for a, b in LISTS:
        first = [sorted(range(9), key=lambda i, s=s: (-s[i], i))[:4] for s in (a, b)]
        assert top_overlap(a, b, 4) == len(set(first[0]) & set(first[1])) / 4
    assert top_overlap(np.array([1.0]), np.array([0.0])) == 1.0


def test_near_scores_may_change_places_and_far_ones_may_not() -> None:
    groups = [Group("q", ("a", "b", "c"), (1.0, 0.0, 0.0)), Group("r", ("a", "b", "c"), (0.0, 2.0, 1.0))]
    near, far = [0.500, 0.501, 0.502], [0.1, 0.9, 0.5]
    reference = np.array([near + far]).T
    turned = np.array([near[::-1] + far]).T
    found = agreement(reference, turned, (reference, turned), groups, allowed=0.01)
    assert found.kendall_tau == pytest.approx(0.0)
    assert found.clear_kendall_tau == 1.0
    assert found.ndcg_reference == pytest.approx((0.5 + 1.0) / 2)
    assert found.ndcg_copy == pytest.approx(1.0)
    far_turned = np.array([near + far[::-1]]).T
    found = agreement(reference, far_turned, (reference, far_turned), groups, allowed=0.01)
    assert found.clear_kendall_tau == pytest.approx(1 / 3)


def test_scores_that_are_not_finite_are_counted_and_not_ranked() -> None:
    reference = np.array([[0.1], [0.2], [0.3]])
    broken = np.array([[0.1], [np.nan], [np.inf]])
    found = agreement(reference, broken, (reference, broken), [Group("q", ("a", "b", "c"), (1, 0, 0))], allowed=0.01)
    assert (found.non_finite, found.max_score_error, found.kendall_tau) == (2, 0.0, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_within_half_a_unit_for_every_size(dtype: torch.dtype) -> None:
    values = torch.randn(4096) * torch.exp2(torch.linspace(-20, 14, 4096))
    ulps = weights.ulps_apart(values, values.to(dtype).float(), dtype)
    assert float(ulps.max()) <= 0.5
    assert float(ulps.max()) > 0.45
    assert not list(weights.differences([("w", values, values.to(dtype))], dtype, allowed_ulps=1.0))
    moved = values.to(dtype).float() * (1 + 4 * torch.finfo(dtype).eps)
    (difference,) = weights.differences([("w", values, moved)], dtype, allowed_ulps=1.0)
    assert 2 < difference.ulps <= 9
    assert difference.cause == "weights-differ"


def test_mantissa_bits_of_every_float16() -> None:
    bits = torch.arange(1, 2**15 - 2**10, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    assert weights.mantissa_bits(bits) == 10
    for kept, value in product((0, 3, 7), (1.0, -3.0e-3)):
        grid = value * 2.0 ** torch.floor(torch.log2(torch.tensor(1 / abs(value)))) * torch.ones(4)
        coarse = torch.tensor([1 + k / 2**kept for k in range(2**kept)]) * torch.sign(grid[0])
        assert weights.mantissa_bits(coarse) == kept


def test_a_difference_says_what_it_looks_like() -> None:
    exact = torch.randn(4, 8)
    step = torch.exp2(torch.floor(torch.log2(exact.abs())) - 3)
    looks = {
        "row-order": exact.half()[[1, 0, 2, 3]],
        "mantissa": (torch.round(exact / step) * step).half(),
        "weights-differ": torch.zeros(4, 8).half(),
    }
    for cause, copy in looks.items():
        (difference,) = weights.differences([("w", exact, copy)], torch.float16, allowed_ulps=1.0)
        assert difference.cause == cause
