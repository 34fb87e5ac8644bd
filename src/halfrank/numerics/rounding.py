"""A float32 number as a 16-bit one and an int8 residual: what rounding drops, in 254ths of the grid's spacing."""

from __future__ import annotations

import torch
from torch import Tensor

from halfrank.numerics.formats import constant, ulp
from halfrank.numerics.noise import UNIT, hashed_bits, keys, sixteen

STEPS = 254.0  # a residual reaches half a spacing to either side: 127 steps each
PART = float(torch.tensor(1.0 / STEPS, dtype=torch.float32))


def split(exact: Tensor, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Round float32 `exact` to `dtype` and keep the rest as int8, rounded stochastically (unbiased)."""
    narrow = exact.to(dtype)
    noise = sixteen(hashed_bits(keys(seed, 0, 0), 0, exact.numel(), exact.device), 0).view(exact.shape)
    rest = exact - narrow.float()
    return narrow, encode_residual_(rest, ulp(narrow.float(), dtype), noise).to(torch.int8)


def join(narrow: Tensor, residual: Tensor) -> Tensor:
    """The float32 number that a 16-bit weight and its int8 residual stand for."""
    return narrow.float() + decode_residual_(residual.float(), ulp(narrow.float(), narrow.dtype))


def encode_residual_(rest: Tensor, spacing: Tensor, noise: Tensor) -> Tensor:
    """Turn float32 `rest`, at most half a `spacing`, into its code, still float32; noise from 0 to 65535."""
    return rest.div_(spacing).mul_(constant(STEPS)).add_(noise, alpha=UNIT).floor_().clamp_(-127, 127)


def decode_residual_(code: Tensor, spacing: Tensor) -> Tensor:
    """Turn residuals, as float32, into their values where the grid's spacing is `spacing`."""
    return code.mul_(constant(PART)).mul_(spacing)


def round_stochastic(exact: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 to `dtype` up or down so that the mean is exact; finite numbers stay finite.

    `noise` is uniform in [0, 1). NaN and infinity pass through.
    """
    down = exact.to(dtype).float()
    finite = torch.where(down.isfinite(), down, exact.sign() * torch.finfo(dtype).max)
    spacing = ulp(finite, dtype)
    # The grid of the smaller magnitude: rounding to nearest may have crossed into a coarser binade.
    spacing = torch.minimum(spacing, ulp(exact, dtype))
    largest = torch.finfo(dtype).max
    steps = (exact / spacing + noise).floor_()
    rounded = (steps * spacing).clamp_(-largest, largest)
    return torch.where(exact.isfinite(), rounded, exact).to(dtype)
