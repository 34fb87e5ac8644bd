"""Batches of like lengths: every unit once, in an order that a seed decides and an epoch changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfrank.data.pairs import Pair
from halfrank.data.tokens import Tokens
from halfrank.model import folder
from halfrank.train.config import TrainConfig
from halfrank.train.examples import BUCKET_BATCHES, Examples, Units, epoch_plan, from_pairs
from halfrank.train.loop import train
from tiny import PAIRS, make_folder


def examples_of(lengths: list[list[int]]) -> Examples:
    """Units whose pairs have the given numbers of tokens."""
    flat = np.asarray([length for unit in lengths for length in unit])
    offsets = np.concatenate([[0], np.cumsum(flat)])
    zeros = np.zeros(int(offsets[-1]), dtype=np.int32)
    firsts = [0, *np.cumsum([len(unit) for unit in lengths]).tolist()]
    return Examples(
        Tokens(zeros, zeros.astype(np.int8), offsets, np.zeros(0, dtype=np.int64)),
        torch.zeros(len(flat)),
        Units(firsts),
        True,
        lambda row: {},
    )


@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=3), min_size=1, max_size=300),
    st.integers(1, 7),
    st.integers(0, 2**40),
)
def test_each_unit_is_in_one_batch(lengths: list[list[int]], size: int, seed: int) -> None:
    plan = epoch_plan(examples_of(lengths), size, seed=seed, epoch=1, buckets=True)
    assert sorted(unit for batch in plan for unit in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in list(plan)[:-1])
    again = epoch_plan(examples_of(lengths), size, seed=seed, epoch=1, buckets=True)
    assert list(plan) == list(again)


def test_lengths_of_a_batch_are_alike_and_batches_are_in_no_order() -> None:
    random = np.random.default_rng(3)
    lengths = [[int(n)] for n in random.integers(4, 500, 8 * BUCKET_BATCHES * 3)]
    examples = examples_of(lengths)
    first, second = (list(epoch_plan(examples, 8, seed=0, epoch=epoch, buckets=True)) for epoch in (0, 1))
    longest = np.asarray([max(lengths[unit][0] for unit in batch) for batch in first])
    shortest = np.asarray([min(lengths[unit][0] for unit in batch) for batch in first])
    assert (longest - shortest).mean() < 500 / BUCKET_BATCHES * 1.5
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2
    together = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    assert not together


def test_a_run_takes_its_batches_from_the_buckets(tmp_path: Path) -> None:
    path, ends = make_folder("bert", tmp_path / "bert"), []
    for buckets, given_plan in ((True, False), (False, True), (False, False)):
        scorer = folder.load(path, folder.LoadOptions(compute="float32"))
        examples = from_pairs([Pair(q, d, float(i % 2)) for i, (q, d) in enumerate(PAIRS)], scorer.pairs)
        drawn = partial(epoch_plan, examples, 4, seed=5, buckets=True)
        plan = (lambda epoch, drawn=drawn: drawn(epoch=epoch)) if given_plan else None
        config = TrainConfig(batch_size=4, seed=5, length_buckets=buckets)
        ends.append(train(scorer, examples, config, plan=plan).losses)
    assert ends[0] == ends[1] != ends[2]
