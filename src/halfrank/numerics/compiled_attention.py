"""Attention with dropout compiled by numba. Importing it compiles it, and needs the extra `[fast]`.

A pair and a head are a ticket, whose scores stay in the cache. Kept for the backward pass are the shares, and the sign
of each says whether it was dropped; which are, is what `model/dropout.py` says in torch's operations, to the bit. The
softmax is right to a few units in the last place; NaN in a row makes all of it NaN, as in torch.
Shapes: T tokens, H heads, D head size, P pairs, Q queries and L keys of a pair, K keys with those that fill a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from halfrank.numerics.compiled import inline
from halfrank.numerics.compiled_dropout import as_float, bits, kept
from halfrank.numerics.compiled_exp import exp
from halfrank.numerics.noise import Keys
from halfrank.numerics.team import FLOAT, WORD, WORDS, Kernel, compile_once, floats_at, whole_registers, words_at
from halfrank.numerics.tiles import LANES, product

ROWS = 24  # of scores at a time, whole tiles
FIELDS = 8  # of a pair: first query, first key, Q, L, K, first share, place of its keys, its first element for the hash
FORWARD, BACKWARD = 4, 7  # tensors: an address, and how many elements the next token and the next head are away
_f, _u, _i = np.float32, np.uint32, np.int32
_ZERO, _ONE = _f(0.0), _f(1.0)
_LOWEST = _i(-(2**31))
_NOTHING = _f(-100.0)


def _summing(function: Any) -> Any:
    # In any order, so that the sum is made in vectors.
    return njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})(function)


@inline
def _ordered(pattern: Any) -> Any:
    # As integers these are in the order of the floats, NaN above infinity; twice is back. Their maximum is a vector's.
    return _i(pattern ^ _i((pattern >> _i(31)) & _i(0x7FFFFFFF)))


@_summing
def _sum(row: Any) -> Any:
    total = _ZERO
    for j in range(row.shape[0]):
        total += row[j]
    return total


@_summing
def _mean(shares: Any, row: Any) -> Any:
    total = _ZERO
    for j in range(row.shape[0]):
        total += abs(shares[j]) * row[j]
    return total


_word, _float = types.int64, types.float32


@compile_once(*[_word] * 6, _float)
def _turn(out: Any, place: Any, stride: Any, length: Any, padded: Any, size: Any, scale: Any) -> None:
    """(D, K) at an address of the (L, D) at another times `scale`, with 0 beyond L."""
    turned = floats_at(out, size * padded)
    for j in range(length):
        row = floats_at(place + FLOAT * j * stride, size)
        for d in range(size):
            turned[d * padded + j] = row[d] * scale
    for d in range(size):
        for j in range(length, padded):
            turned[d * padded + j] = _ZERO


@compile_once(*[_word] * 4)
def _soften(place: Any, rows: Any, length: Any, padded: Any) -> None:
    """Softmax of each row of scores, over its first `length`."""
    whole_registers()
    scores = floats_at(place, rows * padded)
    for i in range(rows):
        row = scores[i * padded : (i + 1) * padded]
        top = _LOWEST
        for j in range(length):
            top = max(top, _ordered(_f(row[j]).view(np.int32)))
        largest = _i(_ordered(top)).view(np.float32)
        for j in range(length):
            row[j] = row[j] - largest
        for j in range(length, padded):
            row[j] = _NOTHING
    for j in range(rows * padded):  # of all rows at once
        scores[j] = exp(scores[j])
    for i in range(rows):
        row = scores[i * padded : (i + 1) * padded]
        inverse = _ONE / _sum(row)
        for j in range(padded):
            row[j] = row[j] * inverse


@compile_once(_word, _word, _word, types.uint32, types.uint32, types.uint32, types.int32, _float)
def _drop_row(place: Any, out: Any, count: Any, first: Any, key0: Any, key1: Any, least: Any, scale: Any) -> None:
    """A row of shares: what dropout leaves of it, and where it lies a minus for what was dropped."""
    whole_registers()
    row, left = floats_at(place, count), floats_at(out, count)
    for j in range(count):
        share, stays = row[j], kept(_u(first + _u(j)), key0, key1, least)
        left[j] = share * (scale if stays else _ZERO)
        row[j] = share if stays else -share


@compile_once(*[_word] * 5, _float, _float)
def _back(place: Any, left_at: Any, grad_at: Any, rows: Any, padded: Any, drop_scale: Any, scale: Any) -> None:
    """What dropout had left of the shares, and their gradient turned into that of the scores."""
    whole_registers()
    shares, left, grad = (
        floats_at(place, rows * padded), floats_at(left_at, rows * padded), floats_at(grad_at, rows * padded)
    )  # fmt: skip
    for j in range(rows * padded):
        share = shares[j]
        factor = _ZERO if share <= _ZERO else drop_scale
        left[j] = share * factor
        grad[j] = grad[j] * factor
    for i in range(rows):
        here = slice(i * padded, (i + 1) * padded)
        share, row = shares[here], grad[here]
        mean = _mean(share, row)
        # In this order a share of 1 has a gradient of exactly 0.
        for j in range(padded):
            row[j] = abs(share[j]) * (row[j] - mean) * scale


turn, soften, drop_row, back = _turn.ctypes, _soften.ctypes, _drop_row.ctypes, _back.ctypes


@inline
def _place(operands: Any, which: Any, token: Any, head: Any) -> Any:
    return operands[3 * which] + FLOAT * (token * operands[3 * which + 1] + head * operands[3 * which + 2])


@inline
def _work(words: Any, ticket: Any, seat: Any) -> Any:
    """The pair and the head of a ticket, and the two parts of its seat's room."""
    pair = words_at(words[5] + WORD * FIELDS * (ticket // words[0]), FIELDS)
    turned = words[7] + FLOAT * seat * words[8]
    return pair, ticket % words[0], turned, turned + FLOAT * words[1] * pair[4]


@Kernel
def _attend(address: Any, ticket: Any, seat: Any) -> None:
    words = words_at(address, WORDS)
    size, least, drop_scale, scale = words[1], _i(words[2]), as_float(words[3]), as_float(words[4])
    pair, head, turned, left = _work(words, ticket, seat)
    operands = words_at(words[6], 3 * FORWARD)
    queries, length, padded = pair[2], pair[3], pair[4]
    keys = words_at(words[10] + 2 * WORD * pair[6], 2)
    key, value = _place(operands, 1, pair[1], head), _place(operands, 2, pair[1], head)
    turn(turned, key, operands[4], length, padded, size, scale)
    for first in range(0, queries, ROWS):
        rows, number = min(ROWS, queries - first), head * queries + first
        shares = words[9] + FLOAT * (pair[5] + number * padded)
        query, out = _place(operands, 0, pair[0] + first, head), _place(operands, 3, pair[0] + first, head)
        product(shares, padded, query, operands[1], 1, turned, padded, rows, padded, size)
        soften(shares, rows, length, padded)
        for i in range(rows):
            row = FLOAT * i * padded
            drop_row(
                shares + row, left + row, padded, _u(pair[7] + (number + i) * length), _u(keys[0]), _u(keys[1]), least,
                drop_scale,
            )  # fmt: skip
        product(out, operands[10], left, padded, 1, value, operands[7], rows, size, length)


@Kernel
def _attend_back(address: Any, ticket: Any, seat: Any) -> None:
    words = words_at(address, WORDS)
    size, drop_scale, scale = words[1], as_float(words[3]), as_float(words[4])
    pair, head, turned, left = _work(words, ticket, seat)
    operands = words_at(words[6], 3 * BACKWARD)
    queries, length, padded = pair[2], pair[3], pair[4]
    grad = left + FLOAT * queries * padded
    query, key = _place(operands, 0, pair[0], head), _place(operands, 1, pair[1], head)
    value, given = _place(operands, 2, pair[1], head), _place(operands, 3, pair[0], head)
    to_query, to_key = _place(operands, 4, pair[0], head), _place(operands, 5, pair[1], head)
    to_value = _place(operands, 6, pair[1], head)
    turn(turned, value, operands[7], length, padded, size, _ONE)
    product(grad, padded, given, operands[10], 1, turned, padded, queries, padded, size)
    back(words[9] + FLOAT * (pair[5] + head * queries * padded), left, grad, queries, padded, drop_scale, scale)
    product(to_query, operands[13], grad, padded, 1, key, operands[4], queries, size, length)
    product(to_key, operands[16], grad, 1, padded, query, operands[1], length, size, queries)
    product(to_value, operands[19], left, 1, padded, given, operands[10], length, size, queries)


@dataclass(frozen=True)
class Layout:
    """Where the pairs of a packed row lie, and their shares: of each pair and head Q rows of K."""

    pairs: Tensor  # (P, FIELDS) int64
    shares: int  # elements
    scores: int  # elements of the largest pair's head
    keys: int  # K of the longest pair


@lru_cache(maxsize=8)  # the layers of a step ask for the same
def layout_of(counts: tuple[int, ...], queries: tuple[int, ...], lengths: tuple[int, ...], heads: int) -> Layout:
    """Of runs of `counts` pairs of one length each; the keys of a hash belong to a run."""
    rows: list[tuple[int, ...]] = []
    query = key = share = largest = widest = 0
    for run, (count, reading, length) in enumerate(zip(counts, queries, lengths, strict=True)):
        padded = -(-length // LANES) * LANES
        scores = reading * padded
        largest, widest = max(largest, scores), max(widest, padded)
        for number in range(count):
            rows.append((query, key, reading, length, padded, share, run, number * heads * reading * length))
            query, key, share = query + reading, key + length, share + heads * scores
    return Layout(torch.tensor(rows, dtype=torch.int64, device="cpu"), share, largest, widest)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, keys: Sequence[Keys], least: int, drop_scale: float,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with dropout of float32 (1, H, T, D), as (1, T, H, D), and the shares that `attend_back` reads."""
    query, key, value = (_lined(tensor) for tensor in (query, key, value))
    out = query.new_empty(1, query.shape[2], *query.shape[1::2])
    shares = query.new_empty(layout.shares)
    hashes, tensors = torch.tensor(keys, dtype=torch.int64, device="cpu"), (query, key, value, out.transpose(1, 2))
    _call(_attend, layout, tensors, shares, (least, drop_scale, scale), hashes.data_ptr())
    return out, shares


def attend_back(
    query: Tensor, key: Tensor, value: Tensor, shares: Tensor, grad: Tensor, layout: Layout, drop_scale: float,
    scale: float, grads: Sequence[Tensor],
) -> None:  # fmt: skip
    """Fill `grads`, like query, key and value, with their gradients; `grad` is (1, T, H, D)."""
    query, key, value, grad = (_lined(tensor) for tensor in (query, key, value, grad.transpose(1, 2)))
    _call(_attend_back, layout, (query, key, value, grad, *grads), shares, (0, drop_scale, scale))


def _call(
    kernel: Kernel, layout: Layout, tensors_1HTD: Sequence[Tensor], shares: Tensor, numbers: tuple[int, float, float],
    *more: int,
) -> None:  # fmt: skip
    heads, size = tensors_1HTD[0].shape[1::2]
    # Whatever torch's default format and device are now: another thread may load a model in 16 bits.
    places = [(t.data_ptr(), t.stride(2), t.stride(1)) for t in tensors_1HTD]
    operands = torch.tensor(places, dtype=torch.int64, device="cpu")
    least, drop_scale, scale = numbers
    seat = layout.keys * (size + ROWS) + 2 * layout.scores
    room = torch.empty(torch.get_num_threads() * seat, dtype=torch.float32, device="cpu")
    kernel(
        heads, size, least, bits(drop_scale), bits(scale), layout.pairs.data_ptr(), operands.data_ptr(),
        room.data_ptr(), seat, shares.data_ptr(), *more, tickets=len(layout.pairs) * heads,
    )  # fmt: skip


def _lined(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
