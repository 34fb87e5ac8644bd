"""The 16-bit AdamW update of a run of elements, in plain torch: the reference that the compiled one equals to the bit.

Shapes: N elements of one flattened tensor, a whole number of blocks except at the tensor's end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.formats import ulp
from halfrank.numerics.moments import (
    BLOCK,
    correction,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    exact_sqrt_,
)
from halfrank.numerics.noise import hashed_bits, uniform
from halfrank.numerics.rounding import decode_residual, encode_residual

CHUNK = 1 << 16  # elements at a time: their float32 temporaries stay in the cache


@dataclass(frozen=True)
class Stored:
    """One tensor's 5 bytes per parameter, less its gradient: all flat, all changed in place."""

    weight: Tensor  # (N,) float16 or bfloat16
    residual: Tensor  # (N,) int8
    m: Tensor  # (N,) int8
    v: Tensor  # (N,) uint8
    scale: Tensor  # (B,) float32

    def part(self, start: int, stop: int) -> Stored:
        """Views of the elements from `start` (a multiple of 128) to `stop`."""
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        run = slice(start, stop)
        return Stored(self.weight[run], self.residual[run], self.m[run], self.v[run], self.scale[blocks])


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one update, each already rounded to float32."""

    gradient_factor: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    inverse_root: float
    eps: float
    decay: float
    correction_before: float
    correction_after: float


def coefficients(
    step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, divisor: float
) -> Coefficients:
    """The numbers of update `step` (from 1) of AdamW (Loshchilov and Hutter, 2019), gradients divided by `divisor`."""
    values = (
        1.0 / divisor,
        betas[0],
        1.0 - betas[0],
        betas[1],
        1.0 - betas[1],
        lr / (1.0 - betas[0] ** step),
        1.0 / (1.0 - betas[1] ** step) ** 0.5,
        eps,
        lr * weight_decay,
        correction(step - 1, betas),
        correction(step, betas),
    )
    return Coefficients(*(float(np.float32(value)) for value in values))


def update_(stored: Stored, gradient: Tensor, numbers: Coefficients, noise_keys: tuple[int, int]) -> None:
    """Update a whole tensor in place, chunk by chunk."""
    for start in range(0, gradient.numel(), CHUNK):
        stop = min(start + CHUNK, gradient.numel())
        _update_chunk(stored.part(start, stop), gradient[start:stop], numbers, noise_keys, start)


def _update_chunk(s: Stored, gradient: Tensor, c: Coefficients, noise_keys: tuple[int, int], start: int) -> None:
    # Every line is one rounding of float32, in the order that `compiled.py` repeats: change both or neither.
    # In place where a number is not needed again: fresh memory costs more than the arithmetic.
    bits = hashed_bits(noise_keys, start, start + gradient.numel(), gradient.device)
    weight = s.weight.float()
    g = gradient.to(torch.float32, copy=True).mul_(c.gradient_factor)
    v = decode_v(s.v, s.scale)
    m = decode_m(s.m, v, c.correction_before).mul_(c.beta1).add_(g * c.one_minus_beta1)
    v.mul_(c.beta2).add_((g * c.one_minus_beta2).mul_(g))
    root = exact_sqrt_(v.clone()).mul_(c.inverse_root).add_(c.eps)
    change = torch.div(m, root, out=root).mul_(c.step_size)
    # Apart from the weight until the end: a sum in float32 would lose changes below the weight's own float32 spacing.
    moved = decode_residual(s.residual, ulp(s.weight)).sub_(change).sub_(torch.mul(weight, c.decay, out=g))
    s.weight.copy_(torch.add(weight, moved, out=change))
    rounded = s.weight.float()
    rest = weight.sub_(rounded).add_(moved)
    s.residual.copy_(encode_residual(rest, rounded, s.weight.dtype, uniform(bits, 0)))
    code, scale = encode_v(v, uniform(bits, 1))
    s.v.copy_(code)
    s.scale.copy_(scale)
    s.m.copy_(encode_m(m, decode_v(code, scale), c.correction_after, uniform(bits, 2)))
