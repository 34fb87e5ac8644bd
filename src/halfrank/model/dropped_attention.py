"""Attention with dropout over a packed row on CPUs: one autograd node a layer, and each gradient written in its place.

With dropout torch's attention on CPUs is a plain sum too. As single operations it costs a dozen nodes for each run of
pairs, and every gradient is copied twice on its way back into the row. Kept for the backward pass are the softmax's
shares; which of them stayed, and the dropped shares, are made again. With numba, kernels of our own do it, where every
token reads every other: most of what products of so small matrices take from a library is to begin. They compute in
float32, 16-bit rows too, which have nothing to gain there from products of their own.
Shapes: T tokens in the row, Q queries (T, or one a pair), H heads, D head size, N pairs of one length L in a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from halfrank.model.dropout import COMPILED, LEVELS, drop_levels, new_keys, threshold
from halfrank.numerics.widen import has_numba

TILE = 16  # kernels of our own take heads of a multiple of it


def dropped_attention(
    query_1HQD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    *,
    counts: Sequence[int],
    lengths: Sequence[int],
    bands: Sequence[Tensor | None],
    dropout: float,
    scale: float,
) -> Tensor:
    """(1, Q, H, D); `bands` say for each run which of its L keys each query reads, None for all of them."""
    dropped = round(dropout * LEVELS)
    return _DroppedAttention.apply(query_1HQD, key_1HTD, value_1HTD, counts, lengths, bands, dropped, scale)


def use_once() -> None:
    """Compile what compiles when it is first used; no random number is drawn for it."""
    tensors = [torch.zeros(1, 1, 1, TILE, requires_grad=True) for _ in range(3)]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        found = dropped_attention(*tensors, counts=[1], lengths=[1], bands=[None], dropout=0.5, scale=1.0)
        torch.autograd.grad(found.sum(), tensors)


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        counts: Sequence[int],
        lengths: Sequence[int],
        bands: Sequence[Tensor | None],
        dropped: int,
        scale: float,
    ) -> Tensor:
        ctx.counts, ctx.lengths, ctx.dropped, ctx.scale = counts, lengths, dropped, scale
        ctx.keys = new_keys(query, len(counts))
        ctx.own = _own(query, key, value, bands)
        narrow, given = query.dtype, (query, key, value)
        query, key, value = _computed(given, ctx.own)
        queries = _queries(query, key, value, counts, lengths)
        ctx.layout = _layout(counts, queries, lengths, query.shape[1]) if ctx.own else None
        if ctx.layout is not None:
            from halfrank.numerics import compiled_attention

            out, shares = compiled_attention.attend(query, key, value, ctx.layout, ctx.keys, *threshold(dropped), scale)
            ctx.save_for_backward(*given, shares)
            return out.to(narrow)
        out = query.new_empty(1, query.shape[2], *query.shape[1::2])
        saved: list[Tensor] = []
        rows = (query * scale, key, value, out.transpose(1, 2))
        for q, k, v, mixed, band, keys in zip(*_runs(rows, counts, lengths), bands, ctx.keys, strict=True):
            scores = _product(q, k.mT)
            if band is not None:
                scores = scores.masked_fill(~band, float("-inf"))
            shares = scores.softmax(-1)
            mixed.copy_(_product(drop_levels(shares, dropped, keys), v))
            saved.append(shares)
        ctx.save_for_backward(*given, *saved)
        return out.to(narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        return *_Gradients.apply(query, key, value, grad, saved, ctx), None, None, None, None, None


class _Gradients(torch.autograd.Function):
    """The gradients as a node of their own, so that whoever asks for theirs hears that there are none."""

    @staticmethod
    def forward(
        _: Any, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, saved: Sequence[Tensor], ctx: Any
    ) -> tuple[Tensor, ...]:
        narrow = query.dtype
        query, key, value, grad = _computed((query, key, value, grad), ctx.own)
        # Laid out as the projections read them, tokens before heads: no copy on the way there.
        grads = [
            torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format) for t in (query, key, value)
        ]
        grads = [gradient.transpose(1, 2) for gradient in grads]
        if ctx.layout is not None:
            from halfrank.numerics.compiled_attention import attend_back

            _, drop_scale = threshold(ctx.dropped)
            attend_back(query, key, value, saved[0], grad, ctx.layout, drop_scale, ctx.scale, grads)
            return tuple(gradient.to(narrow) for gradient in grads)
        rows = (grad.transpose(1, 2), query, key, value, *grads)
        runs = _runs(rows, ctx.counts, ctx.lengths)
        for g, q, k, v, grad_q, grad_k, grad_v, shares, keys in zip(*runs, saved, ctx.keys, strict=True):
            grad_v.copy_(_product(drop_levels(shares, ctx.dropped, keys).mT, g))
            grad_shares = drop_levels(_product(g, v.mT), ctx.dropped, keys)
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_q.copy_(_product(grad_scores, k))
            grad_k.copy_(_product(grad_scores.mT, q))
        grads[0].mul_(ctx.scale)
        grads[1].mul_(ctx.scale)
        return tuple(gradient.to(narrow) for gradient in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "Attention with dropout has no second derivative here. Without create_graph=True it is not asked for; with "
            "a gradient penalty, set attention's dropout to 0."
        )


def _own(query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Tensor | None]) -> bool:
    """Whether kernels of our own do it; somebody who watches sees torch's operations, in the kernels' float32."""
    if query.device.type != "cpu" or not has_numba() or any(band is not None for band in bands):
        return False
    rows = (query, key, value)
    sizes, formats = {tensor.shape[-1] for tensor in rows}, {tensor.dtype for tensor in rows}
    return len(sizes) == len(formats) == 1 and sizes.pop() % TILE == 0 and formats.pop() in COMPILED


def _computed(rows: Sequence[Tensor], own: bool) -> Sequence[Tensor]:
    return [tensor.float() for tensor in rows] if own else rows


def _queries(query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> Sequence[int]:
    """How many queries a pair of each run has; raises ValueError where the three are no row of these runs."""
    queries = lengths if query.shape[2] == key.shape[2] else [1] * len(counts)
    rows = (sum(map(mul, counts, queries)), *[sum(map(mul, counts, lengths))] * 2)
    heads, stacks = ({tensor.shape[axis] for tensor in (query, key, value)} for axis in (1, 0))
    if rows != (query.shape[2], key.shape[2], value.shape[2]) or len(heads) > 1 or stacks != {1}:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"Queries, keys and values of {shapes} are no row of {list(counts)} pairs of {list(lengths)}.")
    return queries


def _layout(counts: Sequence[int], queries: Sequence[int], lengths: Sequence[int], heads: int) -> Any:
    """What compiled kernels know the row by; None where torch's operations do it."""
    if is_in_torch_dispatch_mode():  # whoever watches torch's operations would not see numba's
        return None
    from halfrank.numerics import compiled_attention

    return compiled_attention.layout_of(tuple(counts), tuple(queries), tuple(lengths), heads)


def by_pair(run_1HTD: Tensor, count: int, length: int) -> Tensor:
    """(N, H, L, D) of the (1, H, N * L, D) part of a row that `count` pairs of one length are."""
    return run_1HTD.unflatten(2, (count, length))[0].transpose(0, 1)


def _runs(rows: Sequence[Tensor], counts: Sequence[int], lengths: Sequence[int]) -> Iterator[list[Tensor]]:
    """Views of each row, run by run: `by_pair`, or (H, L, D) of a run of one pair, which is made with one operation.

    A row with one token a pair is one of pairs of length 1.
    """
    tokens = sum(count * length for count, length in zip(counts, lengths, strict=True))
    for row_1HTD in rows:
        own = lengths if row_1HTD.shape[2] == tokens else [1] * len(counts)
        parts = row_1HTD[0].split([count * length for count, length in zip(counts, own, strict=True)], dim=1)
        yield [
            part if count == 1 else by_pair(part[None], count, length)
            for part, count, length in zip(parts, counts, own, strict=True)
        ]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of stacks of matrices, without what that takes to find out that there is one stack."""
    return torch.bmm(a, b) if a.ndim == b.ndim == 3 else a @ b
