"""Packed batches hold every token of the rows asked for, longest pair first, and know the caller's order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfrank.data.packing import by_budget, pack
from halfrank.data.tokens import NONE, Tokens

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def tokens_of(lengths: list[int], *, typed: bool = True) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32)
    return Tokens(ids, (ids % 2).astype(np.int8) if typed else None, offsets, NONE)


@given(LENGTHS, st.randoms(use_true_random=False))
def test_pack_keeps_every_token(lengths, random):
    tokens = tokens_of(lengths)
    rows = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    batch = pack(tokens, rows)
    assert sorted(batch.rows) == sorted(rows)
    assert batch.lengths == sorted((lengths[row] for row in rows), reverse=True)
    parts = batch.input_ids.split(batch.lengths)
    for row, part in zip(batch.rows, parts, strict=True):
        assert part.tolist() == tokens.input_ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
    assert batch.token_type_ids.tolist() == (batch.input_ids % 2).tolist()
    assert batch.input_ids.dtype == batch.token_type_ids.dtype == torch.int64


def test_ties_keep_their_order():
    assert pack(tokens_of([3, 5, 3, 5, 3]), [4, 3, 2, 1, 0]).rows == [3, 1, 4, 2, 0]


def test_rows_may_repeat_and_may_be_none():
    assert pack(tokens_of([2, 3]), [0, 0]).input_ids.tolist() == [0, 1, 0, 1]
    assert pack(tokens_of([2, 3]), []).input_ids.shape == (0,)


def test_types_only_where_there_are_types():
    batch = pack(tokens_of([2, 3], typed=False), [0, 1])
    assert batch.token_type_ids is None
    assert batch.to("cpu").token_type_ids is None


def test_to_moves_both_tensors():
    batch = pack(tokens_of([2, 3]), [0, 1]).to("meta")
    assert batch.input_ids.is_meta
    assert batch.token_type_ids.is_meta
    assert batch.rows == [1, 0]


@given(LENGTHS, st.integers(1, 60))
def test_budget_holds_and_every_row_comes_once(lengths, budget):
    batches = by_budget(np.array(lengths), budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= budget for batch in batches)
    in_order = [lengths[row] for batch in batches for row in batch]
    assert in_order == sorted(lengths, reverse=True)
    # No batch could take the first row of the next one: otherwise there are more batches than needed.
    for batch, following in pairwise(batches):
        assert sum(lengths[row] for row in batch) + lengths[following[0]] > budget


def test_a_longer_row_goes_alone():
    assert by_budget(np.array([50, 3, 3]), 10) == [[0], [1, 2]]


def test_the_callers_order_is_kept():
    assert by_budget(np.array([4, 9, 4, 2]), 8, order=[3, 0, 2, 1]) == [[3, 0], [2], [1]]


def test_no_rows():
    assert by_budget(np.zeros(0, dtype=np.int64), 8) == []


@pytest.mark.parametrize("rows", [[0, 5], [-7]])
def test_rows_that_do_not_exist(rows):
    with pytest.raises(IndexError):
        pack(tokens_of([1, 2, 3]), rows)
