"""Adam's two running averages in 8 + 8 bits.

v is stored as its eighth root within blocks of 128, because a fourth of all values lie far below their block's maximum
and a root code keeps their relative size; m is stored relative to sqrt(v), which bounds it (Cauchy-Schwarz), without
a scale of its own. Both are rounded stochastically: to nearest, codes that should decay slowly never move.
Shapes: N elements of a flattened tensor, B blocks of 128 or, at a tensor's end, one block of less.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.noise import UNIT

BLOCK = 128
# (q / 255)^8, the value of each code relative to its block's maximum.
ROOTS = ((np.arange(256) / 255.0) ** 8).astype(np.float32)
M_ENCODE = float(np.float32(127.0 * 9.0 / 8.0))
M_DECODE = float(np.float32(8.0 / (9.0 * 127.0)))
_Z = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32) * np.float32(M_DECODE)
RELATIVE = _Z / (np.float32(1.0) - np.abs(_Z))  # r = z / (1 - |z|) of each code's byte


def blocks(count: int) -> int:
    """Blocks that `count` elements fill."""
    return -(-count // BLOCK)


def exact_sqrt(values: Tensor, out: Tensor) -> Tensor:
    """Correctly rounded square root: torch's own on a CPU is off by one unit in a fifth of all cases."""
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=out.numpy())
        return out
    return torch.sqrt(values, out=out)


def encode_v(v_N: Tensor, noise_N: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of non-negative `v_N`, in float32 `out`, and block maxima (B,); code 0 only for 0.

    Noise from 0 to 65535; `v_N` is overwritten.
    """
    v_BL, root_BL = _by_block(v_N), _by_block(out)
    scale_B = v_BL.amax(1)
    torch.div(v_BL, torch.where(scale_B > 0, scale_B, 1.0)[:, None], out=root_BL)
    for _ in range(3):
        exact_sqrt(out, out)
    # A product with signs, 0 or 1 here, instead of torch.where: exact, and on a CPU ten times faster.
    return out.mul_(255.0).add_(noise_N, alpha=UNIT).floor_().clamp_(1, 255).mul_(v_N.sign_()), scale_B


def decode_v(code_N: Tensor, scale_B: Tensor, out: Tensor) -> Tensor:
    """Float32 values, in `out`, of int32 codes."""
    torch.index_select(_table("v", code_N.device), 0, code_N, out=out)
    _by_block(out).mul_(scale_B[:, None])
    return out


def encode_m_(m_N: Tensor, v_N: Tensor, correction: Tensor, noise_N: Tensor) -> Tensor:
    """Turn m into its code relative to `sqrt(v) * correction`, `v_N` as `decode_v` gives it back and overwritten."""
    r_N = m_N.div_(exact_sqrt(v_N, v_N).mul_(correction))
    z_N = torch.div(r_N, torch.abs(r_N, out=v_N).add_(1.0), out=r_N)
    z_N.nan_to_num_(0.0)  # where v is 0 and m / 0 not a finite number
    return z_N.mul_(M_ENCODE).add_(noise_N, alpha=UNIT).floor_().clamp_(-127, 127)


def decode_m(byte_N: Tensor, v_N: Tensor, correction: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """Float32 values, in `out`, of codes' bytes as int32; `correction` is that of the step that stored them."""
    torch.index_select(_table("m", byte_N.device), 0, byte_N, out=spare)
    return exact_sqrt(v_N, out).mul_(correction).mul_(spare)


def correction(step: int, betas: tuple[float, float]) -> float:
    """(1 - b1^t) / sqrt(1 - b2^t), in float32: what a constant gradient makes of m / sqrt(v); 1 before any step."""
    if step == 0:
        return 1.0
    return float(np.float32((1 - betas[0] ** step) / (1 - betas[1] ** step) ** 0.5))


@cache
def _table(moment: str, device: torch.device) -> Tensor:
    return torch.from_numpy({"v": ROOTS, "m": RELATIVE}[moment]).to(device)


def _by_block(values_N: Tensor) -> Tensor:
    return values_N.view(-1, min(BLOCK, values_N.numel()))
