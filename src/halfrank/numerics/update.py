"""The 16-bit AdamW update of a run of elements, in plain torch: the reference that the compiled one equals to the bit.

Shapes: N elements of one flattened tensor, a whole number of blocks or, at the tensor's end, less than one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from halfrank.numerics.formats import ulp
from halfrank.numerics.moments import (
    BLOCK,
    correction,
    decode_m_,
    encode_m_,
    encode_v,
    exact_sqrt,
    fourth_power_,
    maxima,
    root_of,
    v_of_,
)
from halfrank.numerics.noise import folded, hashed_from, sixteen
from halfrank.numerics.rounding import decode_residual_, encode_residual_
from halfrank.numerics.threads import in_turn

# Elements at a time, a power of two: enough for torch to share out each operation, few enough for a room of 10 MB.
CHUNK = 1 << 18
GPU_CHUNK = 1 << 21  # a GPU begins an operation in the time that a million elements take
_kept = threading.local()


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
    """The numbers of one update in float32, as tensors: torch makes one of a Python number in each operation."""

    gradient_factor: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    inverse_root: Tensor
    eps: Tensor
    decay: Tensor
    correction_before: Tensor
    correction_after: Tensor

    def packed(self) -> Tensor:
        """All of them in the order above, (11,)."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])


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
    return Coefficients(*torch.tensor(values, dtype=torch.float32))


class Room:
    """What the update of a chunk works in, 40 bytes an element: fresh memory would cost more than the arithmetic."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self.numbers = folded(count, device)
        self.ints = torch.empty(2, count, dtype=torch.int32, device=device)
        self.floats = torch.empty(7, count, dtype=torch.float32, device=device)

    def part(self, count: int) -> tuple[Tensor, ...]:
        """The numbers below `count`, two int32 and seven float32 tensors of so many elements."""
        return (self.numbers[:count], *self.ints[:, :count], *self.floats[:, :count])


def update_(stored: Stored, gradient: Tensor, numbers: Coefficients, noise_keys: tuple[int, int]) -> None:
    """Update a whole tensor in place, chunk by chunk."""

    def run(start: int, stop: int) -> None:
        room = _room(stop - start, gradient.device)
        _update_chunk(stored.part(start, stop), gradient[start:stop], numbers, noise_keys, start, room)

    whole = gradient.numel() // BLOCK * BLOCK
    # Threads of our own would wait for the interpreter: a chunk is seventy operations.
    in_turn(run, whole, CHUNK if gradient.device.type == "cpu" else GPU_CHUNK)
    if whole < gradient.numel():
        run(whole, gradient.numel())


def _room(count: int, device: torch.device) -> Room:
    if device.type != "cpu":
        return Room(count, device)  # its allocator keeps what was used
    if not hasattr(_kept, "room") or _kept.room.count < count:
        with torch.inference_mode(False):  # another call may be outside of it
            _kept.room = Room(count, device)
    kept: Room = _kept.room
    return kept


def _update_chunk(
    s: Stored, gradient: Tensor, c: Coefficients, noise_keys: tuple[int, int], start: int, room: Room
) -> None:
    # Every line is one rounding of float32, in the order that `compiled.py` repeats: change both or neither.
    numbers, bits, index, weight, g, v, m, moved, spare, noise = room.part(gradient.numel())
    dtype = s.weight.dtype
    hashed_from(noise_keys, start, numbers, bits, index)
    weight.copy_(s.weight)
    g.copy_(gradient).mul_(c.gradient_factor)
    fourth_power_(v.copy_(s.v))
    decode_m_(root_of(v, s.scale, c.correction_before, m), spare.copy_(s.m), noise)
    m.mul_(c.beta1).add_(torch.mul(g, c.one_minus_beta1, out=spare))
    v_of_(v, s.scale).mul_(c.beta2).add_(torch.mul(g, c.one_minus_beta2, out=spare).mul_(g))
    s.scale.copy_(maxima(v))
    root = exact_sqrt(v, v)
    change = torch.div(m, torch.mul(root, c.inverse_root, out=spare).add_(c.eps), out=spare).mul_(c.step_size)
    # Apart from the weight until the end: a sum in float32 would lose changes below the weight's own float32 spacing.
    decode_residual_(moved.copy_(s.residual), ulp(weight, dtype, noise)).sub_(change)
    moved.sub_(torch.mul(weight, c.decay, out=g))
    s.weight.copy_(torch.add(weight, moved, out=spare))
    rounded = g.copy_(s.weight)
    rest = weight.sub_(rounded).add_(moved)
    s.residual.copy_(encode_residual_(rest, ulp(rounded, dtype, spare), sixteen(bits, 0, noise, index)))
    code = encode_v(root, s.scale, sixteen(bits, 1, noise, index), spare)
    s.v.copy_(index.copy_(code))
    relative_to = root_of(fourth_power_(code), s.scale, c.correction_after, v)
    s.m.copy_(encode_m_(m, relative_to, sixteen(bits, 2, noise, index)))
