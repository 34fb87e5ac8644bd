"""Pairs in a file to scores in a file, a chunk at a time: memory is flat in pairs, and what was cut off goes on.

Chunks always hold the same pairs, whether a run went through or was taken up again, so the output is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from halfrank.allocator import keeping
from halfrank.data.pairs import Group, Pair
from halfrank.errors import DataError, SaveError
from halfrank.model.pace import tokens_a_pass
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from halfrank.whole import claim

CHUNK = 4096  # pairs of one chunk; a group is never cut
FORMATS = ("jsonl", "trec", "scores")


@dataclass
class Scored:
    """What a run of scoring did; `resumed` pairs were found finished."""

    pairs: int = 0
    truncated: int = 0
    rescued: int = 0
    islands: int = 0  # modules that compute in float32, because of pairs that overflowed or as the folder says
    resumed: int = 0


def score(
    scorer: Scorer,
    items: Iterable[Pair | Group],
    out: Path | None,
    *,
    shape: str = "jsonl",
    fingerprint: str = "",
    expected: int = 0,
    progress: Callable[[int], None] | None = None,
    write: Callable[[str], object] = print,
) -> Scored:
    """Score `items` in order into `out`, or line by line into `write`.

    `shape` is one of `FORMATS`: one JSON object a pair, a TREC run (groups only) or one number a line. A file that an
    interrupted call left is continued when `fingerprint`, which names data, model and settings, is the same.
    `expected` is about how many tokens there are in all, for choosing how many go through one pass. Raises SaveError
    for a disk that refuses; a DataError among `items` leaves nothing behind.
    """
    if shape not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {shape!r}.")
    with keeping(progress) as passed:
        done = Scored()
        a_pass = tokens_a_pass(scorer, expected)
        if out is None:
            for chunk in _chunks(items):
                _extend(done, chunk, scorer, a_pass, shape, lambda text: write(text.rstrip("\n")), passed)
            return done
        partial = Partial(out, f"{fingerprint} {shape}")
        try:
            with partial as handle:
                done.resumed = partial.pairs
                scorer.widen(partial.islands)
                a_pass = partial.a_pass or a_pass
                for chunk in _chunks(items):
                    if done.pairs < partial.pairs:  # the same chunks as then, so they end where the file ends
                        done.pairs += _count(chunk)
                        passed(_count(chunk))
                        continue
                    _extend(done, chunk, scorer, a_pass, shape, handle.write, passed)
                    partial.keep(done.pairs, scorer.islands, a_pass)
            partial.finish()
        except DataError:
            partial.drop()
            raise
        except SaveError:
            raise
        except OSError as error:
            if not partial.pairs:
                partial.drop()
            raise SaveError(
                f"Cannot write '{out}': {error.strerror or error}. Scored so far: {partial.pairs}."
            ) from error
        return done


class Partial:
    """An output file in the making beside its place, with a note of how far it is whole."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self._out = out
        self._file = out.with_name(f".{out.name}.partial")
        self._note = out.with_name(f".{out.name}.partial.json")
        self._fingerprint = fingerprint
        self.islands: list[str] = []
        self.pairs = self.a_pass = 0

    def __enter__(self) -> Any:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._own()
        size = 0
        if self._note.exists():
            note = json.loads(self._note.read_text(encoding="utf-8"))
            if note["fingerprint"] == self._fingerprint and note["bytes"] <= self._file.stat().st_size:
                self.pairs, size, self.islands = note["pairs"], note["bytes"], note["islands"]
                self.a_pass = note.get("tokens_a_pass", 0)
        self._handle.truncate(size)
        self._handle.seek(size)
        return self._handle

    def _own(self) -> TextIO:
        """The file, locked until it is closed; raises SaveError while another process writes it."""
        while True:
            handle = self._file.open("a", encoding="utf-8", newline="\n")
            claim(
                handle, f"Another process is writing '{self._out}' at this moment. Wait for it, or give another --out."
            )
            # Between opening and locking, the other process may have finished and moved this very file to its place.
            if self._file.exists() and self._file.stat().st_ino == os.fstat(handle.fileno()).st_ino:
                return handle
            handle.close()

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def keep(self, pairs: int, islands: Sequence[str], a_pass: int) -> None:
        """What was written last counts as finished from now on; a later run computes the rest in the same way."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self.pairs = pairs
        place = self._handle.tell()
        note = {
            "fingerprint": self._fingerprint,
            "pairs": pairs,
            "bytes": place,
            "islands": list(islands),
            "tokens_a_pass": a_pass,
        }
        fresh = self._note.with_suffix(".new")
        fresh.write_text(json.dumps(note), encoding="utf-8")
        os.replace(fresh, self._note)

    def finish(self) -> None:
        """Move the whole file to its place."""
        os.replace(self._file, self._out)
        self._note.unlink(missing_ok=True)

    def drop(self) -> None:
        """Leave nothing behind."""
        for file in (self._file, self._note):
            if file.exists():
                file.unlink()


def fingerprint_of(paths: Sequence[Path], *settings: object) -> str:
    """Names the state of files (place, size, time of change) and settings in one short word."""
    facts: list[object] = list(settings)
    for path in paths:
        weights = (*path.glob("*.safetensors"), *path.glob("onnx/*"), *path.glob("openvino/*")) if path.is_dir() else ()
        files = [*sorted(weights), path / "config.json"] if path.is_dir() else [path]
        known = [(file.resolve(), file.stat()) for file in files if file.exists()]
        facts += [(str(place), state.st_size, state.st_mtime_ns) for place, state in known]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _chunks(items: Iterable[Pair | Group]) -> Iterator[list[Pair | Group]]:
    chunk: list[Pair | Group] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += len(item.texts)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _count(chunk: Sequence[Pair | Group]) -> int:
    return sum(len(item.texts) for item in chunk)


def _extend(
    done: Scored,
    chunk: Sequence[Pair | Group],
    scorer: Scorer,
    a_pass: int,
    shape: str,
    write: Callable[[str], object],
    progress: Callable[[int], None],
) -> None:
    texts = [text for item in chunk for text in item.texts]
    sources = [item.source for item in chunk for _ in item.texts]
    found = predict(scorer, texts, max_tokens=a_pass, progress=progress, sources=sources)
    lines: list[str] = []
    start = 0
    for item in chunk:
        stop = start + len(item.texts)
        lines += _lines(item, found.values[start:stop], shape)
        start = stop
    write("".join(f"{line}\n" for line in lines))
    done.pairs += len(texts)
    done.truncated += found.truncated
    done.rescued += len(found.rescued)
    done.islands = len(scorer.islands)


def _lines(item: Pair | Group, values_PL: np.ndarray, shape: str) -> list[str]:
    if shape == "trec":
        return _run_lines(item, values_PL)
    if shape == "scores":
        return [" ".join(repr(float(value)) for value in values) for values in values_PL]
    if isinstance(item, Pair):
        return [_json(item.query, item.document, values_PL[0])]
    ids = item.docids or (None,) * len(item.documents)
    return [
        _json(item.query, document, values, qid=item.qid, docid=docid)
        for document, values, docid in zip(item.documents, values_PL, ids, strict=True)
    ]


def _run_lines(item: Pair | Group, values_PL: np.ndarray) -> list[str]:
    if isinstance(item, Pair) or item.qid is None or item.docids is None or values_PL.shape[1] != 1:
        raise DataError(
            f"{item.source}: a TREC run needs queries and documents with ids, and a model with one score. "
            "Give a run with --queries and --corpus, or use --format jsonl."
        )
    order = np.argsort(-values_PL[:, 0], kind="stable").tolist()
    return [
        f"{item.qid} Q0 {item.docids[row]} {rank} {float(values_PL[row, 0])!r} halfrank"
        for rank, row in enumerate(order, 1)
    ]


def _json(query: str, document: str, values: np.ndarray, **ids: str | None) -> str:
    named = {name: value for name, value in ids.items() if value is not None}
    number = float(values[0]) if len(values) == 1 else [float(value) for value in values]
    return json.dumps({**named, "query": query, "document": document, "score": number}, ensure_ascii=False)
