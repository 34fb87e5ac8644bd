"""Texts to tokens, once per pair, with a private copy of the Rust tokenizer.

Shapes: T tokens of all pairs together, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

CHUNK = 1024  # pairs a call: enough for all threads, small enough for a progress bar


@dataclass(frozen=True)
class Tokens:
    """The tokens of P pairs in flat arrays; pair i owns [offsets[i], offsets[i + 1])."""

    input_ids: np.ndarray  # (T,) int32
    token_type_ids: np.ndarray | None  # (T,) int8
    offsets: np.ndarray  # (P + 1,) int64
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, (P,) int64."""
        return np.diff(self.offsets)


class PairTokenizer:
    """Tokenizes pairs to at most `max_length` tokens, cutting the longer text first.

    The Rust tokenizer is copied: padding and truncation of the caller's stay as they are, whoever changes them.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.max_length = max_length
        self._slow = tokenizer
        self._typed = "token_type_ids" in tokenizer.model_input_names
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = Tokenizer.from_str(backend.to_str()) if backend is not None else None
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.no_truncation()
            self._fast.enable_truncation(max_length, strategy="longest_first")

    def encode(
        self, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int], None] | None = None
    ) -> Tokens:
        """Tokens of `pairs`; `progress` is called with the number of pairs done since the last call."""
        ids: list[np.ndarray] = []
        types: list[np.ndarray] = []
        lengths: list[int] = []
        truncated = 0
        for start in range(0, len(pairs), CHUNK):
            chunk = [(query, document) for query, document in pairs[start : start + CHUNK]]
            for row_ids, row_types, cut in self._encode(chunk):
                ids.append(np.asarray(row_ids, dtype=np.int32))
                types.append(np.asarray(row_types, dtype=np.int8))
                lengths.append(len(row_ids))
                truncated += cut
            if progress is not None:
                progress(len(chunk))
        return Tokens(
            np.concatenate(ids) if ids else np.zeros(0, np.int32),
            (np.concatenate(types) if types else np.zeros(0, np.int8)) if self._typed else None,
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            truncated,
        )

    def _encode(self, chunk: list[tuple[str, str]]) -> list[tuple[list[int], list[int], bool]]:
        if self._fast is not None:
            return [(e.ids, e.type_ids, bool(e.overflowing)) for e in self._fast.encode_batch(chunk)]
        rows = []
        for query, document in chunk:
            whole = self._slow(query, document)["input_ids"]
            cut = self._slow(query, document, truncation="longest_first", max_length=self.max_length)
            rows.append((cut["input_ids"], cut.get("token_type_ids", [0] * len(cut["input_ids"])), len(whole) > len(cut["input_ids"])))
        return rows
