"""Tokens, labels and texts on disk are what memory would hold; damage is found; two processes may build one cache."""

from __future__ import annotations

import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfrank.data import cache
from halfrank.data.packing import pack
from halfrank.data.pairs import Group, Pair
from halfrank.data.source import Source
from halfrank.data.tokens import PairTokenizer
from halfrank.errors import DataError, SaveError
from halfrank.train.examples import from_groups, from_pairs, from_source
from tiny import PAIRS, tokenizer_for

TOKENIZERS = {family: PairTokenizer(tokenizer_for(family), 16) for family in ("bert", "roberta")}  # with types, without
BERT = TOKENIZERS["bert"]
LABELLED = [Pair(query, document, float(i % 3), f"file:{i}") for i, (query, document) in enumerate(PAIRS)]
GROUPS = [
    Group(PAIRS[i][0], tuple(d for _, d in PAIRS[i : i + n]), tuple(float(k) for k in range(n)), f"file:{i}")
    for i, n in enumerate((4, 1, 7, 2))
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def kept(root: Path, items: list[Any], family: str = "bert", digest: str = "data") -> cache.Stored:
    return cache.stored(root, lambda notes: items, TOKENIZERS[family], digest=digest)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4), st.floats(-9, 9)), min_size=1, max_size=8),
    st.sampled_from(sorted(TOKENIZERS)), st.booleans(),
)  # fmt: skip
def test_what_is_read_is_what_was_written(tmp_path_factory, rows, family, grouped):
    pairs = [Pair(query, documents[0], label, f"row {i}") for i, (query, documents, label) in enumerate(rows)]
    groups = [
        Group(query, tuple(documents), tuple(label + k for k in range(len(documents))), f"row {i}")
        for i, (query, documents, label) in enumerate(rows)
    ]
    encoder = TOKENIZERS[family]
    found = kept(tmp_path_factory.mktemp("cache") / "root", groups if grouped else pairs, family)
    held = from_groups(groups, encoder) if grouped else from_pairs(pairs, encoder)
    assert (found.tokens.offsets == held.tokens.offsets).all()
    assert found.tokens.truncated == held.tokens.truncated
    assert torch.equal(torch.from_numpy(found.labels), held.labels)
    order = np.random.default_rng(len(rows)).permutation(len(held.tokens))
    ours, theirs = pack(found.tokens, order), pack(held.tokens, order)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert (ours.lengths, ours.rows) == (theirs.lengths, theirs.rows)
    assert (ours.token_type_ids is None) == (theirs.token_type_ids is None) == (family == "roberta")
    if ours.token_type_ids is not None:
        assert torch.equal(ours.token_type_ids, theirs.token_type_ids)
    assert list(found.first_rows) == list(held.units.first_rows)
    for row in range(len(held.tokens)):
        assert found.record(row) == held.records(row)


def test_blocks_are_all_tokens_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 5)
    found = kept(tmp_path / "root", LABELLED)
    whole = BERT.encode(PAIRS)
    blocks = list(found.tokens.blocks())
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 4]
    assert np.concatenate([block.input_ids for block in blocks]).tolist() == whole.input_ids.tolist()
    assert np.concatenate([block.token_type_ids for block in blocks]).tolist() == whole.token_type_ids.tolist()


@pytest.mark.parametrize("name", [*cache.FILES, cache.META])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path, name, damage):
    root, told = tmp_path / "root", []
    kept(root, GROUPS)
    path = next(root.iterdir()) / name
    before = path.read_bytes()
    if damage == "changed":
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    elif damage == "cut":
        path.write_bytes(before[:-1])
    else:
        path.unlink()
    found = cache.stored(root, lambda notes: GROUPS, BERT, digest="data", tell=told.append)
    assert len(told) == 1
    assert "damaged" in told[0]
    assert path.read_bytes() == before
    assert found.record(5) == from_groups(GROUPS, BERT).records(5)


def test_a_whole_cache_is_taken_and_another_one_replaced(tmp_path):
    root, calls = tmp_path / "root", []

    def items(notes: list[str]) -> list[Pair]:
        calls.append(1)
        notes.append("to be known")
        return LABELLED

    for digest, expected in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        found = cache.stored(root, items, BERT, digest=digest)
        assert (len(calls), found.notes) == (expected, ["to be known"])
        assert len(list(root.iterdir())) == 1
    assert kept(root, LABELLED, "roberta", "a").tokens.lengths.tolist() != found.tokens.lengths.tolist()


def test_other_tokens_have_another_name():
    tokenizer = tokenizer_for("bert")
    left = tokenizer_for("bert")
    left.truncation_side = "left"
    encoders = [
        PairTokenizer(tokenizer, 16), PairTokenizer(tokenizer, 17), PairTokenizer(tokenizer, 16, instruction="Judge: "),
        PairTokenizer(tokenizer_for("roberta"), 16), PairTokenizer(left, 16),
    ]  # fmt: skip
    assert len({cache.key_of(encoder, "data") for encoder in encoders}) == len(encoders)
    assert cache.key_of(PairTokenizer(tokenizer, 16), "data") == cache.key_of(encoders[0], "data")


def test_a_file_that_is_cut_while_in_use_says_so(tmp_path):
    found = kept(tmp_path / "root", LABELLED)
    path = next((tmp_path / "root").iterdir()) / cache.IDS
    with path.open("r+b") as handle:
        handle.truncate(8)
    with pytest.raises(DataError, match=r"ids.bin' ends before byte .*--resume"):
        found.tokens.take(np.array([3]))


def test_rows_that_fail_leave_nothing(tmp_path):
    def items(notes: list[str]):
        yield LABELLED[0]
        raise DataError("row 2 is bad")

    with pytest.raises(DataError, match="row 2 is bad"):
        cache.stored(tmp_path / "root", items, BERT, digest="data")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_full_disk_is_told_and_memory_is_taken(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"query": p.query, "document": p.document, "label": 1.0}) for p in LABELLED))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told: list[str] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        examples = from_source(Source(data), BERT, tmp_path / "root", tell=told.append)
        with pytest.raises(SaveError, match="File too large"):
            kept(tmp_path / "root", LABELLED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(told) == 1
    assert "File too large" in told[0]
    assert "kept in memory" in told[0]
    assert examples.tokens.take(np.arange(24)).input_ids.tolist() == BERT.encode(PAIRS).input_ids.tolist()
    assert list((tmp_path / "root").iterdir()) == []
    on_disk = from_source(Source(data), BERT, tmp_path / "root")
    assert on_disk.record(3) == examples.record(3)


def _build(root: Path, barrier: Any) -> None:
    barrier.wait()
    for _ in range(5):
        found = kept(root, GROUPS)
        assert found.record(5)["source"] == "file:2"


def test_two_processes_build_the_same(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_build, args=(tmp_path / "root", barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in (tmp_path / "root").iterdir()] == [cache.key_of(BERT, "data")]
    assert kept(tmp_path / "root", []).record(5) == from_groups(GROUPS, BERT).records(5)
