"""Pairs and groups: what every reader yields and every later stage receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfrank.errors import DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a document (or two sentences), perhaps with a label."""

    query: str
    document: str
    label: float | int | None = None
    source: str = ""  # "file.jsonl:12", as a person opens it: lines are counted from 1

    @property
    def texts(self) -> list[tuple[str, str]]:
        """What is scored: one (query, document)."""
        return [(self.query, self.document)]


@dataclass(frozen=True, slots=True)
class Group:
    """One query with several documents and their grades; None where a document was not judged."""

    query: str
    documents: tuple[str, ...]
    grades: tuple[float | None, ...]
    source: str = ""
    qid: str | None = None
    docids: tuple[str, ...] | None = None

    @property
    def texts(self) -> list[tuple[str, str]]:
        """What is scored: (query, document) of each document, in order."""
        return [(self.query, document) for document in self.documents]


def place(source: str, row: int) -> str:
    """Where a person finds a pair: its file and line, else its number among those given, counted from 0."""
    return source or f"pair {row} (counted from 0)"


def by_query(pairs: Sequence[Pair]) -> list[Group]:
    """Pairs gathered under their queries, in order of first appearance; labels become grades."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.query, []).append(pair)
    return [
        Group(query, tuple(p.document for p in members), tuple(p.label for p in members), members[0].source)
        for query, members in found.items()
    ]


@dataclass
class InputExample:
    """A labelled example as older training scripts build it: two texts and a label."""

    guid: str = ""
    texts: list[str] = field(default_factory=list)
    label: float | int = 0


def check_type(value: Any, source: str) -> str:
    """`value` if it is text; raises DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{source}: expected text, got {type(value).__name__} {value!r:.60}.")
    return value


def check_encodable(value: Any, source: str) -> None:
    """Raise DataError for what is no text, or no text that UTF-8 can hold: lone surrogates come out of JSON so."""
    try:
        fits = isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise DataError(f"{source} holds what is not valid text: {value!r:.60}. Repair or drop it.")


def check_text(value: Any, source: str) -> str:
    """`value` if it is text with something in it; raises DataError otherwise."""
    if not check_type(value, source).strip():
        raise DataError(f"{source}: the text is empty. Remove the row or fill it in.")
    return value
