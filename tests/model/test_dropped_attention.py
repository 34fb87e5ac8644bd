"""Attention with dropout as one autograd node: against single operations with the same mask, and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from halfrank.model import dropout as dropout_module
from halfrank.model import dropped_attention as module
from halfrank.model.attention import Runs, packed_attention
from halfrank.model.dropout import dropout
from halfrank.model.dropped_attention import dropped_attention, use_once

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


# What kernels of our own compute: heads of whole tiles in float32. One pair of a length and several, rows that fill no
# tile, and more of them than are worked on at a time.
MANY = ((2, 3), (1, 5), (3, 16), (1, 17), (1, 61), (1, 130))  # (pairs, their length)


def tiled(size: int, heads: int, whole: bool, seed: int = 0) -> tuple[list[Tensor], dict[str, object]]:
    counts, lengths = zip(*MANY, strict=True)
    tokens = sum(count * length for count, length in MANY)
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(1, count, heads, size, generator=generator).transpose(1, 2).requires_grad_()
        for count in (tokens if whole else sum(counts), tokens, tokens)
    ]
    settings = {"counts": counts, "lengths": lengths, "bands": [None] * len(MANY), "dropout": 0.3, "scale": 0.25}
    return tensors, settings


def with_gradients(
    tensors: list[Tensor], settings: dict[str, object], given: torch.dtype = torch.float32
) -> list[Tensor]:
    """The result and the gradients, for numbers of the format `given` that come in from behind."""
    torch.manual_seed(4)
    found = dropped_attention(*tensors, **settings)  # type: ignore[arg-type]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(given).to(found.dtype)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), tensors)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("size", "heads", "whole"), [(16, 3, True), (32, 12, True), (64, 1, True), (32, 2, False)])
def test_kernels_give_what_float64_gives_with_the_same_mask(size: int, heads: int, whole: bool, threads: int) -> None:
    tensors, settings = tiled(size, heads, whole)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = with_gradients(tensors, settings)
    finally:
        torch.set_num_threads(before)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for mine, exact in zip(found, with_gradients(wide, settings), strict=True):
        largest = float(exact.abs().max())
        assert float((mine.double() - exact).abs().max()) <= 4e-6 * largest
        assert mine.stride() == exact.stride()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("watched", [False, True])
def test_kernels_take_rows_of_16_bits_and_compute_in_float32(narrow: torch.dtype, watched: bool) -> None:
    tensors, settings = tiled(16, 3, True)
    short = [tensor.detach().to(narrow).requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in short]
    with FlopCounterMode(display=False) if watched else nullcontext():
        found = with_gradients(short, settings, narrow)
    for mine, exact in zip(found, with_gradients(wide, settings, narrow), strict=True):
        assert mine.dtype is narrow
        once = torch.finfo(narrow).eps / 2 * exact.abs()  # rounded, at the end
        assert bool(((mine.double() - exact).abs() <= once + 4e-6 * float(exact.abs().max())).all())


@pytest.mark.parametrize("shown", [1e-30, 1e4, 3e18])
def test_scores_of_any_size_have_the_shares_of_float64(shown: float) -> None:
    tensors, settings = tiled(16, 2, True)
    with torch.no_grad():
        tensors[0].mul_(shown)
    settings |= {"dropout": 2**-16}
    found = with_gradients(tensors, settings)[0]
    exact = with_gradients([tensor.detach().double().requires_grad_() for tensor in tensors], settings)[0]
    # Scores that are off by their own rounding move shares by as much, where two of them are nearly equal.
    unlike = ((found.double() - exact).abs() > 1e-5 + shown * 1e-5).double().mean()
    assert float(unlike) <= (0.01 if shown > 1e10 else 0.0)
    assert bool(found.isfinite().all())


OTHER_NANS = [float(np.array(bits, np.uint32).view(np.float32)) for bits in (0x7FC00001, 0xFFC54321, 0x7FFFFFFF)]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, *OTHER_NANS])
def test_what_is_not_finite_stays_within_its_pair(number: float) -> None:
    tensors, settings = tiled(16, 2, True)
    with torch.no_grad():
        tensors[1][0, 1, 8, 3] = number  # the third token of the fourth pair, which are tokens 6 to 10; one head
    found, *gradients = with_gradients(tensors, settings)
    own = torch.zeros_like(found, dtype=torch.bool)
    own[:, 6:11, 1] = True
    assert bool(found[~own].isfinite().all())
    assert bool(found[0, 6:11, 1].isnan().any(-1).any())
    for gradient in gradients:
        assert bool(gradient.transpose(1, 2)[~own].isfinite().all())


def test_numba_drops_what_torchs_operations_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, settings = tiled(16, 3, True)
    compiled = with_gradients(tensors, settings)
    for place in (module, dropout_module):
        monkeypatch.setattr(place, "has_numba", lambda: False)
    for mine, plain in zip(compiled, with_gradients(tensors, settings), strict=True):
        torch.testing.assert_close(mine, plain)


def test_all_is_dropped_where_the_nearest_share_is_all() -> None:
    tensors, settings = tiled(16, 3, True)
    for tensor in with_gradients(tensors, settings | {"dropout": 1.0}):
        assert not tensor.any()


def test_what_compiles_beforehand_is_what_heads_of_this_size_use() -> None:
    tiles = pytest.importorskip("halfrank.numerics.tiles")
    assert module.TILE == tiles.LANES


def test_using_it_once_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    use_once()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [16, 4])
def test_a_second_derivative_is_refused(size: int) -> None:
    tensors, settings = tiled(size, 2, True)
    found = dropped_attention(*tensors, **settings)  # type: ignore[arg-type]
    first = torch.autograd.grad(found.square().sum(), tensors, create_graph=True)
    penalty = torch.stack([each.square().sum() for each in (*first, *tensors)]).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalty, tensors)


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    tensors, settings = tiled(16, 2, True)
    loss = dropped_attention(*tensors, **settings).square().sum()  # type: ignore[arg-type]
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for one, again in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize("shown", [1.0, 1000.0])
def test_shares_of_1_have_a_gradient_of_exactly_0(shown: float) -> None:
    tensors = [(shown * torch.randn(1, 2, 7, 16)).requires_grad_() for _ in range(3)]
    found = dropped_attention(
        *tensors, counts=[7], lengths=[1], bands=[None], dropout=0.2, scale=0.25
    )  # each token reads itself alone
    query, key, value = torch.autograd.grad((found * torch.randn(found.shape)).sum(), tensors)
    assert not query.any()
    assert not key.any()
    assert value.any()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_torchs_default_format_and_device_do_not_matter(default: torch.dtype) -> None:
    tensors, settings = tiled(32, 3, True)
    wanted = with_gradients(tensors, settings)
    before = torch.get_default_dtype()
    weights = torch.randn(wanted[0].shape, generator=torch.Generator().manual_seed(1))
    torch.set_default_dtype(default)  # as transformers does while it loads a model
    try:
        torch.manual_seed(4)
        with torch.device("meta"):
            found = dropped_attention(*tensors, **settings)  # type: ignore[arg-type]
            gradients = torch.autograd.grad((found * weights).sum(), tensors)
    finally:
        torch.set_default_dtype(before)
    for mine, other in zip([found, *gradients], wanted, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("counts", "lengths"), [((2,), (12,)), ((1,), (12,)), ((2,), (9,)), ((3, 1), (5, 6))])
def test_a_row_of_other_pairs_is_refused(counts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    tensors = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)]
    with pytest.raises(ValueError, match="no row of"):
        dropped_attention(*tensors, counts=counts, lengths=lengths, bands=[None] * len(counts), dropout=0.2, scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_one_row_is_refused(dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 2, 7, 16).to(dtype) for _ in range(3)]
    with pytest.raises(ValueError, match="are no row of"):
        dropped_attention(*tensors, counts=[1], lengths=[7], bands=[None], dropout=0.2, scale=0.25)
