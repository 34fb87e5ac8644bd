"""Adam's two running averages in 8 + 8 bits.

v is stored as its eighth root within blocks of 128, because a fourth of all values lie far below their block's maximum
and a root code keeps their relative size; m is stored relative to sqrt(v), which bounds it (Cauchy-Schwarz), without
a scale of its own. Both are rounded stochastically: to nearest, codes that should decay slowly never move.
Shapes: N elements of a flattened tensor, B = ceil(N / 128) blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
# (q / 255)^8, the value of each code relative to its block's maximum.
ROOTS = ((np.arange(256) / 255.0) ** 8).astype(np.float32)
M_ENCODE = float(np.float32(127.0 * 9.0 / 8.0))
M_DECODE = float(np.float32(8.0 / (9.0 * 127.0)))
_tables: dict[torch.device, Tensor] = {}


def blocks(count: int) -> int:
    """Blocks that `count` elements fill."""
    return -(-count // BLOCK)


def exact_sqrt(values: Tensor) -> Tensor:
    """Correctly rounded square root: torch's own on a CPU is off by one unit in a fifth of all cases."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sqrt(values.numpy()))
    return values.sqrt()


def encode_v(v_N: Tensor, noise_N: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N,) uint8 and block maxima (B,) float32 of non-negative `v_N`; code 0 only for 0."""
    scale_B = _padded(v_N).view(-1, BLOCK).amax(1)
    ratio = v_N / _spread(torch.where(scale_B > 0, scale_B, 1.0), v_N.numel())
    root = exact_sqrt(exact_sqrt(exact_sqrt(ratio)))
    code = (root * 255.0 + noise_N).floor_().clamp_(1, 255).to(torch.uint8)
    return torch.where(v_N > 0, code, torch.zeros_like(code)), scale_B


def decode_v(code_N: Tensor, scale_B: Tensor) -> Tensor:
    """Float32 values (N,) of codes."""
    table = _tables.get(code_N.device)
    if table is None:
        table = _tables[code_N.device] = torch.from_numpy(ROOTS).to(code_N.device)
    return _spread(scale_B, code_N.numel()) * table[code_N.int()]


def encode_m(m_N: Tensor, v_N: Tensor, correction: float, noise_N: Tensor) -> Tensor:
    """Int8 codes of m relative to `sqrt(v) * correction`; `v_N` as `decode_v` gives it back."""
    d_N = exact_sqrt(v_N) * correction
    r_N = torch.where(d_N > 0, m_N / torch.where(d_N > 0, d_N, 1.0), 0.0)
    z_N = r_N / (r_N.abs() + 1.0)
    return (z_N * M_ENCODE + noise_N).floor_().clamp_(-127, 127).to(torch.int8)


def decode_m(code_N: Tensor, v_N: Tensor, correction: float) -> Tensor:
    """Float32 values (N,); `correction` is that of the step that stored them."""
    z_N = code_N.float() * M_DECODE
    return (exact_sqrt(v_N) * correction) * (z_N / (1.0 - z_N.abs()))


def correction(step: int, betas: tuple[float, float]) -> float:
    """(1 - b1^t) / sqrt(1 - b2^t), in float32: what a constant gradient makes of m / sqrt(v); 1 before any step."""
    if step == 0:
        return 1.0
    return float(np.float32((1 - betas[0] ** step) / (1 - betas[1] ** step) ** 0.5))


def _padded(values_N: Tensor) -> Tensor:
    missing = -values_N.numel() % BLOCK
    return torch.nn.functional.pad(values_N, (0, missing)) if missing else values_N


def _spread(scale_B: Tensor, count: int) -> Tensor:
    return scale_B.repeat_interleave(BLOCK)[:count]
