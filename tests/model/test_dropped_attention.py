"""Attention with dropout as one autograd node: against single operations with the same mask, and finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from halfrank.model.attention import Runs, packed_attention
from halfrank.model.dropout import dropout
from halfrank.model.dropped_attention import dropped_attention

COUNTS, LENGTHS = (2, 1), (3, 5)
TOKENS = 11


def rows(dtype: torch.dtype, queries: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1, 2, tokens, 4, dtype=dtype, generator=generator).requires_grad_()
        for tokens in (queries, TOKENS, TOKENS)
    ]


def pair_by_pair(rows: list[Tensor], causal: bool) -> Tensor:
    """Softmax, dropout and sum as single operations, a run at a time in the order in which masks are drawn."""
    query, key, value = rows
    outputs, start, read = [], 0, 0
    for count, length in zip(COUNTS, LENGTHS, strict=True):
        width = length if query.shape[2] == TOKENS else 1
        pairs = range(count)
        q = torch.stack([query[0, :, read + width * i : read + width * (i + 1)] for i in pairs])
        k, v = (
            torch.stack([t[0, :, start + length * i : start + length * (i + 1)] for i in pairs]) for t in (key, value)
        )
        scores = torch.einsum("phqd,phkd->phqk", q, k) * 0.5
        if causal:
            scores = scores + torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)
        mixed = torch.einsum("phqk,phkd->pqhd", dropout(scores.softmax(-1), 0.4), v)
        outputs.append(mixed.reshape(1, count * width, *mixed.shape[2:]))
        start, read = start + count * length, read + count * width
    return torch.cat(outputs, 1)


def dropped(tensors: Sequence[Tensor]) -> Tensor:
    query, key, value = tensors
    return dropped_attention(
        query, key, value, counts=COUNTS, lengths=LENGTHS, bands=(None, None), dropout=0.4, scale=0.5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("queries", "causal"), [(TOKENS, False), (TOKENS, True), (3, False)])
def test_values_and_gradients_are_those_of_single_operations(dtype: torch.dtype, queries: int, causal: bool) -> None:
    module = torch.nn.Module()
    runs = Runs(COUNTS, LENGTHS)
    ours, plain = rows(dtype, queries), rows(dtype, queries)
    torch.manual_seed(7)
    query, key, value = ours
    found, _ = packed_attention(
        module, query, key, value, None, packed_runs=runs, dropout=0.4, scaling=0.5, is_causal=causal
    )
    torch.manual_seed(7)
    wanted = pair_by_pair(plain, causal)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for result in (found, wanted):
        (result * weights).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("dropout", [0.999999, 1.0])
def test_what_is_dropped_altogether_gives_zeros(dropout: float) -> None:
    tensors = rows(torch.float32, TOKENS)
    found = dropped_attention(*tensors, counts=COUNTS, lengths=LENGTHS, bands=(None, None), dropout=dropout, scale=0.5)
    found.sum().backward()
    for tensor in (found, *(each.grad for each in tensors)):
        assert tensor is not None
        assert not tensor.any()


def test_gradients_are_those_of_finite_differences() -> None:
    def attended(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same mask at each call
        return dropped(tensors)

    assert torch.autograd.gradcheck(attended, rows(torch.float64))


def test_the_gradients_lie_as_the_projections_read_them() -> None:
    tensors = rows(torch.float32)
    for gradient in torch.autograd.grad(dropped(tensors).sum(), tensors):
        assert gradient.transpose(1, 2).is_contiguous()
