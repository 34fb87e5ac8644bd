"""16-bit weights for 16-bit products, residuals included: the stored number or its neighbour, right on average.

Training moves many weights by less than their spacing in one step. The residual keeps that, but a product of 16-bit
numbers has no room for it: with the rounded weights alone such a step is not felt until it has added up to half a
spacing, which at a small learning rate takes many steps. So a training step multiplies with the neighbour that the
residual points to, as often as the residual is a share of the way: stochastic rounding of the weight that is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfrank.numerics.formats import GRID
from halfrank.numerics.noise import hashed_bits
from halfrank.numerics.rounding import STEPS
from halfrank.numerics.threads import in_turn
from halfrank.numerics.update import CHUNK, GPU_CHUNK
from halfrank.numerics.widen import has_numba

HALF_STEPS = int(STEPS) // 2  # a residual c moves a weight with probability c / 254 = (c * 2^15 / 127) / 2^16


def dithered_(out: Tensor, narrow: Tensor, residual: Tensor, noise_keys: tuple[int, int]) -> Tensor:
    """Fill contiguous `out` with 16-bit `narrow`, or its neighbour on the side of int8 `residual`; the mean is exact.

    `noise_keys` decide which (numerics/noise.py): the same for a forward pass and the backward pass that belongs to it.
    The same bits on every backend; finite weights stay finite.
    """
    if narrow.device.type == "cpu" and narrow.is_contiguous() and has_numba():
        from halfrank.numerics import compiled

        compiled.dither_(out.view(-1), narrow.view(-1), residual.view(-1), noise_keys)
        return out
    weights, codes, target = (tensor.reshape(-1) for tensor in (narrow, residual, out.view(-1)))

    def part(start: int, stop: int) -> None:
        noise = hashed_bits(noise_keys, start, stop, weights.device).bitwise_and_(0xFFFF)
        _move(target[start:stop], weights[start:stop], codes[start:stop], noise)

    in_turn(part, weights.numel(), CHUNK if weights.device.type == "cpu" else GPU_CHUNK)
    return out


def thresholds(dtype: torch.dtype) -> tuple[int, int, int]:
    """As magnitude bits: the mask of the mantissa, the smallest number whose lower neighbour is nearer, the largest."""
    _, mantissa = GRID[dtype]
    fine = (1 << mantissa) - 1
    return fine, 2 << mantissa, int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))


def _move(out: Tensor, weights: Tensor, codes: Tensor, noise: Tensor) -> None:
    fine, coarse, largest = thresholds(weights.dtype)
    bits = weights.view(torch.int16).int()
    size, code = bits & 0x7FFF, codes.int()
    negative = torch.where(size == 0, code < 0, bits < 0)
    outwards = (code < 0) == negative
    # Below a power of two the spacing is half of that which the residual counts in.
    nearer = ~outwards & (size & fine == 0) & (size >= coarse)
    share = code.abs_() << (15 + nearer.int())
    moves = (noise * HALF_STEPS < share) & ~(outwards & (size >= largest))
    size += torch.where(outwards, 1, -1) * moves
    out.view(torch.int16).copy_(size - (negative.int() << 15))
