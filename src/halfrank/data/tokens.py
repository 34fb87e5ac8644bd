"""Texts to tokens, once per pair, with a private copy of the Rust tokenizer.

Shapes: T tokens of all pairs together, P pairs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from halfrank.data.pairs import check_encodable, place
from halfrank.errors import DataError

CHUNK = 1024  # pairs a call: enough for all threads, small enough for a progress bar
BLOCK = 4096  # pairs that are looked at together by whoever looks at all of them
PROBES = [
    ("which pair is longer", "This one, unless its end was cut."),
    ("Is [MASK] a <s> token?", "No. It's text ünd so."),
    ("a", "b"),
]
NONE = np.zeros(0, np.int64)
PROBE_LENGTH = 12  # tokens: cuts the first two probes, leaves the last


class TokenRows(Protocol):
    """The tokens of P pairs, wherever they lie."""

    @property
    def offsets(self) -> np.ndarray:
        """Where each pair's tokens begin among all tokens, and the number of these, (P + 1,) int64."""

    @property
    def truncated(self) -> int:
        """Pairs that were cut to the tokenizer's max_length."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, (P,) int64."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Tokens:
        """The tokens of `rows`, row after row, in memory."""

    def blocks(self) -> Iterator[Tokens]:
        """All tokens in order, some pairs at a time."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of P pairs in flat arrays; pair i owns [offsets[i], offsets[i + 1])."""

    input_ids: np.ndarray  # (T,) int32
    token_type_ids: np.ndarray | None  # (T,) int8
    offsets: np.ndarray  # (P + 1,) int64
    cut: np.ndarray  # (C,) int64: the pairs that were cut to the tokenizer's max_length

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def truncated(self) -> int:
        """Pairs that were cut."""
        return len(self.cut)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, (P,) int64."""
        return np.diff(self.offsets)

    def ids(self) -> list[list[int]]:
        """The tokens of each pair."""
        return [row.tolist() for row in np.split(self.input_ids, self.offsets[1:-1])] if len(self) else []

    def take(self, rows: np.ndarray) -> Tokens:
        """The tokens of `rows`, row after row."""
        lengths = lengths_of(self.offsets, rows)
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) + np.repeat(self.offsets[rows] - ends + lengths, lengths)
        types = None if self.token_type_ids is None else self.token_type_ids[places]
        return Tokens(self.input_ids[places], types, starts(lengths), NONE)

    def blocks(self) -> Iterator[Tokens]:
        """All tokens in order, some pairs at a time; views, not copies."""
        for first in range(0, len(self), BLOCK):
            offsets = self.offsets[first : first + BLOCK + 1]
            part = slice(offsets[0], offsets[-1])
            types = None if self.token_type_ids is None else self.token_type_ids[part]
            yield Tokens(self.input_ids[part], types, offsets - offsets[0], NONE)


def lengths_of(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Tokens of each of `rows`; raises IndexError for one that does not exist."""
    return offsets[1:][rows] - offsets[:-1][rows]


def starts(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """Offsets of pairs of these lengths that follow each other."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(frozen=True)
class Rows:
    """What one call of a tokenizer gives; without `types` all are 0."""

    ids: Iterable[list[int]]
    types: Iterable[list[int]]
    lengths: list[int]
    cut: list[int]  # rows that were cut


class Encoder(Protocol):
    """Whatever makes tokens of pairs."""

    instruction: str

    @property
    def identity(self) -> str:
        """All that decides its tokens: encoders of the same identity give the same."""

    def stream(self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None) -> Iterator[Tokens]:
        """Tokens of `pairs` as `encode` gives them, some pairs at a time; no more of them are asked for at once."""

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
        return joined(self.stream(pairs, instruction=instruction), self._typed, progress)

    def stream(self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None) -> Iterator[Tokens]:
        """Tokens of `pairs` as `encode` gives them, some pairs at a time; no more of them are asked for at once."""
        before = self.instruction if instruction is None else instruction
        return in_chunks(pairs, lambda chunk: self._encode([(before + a, b) for a, b in chunk]), self._typed)

    @property
    def identity(self) -> str:
        """All that decides its tokens: the Rust tokenizer with its truncation, or what the Python class consists of."""
        return json.dumps([described(self._fast, self._twin), self.max_length, self._typed, self.instruction])

    def _encode(self, chunk: list[tuple[str, str]]) -> Rows:
        if self._fast is not None:
            whole = self._fast.encode_batch_fast(chunk)
            cut = [row for row, encoding in enumerate(whole) if encoding.overflowing]
            return Rows(
                (encoding.ids for encoding in whole),
                (encoding.type_ids for encoding in whole),
                [len(encoding) for encoding in whole],
                cut,
            )
        rows = self._twin_rows(chunk, self.max_length)
        lengths = [len(ids) for ids, _ in rows]
        full = [row for row, length in enumerate(lengths) if length >= self.max_length]
        whole_rows = self._twin_rows([chunk[row] for row in full], None)
        cut = [row for row, (ids, _) in zip(full, whole_rows, strict=True) if len(ids) > self.max_length]
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
    pairs: Iterable[tuple[str, str]], encode: Callable[[list[tuple[str, str]]], Rows], typed: bool
) -> Iterator[Tokens]:
    """The tokens of all pairs, encoded some at a time; raises DataError, naming the pair, for what is not text."""
    waiting, done = iter(pairs), 0
    while chunk := [(query, document) for query, document in islice(waiting, CHUNK)]:
        rows = _encoded_or_named(chunk, done, encode)
        ids = _flat(rows.ids, np.int32, rows.lengths)
        types = _flat(rows.types, np.int8, rows.lengths) if typed else None
        done += len(chunk)
        yield Tokens(ids, types, starts(rows.lengths), np.array(rows.cut, np.int64))


def joined(parts: Iterable[Tokens], typed: bool, progress: Callable[[int], None] | None) -> Tokens:
    """One set of tokens of several."""
    ids, types, lengths, cut = [np.zeros(0, np.int32)], [np.zeros(0, np.int8)], [NONE], [NONE]
    done = 0
    for part in parts:
        ids.append(part.input_ids)
        lengths.append(part.lengths)
        cut.append(done + part.cut)
        done += len(part)
        if part.token_type_ids is not None:
            types.append(part.token_type_ids)
        if progress is not None:
            progress(len(part))
    types_T = np.concatenate(types) if typed else None
    return Tokens(np.concatenate(ids), types_T, starts(np.concatenate(lengths)), np.concatenate(cut))


def gathered(parts: Iterable[Tokens], count: int) -> Iterator[Tokens]:
    """Tokens of `count` pairs and more at a time, of as few as one part at first, so that work begins early."""
    waiting: list[Tokens] = []
    wanted = 1
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= wanted:
            yield joined(waiting, part.token_type_ids is not None, None)
            waiting, wanted = [], count
    if waiting:
        yield joined(waiting, waiting[0].token_type_ids is not None, None)


def described(fast: Tokenizer | None, twin: Any) -> list[object]:
    """What a tokenizer consists of, in words that differ where its tokens may."""
    if fast is not None:
        return [fast.to_str()]
    settings = sorted((name, repr(value)) for name, value in twin.init_kwargs.items())
    facts = [type(twin).__qualname__, twin.truncation_side, bool(getattr(twin, "split_special_tokens", False))]
    return [
        *facts,
        settings,
        sorted(twin.get_vocab().items()),
        twin([text for pair in PROBES for text in pair])["input_ids"],
    ]


def _encoded_or_named(
    chunk: list[tuple[str, str]], start: int, encode: Callable[[list[tuple[str, str]]], Rows]
) -> Rows:
    try:
        return encode(chunk)
    except (TypeError, ValueError):
        for row, pair in enumerate(chunk, start):
            for text in pair:
                check_encodable(text, place("", row))
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
