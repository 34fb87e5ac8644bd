"""Tokens, labels and texts of a data set on disk, read a few rows at a time: memory does not grow with the data.

Rows are read where they are needed and not mapped into memory: pages of a mapped file count as this process's memory
once they are touched, and a mapped file that is cut short ends the process without a word.

Shapes: T tokens, P pairs, U units (pairs or groups).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from halfrank.data.pairs import Group, Pair
from halfrank.data.tokens import BLOCK, NONE, Encoder, Tokens, lengths_of, starts
from halfrank.errors import DataError
from halfrank.whole import finish_interrupted, write_whole

FORMAT = 1
META = "meta.json"
IDS, TYPES, OFFSETS = "ids.bin", "types.bin", "offsets.bin"  # (T,) int32, (T,) int8, (P + 1,) int64
LABELS, UNITS = "labels.bin", "units.bin"  # (P,) float32, NaN where there is none; first rows, (U + 1,) int64
TEXTS, PLACES = "texts.jsonl", "places.bin"  # a line a unit; where the lines begin, (U + 1,) int64
FILES = (IDS, TYPES, OFFSETS, LABELS, UNITS, TEXTS, PLACES)
PIECE = 1 << 20  # bytes that are checked at once
Items = Callable[[list[str]], Iterable[Pair | Group]]  # fills the list with what is to be known about them


@dataclass(frozen=True)
class Stored:
    """A data set on disk: in memory are 12 bytes a pair and 8 a group."""

    tokens: StoredTokens
    labels: np.ndarray  # (P,) float32
    first_rows: Sequence[int] | np.ndarray  # of each unit, and P
    grouped: bool
    notes: list[str]
    texts: _Lines

    def record(self, row: int) -> dict[str, Any]:
        """Source, query and document of a pair, as its file had them."""
        unit = row if not self.grouped else int(np.searchsorted(self.first_rows, row, side="right")) - 1
        found = json.loads(self.texts.line(unit))
        return {
            "source": found["source"],
            "query": found["query"],
            "document": found["documents"][row - int(self.first_rows[unit])],
        }


class StoredTokens:
    """Tokens that are read from their files when they are asked for."""

    def __init__(self, folder: Path, offsets: np.ndarray, *, typed: bool, truncated: int) -> None:
        self._ids = _Reader(folder / IDS)
        self._types = _Reader(folder / TYPES) if typed else None
        self.offsets, self.truncated = offsets, truncated

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, (P,) int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Tokens:
        """The tokens of `rows`, row after row, in memory."""
        lengths = lengths_of(self.offsets, rows)
        spans = list(zip(self.offsets[rows].tolist(), lengths.tolist(), strict=True))
        ids = b"".join(self._ids.read(4 * start, 4 * count) for start, count in spans)
        types = None if self._types is None else b"".join(self._types.read(start, count) for start, count in spans)
        return Tokens(
            np.frombuffer(ids, "<i4"), None if types is None else np.frombuffer(types, np.int8), starts(lengths), NONE
        )

    def blocks(self) -> Iterator[Tokens]:
        """All tokens in order, some pairs at a time."""
        for first in range(0, len(self), BLOCK):
            offsets = self.offsets[first : first + BLOCK + 1]
            start, count = int(offsets[0]), int(offsets[-1] - offsets[0])
            ids = np.frombuffer(self._ids.read(4 * start, 4 * count), "<i4")
            types = None if self._types is None else np.frombuffer(self._types.read(start, count), np.int8)
            yield Tokens(ids, types, offsets - start, NONE)


def stored(
    root: Path,
    items: Items,
    encoder: Encoder,
    *,
    digest: str,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Stored:
    """The data set that `items` gives, kept in a folder of `root` for these data (`digest`) and this encoder.

    What is there already and whole is taken; anything else in `root` is removed, so a root belongs to one run.
    Raises SaveError where it cannot be written; nothing is left then.
    """
    folder = root / key_of(encoder, digest)
    if folder.exists():
        finish_interrupted(folder)
        if (fault := _fault(folder)) is None:
            return _opened(folder)
        tell(f"The tokens kept in '{folder}' are damaged ({fault}): they are made again.")
        shutil.rmtree(folder)
    if root.exists():
        for other in root.iterdir():
            if folder.name not in other.name:  # a stage carries the name of what it will be
                shutil.rmtree(other)
    _build(folder, items, encoder, progress)
    return _opened(folder)


def key_of(encoder: Encoder, digest: str) -> str:
    """The name of a cache: other data, tokenizer, length or version of this format, another name."""
    facts = (str(FORMAT), tokenizers.__version__, digest, encoder.identity)
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _build(folder: Path, items: Items, encoder: Encoder, progress: Callable[[int], None] | None) -> None:
    def write(stage: Path) -> None:
        notes: list[str] = []
        with ExitStack() as open_files:
            files = {name: open_files.enter_context(_Writer(stage / name)) for name in FILES}
            grouped, truncated, typed, pairs = False, 0, False, 0
            for name in (OFFSETS, UNITS, PLACES):
                files[name].numbers([0], "<i8")

            def texts() -> Iterator[tuple[str, str]]:
                nonlocal grouped, pairs
                for item in items(notes):
                    grouped = isinstance(item, Group)
                    pairs += len(item.texts)
                    files[TEXTS].write(_line(item))
                    files[LABELS].numbers(_labels(item), "<f4")
                    files[UNITS].numbers([pairs], "<i8")
                    files[PLACES].numbers([files[TEXTS].size], "<i8")
                    yield from item.texts

            tokens = 0
            for part in encoder.stream(texts()):
                files[IDS].numbers(part.input_ids, "<i4")
                if part.token_type_ids is not None:
                    typed = True
                    files[TYPES].numbers(part.token_type_ids, "i1")
                files[OFFSETS].numbers(tokens + part.offsets[1:], "<i8")
                tokens += int(part.offsets[-1])
                truncated += part.truncated
                if progress is not None:
                    progress(len(part))
        meta = {
            "format": FORMAT, "pairs": pairs, "grouped": grouped, "typed": typed, "truncated": truncated,
            "notes": notes, "files": {name: [file.size, file.checksum] for name, file in files.items()},
        }  # fmt: skip
        (stage / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    write_whole(folder, write)


def _opened(folder: Path) -> Stored:
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    tokens = StoredTokens(
        folder, np.fromfile(folder / OFFSETS, "<i8"), typed=meta["typed"], truncated=meta["truncated"]
    )
    first_rows = np.fromfile(folder / UNITS, "<i8") if meta["grouped"] else range(meta["pairs"] + 1)
    labels = np.fromfile(folder / LABELS, "<f4")
    return Stored(tokens, labels, first_rows, meta["grouped"], meta["notes"], _Lines(folder))


def _fault(folder: Path) -> str | None:
    """What is wrong with a cache on disk; None where every byte is as it was written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            return f"format {meta['format']}"
        for name in FILES:
            size, checksum = meta["files"][name]
            if (folder / name).stat().st_size != size or _checksum(folder / name) != checksum:
                return name
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def _line(item: Pair | Group) -> bytes:
    documents = item.documents if isinstance(item, Group) else (item.document,)
    record = {"source": item.source, "query": item.query, "documents": documents}
    return json.dumps(record).encode("ascii") + b"\n"


def _labels(item: Pair | Group) -> list[float]:
    values = item.grades if isinstance(item, Group) else (item.label,)
    return [np.nan if value is None else float(value) for value in values]


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as handle:
        while piece := handle.read(PIECE):
            found = zlib.crc32(piece, found)
    return found


class _Writer:
    """A file that counts its bytes and knows their checksum."""

    def __init__(self, path: Path) -> None:
        self._handle = path.open("wb")
        self.size = self.checksum = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def write(self, content: bytes) -> None:
        self._handle.write(content)
        self.size, self.checksum = self.size + len(content), zlib.crc32(content, self.checksum)

    def numbers(self, values: Sequence[float] | np.ndarray, kind: str) -> None:
        self.write(np.asarray(values, kind).tobytes())


class _Reader:
    """Any bytes of a file, whoever else reads it meanwhile; the file may lose its name, never its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, count: int) -> bytes:
        parts = []
        while count:
            part = os.pread(self._handle, count, start)
            if not part:
                raise DataError(
                    f"'{self._path}' ends before byte {start + count}: something cut it while it was in use. "
                    "Go on with --resume; it is made again."
                )
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Lines:
    """The lines of a file by their number."""

    def __init__(self, folder: Path) -> None:
        self._texts, self._places = _Reader(folder / TEXTS), _Reader(folder / PLACES)

    def line(self, number: int) -> bytes:
        start, stop = np.frombuffer(self._places.read(8 * number, 16), "<i8").tolist()
        return self._texts.read(start, stop - start)
