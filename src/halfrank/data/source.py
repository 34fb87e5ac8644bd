"""Where training data come from: which files, how their rows are read one after the other, and what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from halfrank.data.pairs import Group, Pair
from halfrank.data.readers import Dataset, collected, joined, read_items
from halfrank.data.trec import beir_of, read_joined

PIECE = 1 << 20  # bytes that are hashed at once


@dataclass(frozen=True)
class Source:
    """A file or folder of pairs or groups; `queries` and `corpus` hold the texts where it names them by their ids."""

    path: Path
    columns: Mapping[str, str] | None = None
    queries: Path | None = None
    corpus: Path | None = None
    qrels: Path | None = None

    def items(self, notes: list[str], *, keep_unjudged: bool = False) -> Iterator[Pair | Group]:
        """The rows one after the other, see `readers.read_items`; rows that are joined from several files are all held.

        Raises DataError for rows that cannot be used.
        """
        if self.queries is not None and self.corpus is not None:
            groups = read_joined(self.path, queries=self.queries, corpus=self.corpus, qrels=self.qrels)
            found = joined(groups, keep_unjudged=keep_unjudged)
            notes += found.notes
            yield from found.groups
            return
        yield from read_items(self.path, columns=self.columns, keep_unjudged=keep_unjudged, notes=notes)

    def dataset(self, *, keep_unjudged: bool = False) -> Dataset:
        """All rows at once."""
        notes: list[str] = []
        return collected(self.items(notes, keep_unjudged=keep_unjudged), notes)

    def digest(self) -> str:
        """What the files hold and how they are read, as one short word: other bytes, another word."""
        found = hashlib.sha256(repr(sorted((self.columns or {}).items())).encode())
        for path in self._files():
            found.update(path.name.encode() + b"\0")
            with path.open("rb") as handle:
                while piece := handle.read(PIECE):
                    found.update(piece)
        return found.hexdigest()

    def _files(self) -> list[Path]:
        beside = [path for path in (self.queries, self.corpus, self.qrels) if path is not None]
        beir = beir_of(self.path)
        if beir is None:
            return [self.path, *beside]
        folder, split = beir
        judgements = sorted((folder / "qrels").glob("*.tsv" if split is None else f"{split}.tsv"))
        return [folder / "corpus.jsonl", folder / "queries.jsonl", *judgements, *beside]
