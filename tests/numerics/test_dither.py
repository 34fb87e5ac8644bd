"""A weight for a 16-bit product: on average the weight that is trained, in float64, for every value of a format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfrank.numerics import dither, widen
from halfrank.numerics.dither import dithered_
from halfrank.numerics.noise import keys
from halfrank.numerics.rounding import join

NARROW = [torch.float16, torch.bfloat16]


def every_weight(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a format; of bfloat16 those for which residuals are exact."""
    found = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    found = found[found.isfinite()]
    return found if dtype is torch.float16 else found[(found == 0) | (found.float().abs() >= 2.0**-100)]


def drawn(weights: Tensor, codes: Tensor, count: int) -> Tensor:
    out = torch.empty_like(weights)
    total = torch.zeros(weights.shape, dtype=torch.float64)
    for step in range(count):
        total += dithered_(out, weights, codes, keys(7, step, 3)).double()
    return total / count


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("code", [-127, -90, -1, 1, 64, 127])
def test_the_mean_is_the_trained_weight(dtype: torch.dtype, code: int) -> None:
    weights = every_weight(dtype)
    codes = torch.full(weights.shape, code, dtype=torch.int8)
    if dtype is torch.bfloat16:
        codes[weights == 0] = 0  # its spacing there is far below that of residuals
    wanted = join(weights, codes).double()
    room = wanted.abs() <= torch.finfo(dtype).max
    spacing = (wanted - weights.double()).abs() * 254 / abs(code)
    low = wanted.abs() < weights.double().abs()
    halved = low & (torch.frexp(weights.float().abs()).mantissa == 0.5)
    # Residuals of a power of two reach a quarter of a spacing downwards at most: rounding to nearest stops there.
    room &= ~(halved & (abs(code) > 63))
    away = (drawn(weights, codes, 400) - wanted)[room] / torch.where(spacing == 0, 1.0, spacing)[room]
    assert away.abs().max() < 5.5 * 0.5 / 400**0.5
    assert away.mean().abs() < 5 * 0.5 / (400 * room.sum()) ** 0.5


@pytest.mark.parametrize("dtype", NARROW)
@given(seed=st.integers(0, 2**32), step=st.integers(0, 2**20))
def test_only_neighbours_are_taken_and_finite_stays_finite(dtype: torch.dtype, seed: int, step: int) -> None:
    weights = every_weight(dtype)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-127, 128, weights.shape)).to(torch.int8)
    found = dithered_(torch.empty_like(weights), weights, codes, keys(seed, step, 0))
    towards = torch.where(codes > 0, torch.inf, -torch.inf).to(dtype)
    neighbours = torch.nextafter(weights, towards)
    assert bool(found.isfinite().all())
    assert bool(((found == weights) | (found == neighbours)).all())
    assert bool((found == weights)[codes == 0].all())


@pytest.mark.parametrize("dtype", NARROW)
def test_without_numba_the_bits_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not widen.has_numba():
        pytest.skip("numba is not installed")
    weights = every_weight(dtype).repeat(4)[: 3 * dither.CHUNK + 17]
    codes = torch.from_numpy(np.random.default_rng(1).integers(-127, 128, weights.shape)).to(torch.int8)
    fast = dithered_(torch.empty_like(weights), weights, codes, keys(5, 9, 2**31 + 5))
    monkeypatch.setattr(dither, "has_numba", lambda: False)
    plain = dithered_(torch.empty_like(weights), weights, codes, keys(5, 9, 2**31 + 5))
    assert torch.equal(fast.view(torch.int16), plain.view(torch.int16))
    assert not torch.equal(fast, weights)


def test_threads_do_not_change_the_bits() -> None:
    weights = torch.randn(2**19).to(torch.float16)
    codes = torch.randint(-127, 128, weights.shape, dtype=torch.int8)
    ends, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ends.append(dithered_(torch.empty_like(weights), weights, codes, keys(1, 2, 3)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ends)
