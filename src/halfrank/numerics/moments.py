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


def exact_sqrt_(values: Tensor) -> Tensor:
    """Correctly rounded square root, in place: torch's own on a CPU is off by one unit in a fifth of all cases."""
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=values.numpy())
        return values
    return values.sqrt_()


def encode_v(v_N: Tensor, noise_N: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N,) uint8 and block maxima (B,) float32 of non-negative `v_N`; code 0 only for 0."""
    scale_B = _padded(v_N).view(-1, BLOCK).amax(1)
    ratio = v_N / _spread(torch.where(scale_B > 0, scale_B, 1.0), v_N.numel())
    root = exact_sqrt_(exact_sqrt_(exact_sqrt_(ratio)))
    # Products with signs, 0 or 1 here, instead of torch.where: exact, and on a CPU thirty times faster.
    code = root.mul_(255.0).add_(noise_N).floor_().clamp_(1, 255).mul_(v_N.sign())
    return code.to(torch.int16).to(torch.uint8), scale_B


def decode_v(code_N: Tensor, scale_B: Tensor) -> Tensor:
    """Float32 values (N,) of codes."""
    table = _tables.get(code_N.device)
    if table is None:
        table = _tables[code_N.device] = torch.from_numpy(ROOTS).to(code_N.device)
    return table.index_select(0, code_N.int()).mul_(_spread(scale_B, code_N.numel()))


def encode_m(m_N: Tensor, v_N: Tensor, correction: float, noise_N: Tensor) -> Tensor:
    """Int8 codes of m relative to `sqrt(v) * correction`; `v_N` as `decode_v` gives it back."""
    d_N = exact_sqrt_(v_N.clone()).mul_(correction)
    there_N = d_N.sign()  # 0 where d is 0: m is divided by 1 there, and the quotient dropped
    r_N = (m_N / d_N.add_(there_N.neg().add_(1.0))).mul_(there_N)
    z_N = r_N.div_(r_N.abs().add_(1.0))
    return z_N.mul_(M_ENCODE).add_(noise_N).floor_().clamp_(-127, 127).to(torch.int8)


def decode_m(code_N: Tensor, v_N: Tensor, correction: float) -> Tensor:
    """Float32 values (N,); `correction` is that of the step that stored them."""
    z_N = code_N.float().mul_(M_DECODE)
    z_N = z_N.div_(z_N.abs().neg_().add_(1.0))
    return exact_sqrt_(v_N.clone()).mul_(correction).mul_(z_N)


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
