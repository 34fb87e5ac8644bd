"""Dropout for CPUs: 16 bits of a hash decide an element, where torch draws a float64 for each on one thread.

Two keys from torch's generator and an element's place are all that its bits depend on. So nothing is kept for the
backward pass, which drops the same elements of the gradient again. With numba that is one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from halfrank.numerics.noise import Keys, hashed_bits
from halfrank.numerics.widen import has_numba

LEVELS = 1 << 16
COMPILED = (torch.float32, torch.float16, torch.bfloat16)  # what kernels of our own take


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with a share `p` of its elements set to 0 and the others divided by 1 - p; torch's own outside CPUs.

    The share is the nearest multiple of 2^-16, and the divisor belongs to that share: the mean is exact. Random bits
    come from torch's default generator, so a seed or a restored state repeats them.
    """
    if x.device.type != "cpu" or not 0.0 < p < 1.0:
        return F.dropout(x, p)
    return _Dropout.apply(x, round(p * LEVELS), *new_keys(x, 1))


def module_dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    """What stands in for the forward of an `nn.Dropout`."""
    return dropout(x, module.p) if module.training else x


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, keys: Keys) -> Tensor:
        ctx.dropped, ctx.keys = dropped, keys
        return drop_levels(x, dropped, keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(grad, ctx.dropped, ctx.keys), None, None


def new_keys(like: Tensor, count: int) -> list[Keys]:
    """What decides the elements of `count` dropouts, drawn from torch's default generator."""
    if isinstance(like, FakeTensor):  # a pass on shapes alone draws nothing
        return [(0, 0)] * count
    words = torch.empty(count, dtype=torch.int64, device="cpu").random_(-(2**63), None).tolist()
    return [(word & 0xFFFFFFFF, (word >> 32) & 0xFFFFFFFF) for word in words]


def suits_kernels(x: Tensor) -> bool:
    """Whether kernels of our own may read `x`: who watches torch's operations, or has shapes alone, would miss them."""
    known = type(x) is Tensor and x.device.type == "cpu" and x.dtype in COMPILED
    there = known and torch._C._has_storage(x) and not x.is_neg()  # its own numbers lie at its address
    return there and has_numba() and not is_in_torch_dispatch_mode()


def threshold(dropped: int) -> tuple[int, float]:
    """Of `dropped` in 2^16: the least signed 16 bits with which an element is kept, and what it is multiplied by."""
    return dropped - LEVELS // 2, LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def drop_levels(x: Tensor, dropped: int, keys: Keys) -> Tensor:
    """`x` with `dropped` of 2^16 elements set to 0, which `keys` decide, and the others scaled; no gradient."""
    if dropped >= LEVELS:
        return torch.zeros_like(x)
    least, scale = threshold(dropped)
    if suits_kernels(x):
        from halfrank.numerics import compiled_dropout

        return compiled_dropout.drop(x, keys, least, scale)
    if isinstance(x, FakeTensor):
        return torch.empty_like(x)
    # One hash for two neighbours, the low half for the first: what numba computes.
    halves = hashed_bits(keys, 0, -(-x.numel() // 2)).view(torch.int16)
    kept = halves[: x.numel()].view(x.shape) >= least
    return (x * kept.view(torch.uint8)).mul_(scale)  # a product with bool takes twice the time
