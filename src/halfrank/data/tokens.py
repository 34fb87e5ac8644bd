"""Texts to tokens, once per pair, with a private copy of the Rust tokenizer.

Shapes: T tokens of all pairs together, P pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from halfrank.errors import DataError

CHUNK = 1024  # pairs a call: enough for all threads, small enough for a progress bar
PROBES = [
    ("which pair is longer", "This one, unless its end was cut."),
    ("Is [MASK] a <s> token?", "No. It's text ünd so."),
    ("a", "b"),
]
PROBE_LENGTH = 12  # tokens: cuts the first two probes, leaves the last


@dataclass(frozen=True)
class Tokens:
    """The tokens of P pairs in flat arrays; pair i owns [offsets[i], offsets[i + 1])."""

    input_ids: np.ndarray  # (T,) int32
    token_type_ids: np.ndarray | None  # (T,) int8
    offsets: np.ndarray  # (P + 1,) int64
    truncated: int  # pairs that were cut to the tokenizer's max_length

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, (P,) int64."""
        return np.diff(self.offsets)

    def ids(self) -> list[list[int]]:
        """The tokens of each pair."""
        return [row.tolist() for row in np.split(self.input_ids, self.offsets[1:-1])] if len(self) else []

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where the tokens of `rows` lie in the flat arrays, row after row."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        return np.arange(lengths.sum()) + np.repeat(self.offsets[rows] - ends + lengths, lengths)


@dataclass(frozen=True)
class Rows:
    """What one call of a tokenizer gives; without `types` all are 0."""

    ids: Iterable[list[int]]
    types: Iterable[list[int]]
    lengths: list[int]
    truncated: int


class Encoder(Protocol):
    """Whatever makes tokens of pairs."""

    instruction: str

    def encode(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Tokens of `pairs`, `instruction` or else the encoder's own told to the model."""


class PairTokenizer:
    """Tokenizes pairs to at most `max_length` tokens, cutting the longer text first, as transformers does.

    The Rust tokenizer is copied: padding and truncation of the caller's stay as they are, and whoever changes them
    later changes nothing here. Tokenizers written in Python, and those whose Python class does more than the Rust part
    says (three probe pairs tell), take the slower way through a copy of the caller's object.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, instruction: str = "") -> None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if max_length <= special:
            raise DataError(
                f"max_length counts a pair's {special} special tokens and must leave room for text; got {max_length}."
            )
        self.max_length = max_length
        self.instruction = instruction
        self._typed = "token_type_ids" in tokenizer.model_input_names
        self._fast, self._twin = private_copy(tokenizer)
        if self._fast is not None and not self._agrees(self._fast):
            self._fast = None
            self._twin = _twin(tokenizer, None)
        if self._fast is not None:
            self._limit(self._fast, max_length)

    @property
    def fast(self) -> bool:
        """True where the Rust tokenizer alone gives what transformers gives."""
        return self._fast is not None

    def encode(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Tokens of `pairs`; `progress` is called with the number of pairs done since the last call.

        `instruction`, the model's own by default, is put before each query. Raises DataError, naming the pair, for
        what is not text.
        """
        before = self.instruction if instruction is None else instruction
        return in_chunks(pairs, lambda chunk: self._encode([(before + a, b) for a, b in chunk]), self._typed, progress)

    def _encode(self, chunk: list[tuple[str, str]]) -> Rows:
        if self._fast is not None:
            whole = self._fast.encode_batch_fast(chunk)
            cut = sum(1 for encoding in whole if encoding.overflowing)
            return Rows(
                (encoding.ids for encoding in whole),
                (encoding.type_ids for encoding in whole),
                [len(encoding) for encoding in whole],
                cut,
            )
        rows = self._twin_rows(chunk, self.max_length)
        lengths = [len(ids) for ids, _ in rows]
        full = [pair for pair, length in zip(chunk, lengths, strict=True) if length >= self.max_length]
        cut = sum(len(ids) > self.max_length for ids, _ in self._twin_rows(full, None))
        return Rows((ids for ids, _ in rows), (types for _, types in rows), lengths, cut)

    def _twin_rows(self, chunk: list[tuple[str, str]], max_length: int | None) -> list[tuple[list[int], list[int]]]:
        if not chunk:
            return []
        first, second = [list(side) for side in zip(*chunk, strict=True)]
        cut = {"truncation": "longest_first", "max_length": max_length} if max_length else {"verbose": False}
        found = self._twin(first, second, padding=False, return_token_type_ids=self._typed, **cut)
        types = found["token_type_ids"] if self._typed else [[0] * len(ids) for ids in found["input_ids"]]
        return list(zip(found["input_ids"], types, strict=True))

    def _agrees(self, fast: Tokenizer) -> bool:
        wanted = self._twin_rows(PROBES, PROBE_LENGTH)
        self._limit(fast, PROBE_LENGTH)
        found = [(encoding.ids, encoding.type_ids) for encoding in fast.encode_batch_fast(PROBES)]
        return all(a == c and (b == d or not self._typed) for (a, b), (c, d) in zip(wanted, found, strict=True))

    def _limit(self, fast: Tokenizer, max_length: int) -> None:
        fast.no_padding()
        fast.enable_truncation(max_length, strategy="longest_first", direction=self._twin.truncation_side)


def in_chunks(
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[list[tuple[str, str]]], Rows],
    typed: bool,
    progress: Callable[[int], None] | None,
) -> Tokens:
    """The tokens of all pairs, encoded some at a time; raises DataError, naming the pair, for what is not text."""
    ids, types, lengths, truncated = [np.zeros(0, np.int32)], [np.zeros(0, np.int8)], [0], 0
    for start in range(0, len(pairs), CHUNK):
        chunk = [(query, document) for query, document in pairs[start : start + CHUNK]]
        rows = _encoded_or_named(chunk, start, encode)
        ids.append(_flat(rows.ids, np.int32, rows.lengths))
        if typed:
            types.append(_flat(rows.types, np.int8, rows.lengths))
        lengths += rows.lengths
        truncated += rows.truncated
        if progress is not None:
            progress(len(chunk))
    types_T = np.concatenate(types) if typed else None
    return Tokens(np.concatenate(ids), types_T, np.cumsum(lengths, dtype=np.int64), truncated)


def _encoded_or_named(
    chunk: list[tuple[str, str]], start: int, encode: Callable[[list[tuple[str, str]]], Rows]
) -> Rows:
    try:
        return encode(chunk)
    except (TypeError, ValueError) as error:
        # Lone surrogates, as "\ud800" in JSON gives them, are str in Python and not text in Rust.
        for row, pair in enumerate(chunk, start):
            for text in pair:
                if not isinstance(text, str) or not _encodable(text):
                    raise DataError(
                        f"Pair {row} holds what is not valid text: {text!r:.60}. Repair or drop it."
                    ) from error
        raise


def private_copy(tokenizer: Any) -> tuple[Tokenizer | None, Any]:
    """A Rust tokenizer of our own, where there is one, and a copy of the caller's object around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    fast = Tokenizer.from_str(backend.to_str()) if isinstance(backend, Tokenizer) else None
    return fast, _twin(tokenizer, fast)


def _twin(tokenizer: Any, fast: Tokenizer | None) -> Any:
    """A copy of the caller's object, around `fast` where given: what a call changes in it, the caller never sees."""
    if fast is None or not hasattr(tokenizer, "_tokenizer"):
        return copy.deepcopy(tokenizer)
    twin = copy.copy(tokenizer)
    twin._tokenizer = fast
    return twin


def _flat(rows: Iterable[list[int]], dtype: type, lengths: list[int]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=sum(lengths))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
