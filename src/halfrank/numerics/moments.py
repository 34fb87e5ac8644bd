"""Adam's two running averages in 8 + 8 bits.

v is stored as its eighth root within blocks of 128, because a fourth of all values lie far below their block's maximum
and a root code keeps their relative size; m is stored relative to sqrt(v), which bounds it (Cauchy-Schwarz), without
a scale of its own. Both are rounded stochastically: to nearest, codes that should decay slowly never move.
Shapes: N elements of a flattened tensor, B blocks of 128 or, at a tensor's end, one block of less.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from halfrank.numerics.formats import constant
from halfrank.numerics.noise import UNIT

BLOCK = 128
V_UNIT = 2.0**-8
# (q / 255)^4 and (q / 255)^8 are those of q / 256 times these: its powers are exact for longer.
FOURTH, EIGHTH = (float(np.float32((256.0 / 255.0) ** power)) for power in (4, 8))
M_ENCODE = float(np.float32(127.0 * 9.0 / 8.0))
M_DECODE = float(np.float32(8.0 / (9.0 * 127.0)))


def blocks(count: int) -> int:
    """Blocks that `count` elements fill."""
    return -(-count // BLOCK)


def exact_sqrt(values: Tensor, out: Tensor) -> Tensor:
    """Correctly rounded square root: torch's own on a CPU is off by one unit in a fifth of all cases."""
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=out.numpy())
        return out
    return torch.sqrt(values, out=out)


def encode_v(root_N: Tensor, scale_B: Tensor, noise_N: Tensor, out: Tensor) -> Tensor:
    """Codes, in float32 `out`, of v from its square root; code 0 only for 0.

    `scale_B` are the maxima of v itself. Noise from 0 to 65535; `root_N` is overwritten.
    """
    largest_B = torch.where(scale_B > 0, exact_sqrt(scale_B, torch.empty_like(scale_B)), 1.0)
    torch.div(_by_block(root_N), largest_B[:, None], out=_by_block(out))
    for _ in range(2):
        exact_sqrt(out, out)
    # A product with signs, 0 or 1 here, instead of torch.where: exact, and on a CPU ten times faster.
    return out.mul_(constant(255.0)).add_(noise_N, alpha=UNIT).floor_().clamp_(1, 255).mul_(root_N.sign_())


def maxima(v_N: Tensor) -> Tensor:
    """The largest value of each block, (B,)."""
    return _by_block(v_N).amax(1)


def fourth_power_(code_N: Tensor) -> Tensor:
    """Turn float32 codes q of v into (q / 256)^4, what `v_of_` and `root_of` read."""
    for factor in (constant(V_UNIT), code_N, code_N):
        code_N.mul_(factor)
    return code_N


def v_of_(fourth_N: Tensor, scale_B: Tensor) -> Tensor:
    """Turn fourth powers into the values s (q / 255)^8."""
    _by_block(fourth_N.mul_(fourth_N)).mul_((scale_B * constant(EIGHTH))[:, None])
    return fourth_N


def root_of(fourth_N: Tensor, scale_B: Tensor, correction: Tensor, out: Tensor) -> Tensor:
    """sqrt(v) times `correction`, in `out`, without a root of each: that of s (q / 255)^8 is sqrt(s) (q / 255)^4."""
    factor_B = exact_sqrt(scale_B, torch.empty_like(scale_B)).mul_(constant(FOURTH)).mul_(correction)
    torch.mul(_by_block(fourth_N), factor_B[:, None], out=_by_block(out))
    return out


def encode_m_(m_N: Tensor, root_N: Tensor, noise_N: Tensor) -> Tensor:
    """Turn m into its code relative to what `root_of` gives, which is overwritten."""
    r_N = m_N.div_(root_N)
    z_N = torch.div(r_N, torch.abs(r_N, out=root_N).add_(constant(1.0)), out=r_N)
    z_N.nan_to_num_(0.0)  # where v is 0 and m / 0 not a finite number
    return z_N.mul_(constant(M_ENCODE)).add_(noise_N, alpha=UNIT).floor_().clamp_(-127, 127)


def decode_m_(root_N: Tensor, code_N: Tensor, spare: Tensor) -> Tensor:
    """Turn roots, with the correction of the step that stored them, into m of float32 codes, which are overwritten."""
    z_N = code_N.mul_(constant(M_DECODE))
    r_N = z_N.div_(torch.sub(constant(1.0), torch.abs(z_N, out=spare), out=spare))
    return root_N.mul_(r_N)


def correction(step: int, betas: tuple[float, float]) -> float:
    """(1 - b1^t) / sqrt(1 - b2^t), in float32: what a constant gradient makes of m / sqrt(v); 1 before any step."""
    if step == 0:
        return 1.0
    return float(np.float32((1 - betas[0] ** step) / (1 - betas[1] ** step) ** 0.5))


def _by_block(values_N: Tensor) -> Tensor:
    return values_N.view(-1, min(BLOCK, values_N.numel()))
