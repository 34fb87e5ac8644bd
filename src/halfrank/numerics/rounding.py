"""A float32 number as a 16-bit one and an int8 residual: what rounding drops, in 254ths of the grid's spacing."""

from __future__ import annotations

import torch
from torch import Tensor

from halfrank.numerics.formats import ulp, ulp_and_inverse
from halfrank.numerics.noise import hashed_bits, keys, uniform

STEPS = 254.0  # a residual reaches half a spacing to either side: 127 steps each
PART = float(torch.tensor(1.0 / STEPS, dtype=torch.float32))


def split(exact: Tensor, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Round float32 `exact` to `dtype` and keep the rest as int8, rounded stochastically (unbiased)."""
    narrow = exact.to(dtype)
    noise = uniform(hashed_bits(keys(seed, 0, 0), 0, exact.numel(), exact.device), 0).view(exact.shape)
    return narrow, encode_residual(exact - narrow.float(), narrow.float(), dtype, noise)


def join(narrow: Tensor, residual: Tensor) -> Tensor:
    """The float32 number that a 16-bit weight and its int8 residual stand for."""
    return narrow.float() + decode_residual(residual, ulp(narrow))


def encode_residual(rest: Tensor, rounded: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Int8 code of `rest`, at most half a spacing of `dtype` at `rounded` (both float32); noise in [0, 1)."""
    _, inverse = ulp_and_inverse(rounded, dtype)
    return (rest * inverse).mul_(STEPS).add_(noise).floor_().clamp_(-127, 127).to(torch.int8)


def decode_residual(residual: Tensor, spacing: Tensor) -> Tensor:
    """Float32 value of an int8 residual where the grid's spacing is `spacing`."""
    return residual.float().mul_(PART).mul_(spacing)


def round_stochastic(exact: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 to `dtype` up or down so that the mean is exact; finite numbers stay finite.

    `noise` is uniform in [0, 1). NaN and infinity pass through.
    """
    down = exact.to(dtype).float()
    finite = torch.where(down.isfinite(), down, exact.sign() * torch.finfo(dtype).max)
    spacing, _ = ulp_and_inverse(finite, dtype)
    # The grid of the smaller magnitude: rounding to nearest may have crossed into a coarser binade.
    spacing = torch.minimum(spacing, ulp_and_inverse(exact, dtype)[0])
    largest = torch.finfo(dtype).max
    steps = (exact / spacing + noise).floor_()
    rounded = (steps * spacing).clamp_(-largest, largest)
    return torch.where(exact.isfinite(), rounded, exact).to(dtype)
