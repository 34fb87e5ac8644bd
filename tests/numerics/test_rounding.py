"""Rounding and residuals against float64, over every value of both formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfrank.numerics.formats import NARROW_DTYPES, all_finite, parse_dtype, ulp
from halfrank.numerics.noise import UNIT, folded, hashed_bits, hashed_from, keys, sixteen
from halfrank.numerics.rounding import join, round_stochastic, split


def every_finite_value(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_ulp_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    positive = every_finite_value(dtype)
    positive = positive[(positive > 0) & (positive.float() >= 2.0**-100)].sort().values
    distance = positive[1:].double() - positive[:-1].double()
    assert torch.equal(ulp(positive[:-1].float(), dtype).double(), distance)
    assert bool((ulp(every_finite_value(dtype).float(), dtype) > 0).all())


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_split_and_join_lose_at_most_a_254th_of_the_spacing(dtype: torch.dtype) -> None:
    values = every_finite_value(dtype)
    values = values[(values.float().abs() < torch.finfo(dtype).max / 2) & (values.float().abs() > 2.0**-100)]
    exact = values.float() + ulp(values.float(), dtype) * (torch.rand(values.shape) * 0.9 - 0.45)
    narrow, residual = split(exact, dtype)
    error = (join(narrow, residual).double() - exact.double()).abs()
    assert bool((error <= ulp(narrow.float(), dtype).double() / 254 * 1.001 + exact.double().abs() * 2.0**-24).all())
    assert int((residual != 0).sum()) > 0.9 * residual.numel(), "the residual must hold what rounding drops"


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_zero_and_the_smallest_numbers_keep_a_finite_residual(dtype: torch.dtype) -> None:
    exact = torch.tensor([0.0, -0.0, 1e-9, -3e-12, 1e-30, 1e-44])
    joined = join(*split(exact, dtype))
    assert bool(joined.isfinite().all())
    assert torch.allclose(joined, exact, rtol=2e-4, atol=2.0**-24 / 127 if dtype is torch.float16 else 1e-33)


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@given(value=st.floats(min_value=-60000, max_value=60000, width=32))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(dtype: torch.dtype, value: float) -> None:
    noise = torch.linspace(0, 0.999, 50)
    rounded = round_stochastic(torch.full((50,), value), dtype, noise)
    found = sorted(set(rounded.double().tolist()))
    exact = float(np.float32(value))
    assert len(found) <= 2
    spacing = float(ulp(torch.tensor([exact]).to(dtype).float(), dtype)[0])
    assert all(abs(neighbour - exact) <= spacing for neighbour in found)
    if exact in every_value_set(dtype) and (
        exact == 0 or abs(exact) > 2.0**-100
    ):  # below it the grid is coarser on purpose
        assert found == [exact]


_sets: dict[torch.dtype, set[float]] = {}


def every_value_set(dtype: torch.dtype) -> set[float]:
    if dtype not in _sets:
        _sets[dtype] = set(every_finite_value(dtype).double().tolist())
    return _sets[dtype]


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
@pytest.mark.parametrize("value", [2e-2, -3.3e-4, 7e-5, 5e-7, 5e-9])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    count = 400_000
    noise = sixteen(hashed_bits(keys(1, 2, 3), 0, count), 0) * UNIT
    rounded = round_stochastic(torch.full((count,), value), dtype, noise).double()
    error = float(rounded.mean()) - float(np.float32(value))
    # The noise has 16 bits, which biases the mean by up to 2^-17 of the spacing.
    sigma = float(rounded.std()) / math.sqrt(count)
    assert abs(error) < 4 * sigma + float((rounded.max() - rounded.min()) * 2.0**-16)


@pytest.mark.parametrize("dtype", NARROW_DTYPES)
def test_stochastic_rounding_never_makes_a_finite_number_infinite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    exact = torch.tensor([largest, -largest, float(np.nextafter(np.float32(largest), np.float32(np.inf)))])
    assert bool(round_stochastic(exact, dtype, torch.full((3,), 0.999)).isfinite().all())
    assert round_stochastic(torch.tensor([math.inf, math.nan]), dtype, torch.zeros(2)).isfinite().sum() == 0


@pytest.mark.parametrize("field", [0, 1, 2])
def test_noise_is_uniform_and_differs_by_step_and_tensor(field: int) -> None:
    draws = [
        sixteen(hashed_bits(keys(*where), 0, 100_000), field) * UNIT
        for where in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0))
    ]
    for draw in draws:
        assert float(draw.min()) >= 0
        assert float(draw.max()) < 1
        assert float(draw.mean()) == pytest.approx(0.5, abs=0.004)
        counts = torch.histc(draw, bins=64, min=0, max=1)
        assert float(((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum()) < 120  # chi-square, 63 degrees
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.015


def test_noise_does_not_depend_on_chunks() -> None:
    whole = hashed_bits(keys(5, 6, 7), 0, 1000)
    assert torch.equal(whole, torch.cat([hashed_bits(keys(5, 6, 7), a, a + 250) for a in range(0, 1000, 250)]))


@pytest.mark.parametrize("start", [0, 256, 3 * 2**20, 2**31 + 2**18])
def test_noise_of_a_chunk_is_that_of_its_elements(start: int) -> None:
    pair, out, spare = keys(5, 6, 7), torch.empty(200, dtype=torch.int32), torch.empty(200, dtype=torch.int32)
    assert torch.equal(
        hashed_from(pair, start, folded(200, torch.device("cpu")), out, spare), hashed_bits(pair, start, start + 200)
    )


def test_all_finite() -> None:
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.ones(5).half())
    assert not all_finite(torch.tensor([1.0, math.nan]))
    assert not all_finite(torch.tensor([1.0, -math.inf]))


def test_a_dtype_nobody_stores_is_refused() -> None:
    assert parse_dtype("torch.float16") is torch.float16
    with pytest.raises(ValueError, match="got 'float8'"):
        parse_dtype("float8")
