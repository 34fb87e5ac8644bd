"""Rounding noise as a function of (seed, step, tensor, element): nothing to store, the same on every machine.

The mixer is lowbias32 (Chris Wellons, "Prospecting for Hash Functions", 2018) with a second key between its rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfrank.numerics.formats import constant

Keys = tuple[int, int]  # 32 bits each: what the noise of one tensor at one moment depends on
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
UNIT = 2.0**-16
_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def keys(seed: int, step: int, tensor: int) -> Keys:
    """Two 32-bit keys of one tensor at one step (the finaliser of SplitMix64 over the three numbers)."""
    state = 0
    for number in (seed, step, tensor):
        state = (state + 0x9E3779B97F4A7C15 + (number & _MASK64)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state & _MASK32, state >> 32


def hashed_bits(pair: tuple[int, int], start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits, as int32, for each element from `start` to `stop`."""
    bits = torch.arange(start, stop, device=device).to(torch.int32).bitwise_xor_(_signed(pair[0]))
    return _mixed_(_folded(bits), pair[1])


def folded(count: int, device: torch.device) -> Tensor:
    """What `hashed_from` reads: the numbers below `count` after the mixer's first step, which needs no key."""
    return _folded(torch.arange(count, dtype=torch.int32, device=device))


def hashed_from(pair: tuple[int, int], start: int, low: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """`hashed_bits` of as many elements as `low` has, into `out`; `start` divides by a power of two of that size."""
    # start + number is start ^ number, without a carry, and shifts pass through exclusive ors: one for all of them.
    first = (start ^ pair[0]) & _MASK32
    return _mixed_(torch.bitwise_xor(low, _signed(first ^ first >> 16), out=out), pair[1], spare)


def sixteen(bits: Tensor, field: int, out: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
    """16 of the 32 bits as float32 numbers from 0 to 65535: field 0 the lowest, 1 the middle, 2 the highest.

    Times `UNIT` they are uniform in [0, 1). They go into `out`; int32 `spare` is overwritten.
    """
    moved = bits if field == 0 else torch.bitwise_right_shift(bits, constant(8 * field, torch.int32), out=spare)
    whole = torch.bitwise_and(moved, constant(0xFFFF, torch.int32), out=spare)
    return whole.float() if out is None else out.copy_(whole)


def _folded(bits: Tensor) -> Tensor:
    return bits ^ _shifted(bits, 16)


def _mixed_(bits: Tensor, key: int, spare: Tensor | None = None) -> Tensor:
    bits.mul_(constant(_signed(FIRST), torch.int32)).bitwise_xor_(_signed(key))
    bits.bitwise_xor_(_shifted(bits, 15, spare)).mul_(constant(_signed(SECOND), torch.int32))
    return bits.bitwise_xor_(_shifted(bits, 16, spare))


def _shifted(bits: Tensor, by: int, out: Tensor | None = None) -> Tensor:
    # int32 shifts right with its sign; the mask makes it the unsigned shift of the mixer.
    mask = constant(_MASK32 >> by, torch.int32)
    return torch.bitwise_right_shift(bits, constant(by, torch.int32), out=out).bitwise_and_(mask)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
