"""Queries, documents and judgements in files of their own (TREC, BEIR), joined to groups.

A collection file names each text by an id: JSONL with `_id` or `id` and `text` (a `title` goes before it), or two
columns separated by a tab. A run is `qid Q0 docid rank score tag`, judgements are `qid 0 docid grade` (TREC) or
a table `query-id corpus-id score` (BEIR).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfrank.data.lines import decoded
from halfrank.data.pairs import Group, check_text
from halfrank.errors import DataError

IDS = ("_id", "id", "docid", "doc_id", "qid", "query_id", "pid")
TEXTS = ("text", "query", "contents", "document", "passage", "body")
BEIR_SPLITS = ("train", "test", "dev")


@dataclass(frozen=True)
class Line:
    """One candidate or judgement: which document of which query, its grade where judged, its place in the file."""

    qid: str
    docid: str
    grade: float | None
    source: str


def beir_of(path: Path) -> tuple[Path, str | None] | None:
    """The BEIR folder (`corpus.jsonl`, `queries.jsonl`, `qrels/`) that `path` is, or whose judgements it is."""
    split = path.stem if path.parent.name == "qrels" and path.suffix == ".tsv" else None
    folder = path if split is None else path.parent.parent
    known = all((folder / name).is_file() for name in ("corpus.jsonl", "queries.jsonl"))
    return (folder, split) if known and (folder / "qrels").is_dir() else None


def read_beir(path: Path, split: str | None = None) -> tuple[list[Group], list[str]]:
    """Groups of the judged documents of one split and what to know about them.

    The split is the one named, else the first of train, test and dev that there is.
    """
    there = [name for name in BEIR_SPLITS if (path / "qrels" / f"{name}.tsv").is_file()]
    if split is None and not there:
        raise DataError(f"{path}/qrels has none of {', '.join(f'{name}.tsv' for name in BEIR_SPLITS)}.")
    name = split or there[0]
    groups = read_joined(path / "qrels" / f"{name}.tsv", queries=path / "queries.jsonl", corpus=path / "corpus.jsonl")
    others = [other for other in there if other != name and split is None]
    if not others:
        return groups, []
    return groups, [f"qrels/{name}.tsv was read; give '{path / 'qrels' / others[0]}.tsv' for another split."]


def read_joined(path: Path, *, queries: Path, corpus: Path, qrels: Path | None = None) -> list[Group]:
    """Groups from a run or judgements at `path` with the texts of two collections.

    Of a run, `qrels` gives the grades: candidates that nobody judged have None. Raises DataError naming file and line
    for a malformed line or an id without text. Only texts that are asked for are kept in memory.
    """
    lines = list(_lines(path))
    if not lines:
        raise DataError(f"{path} holds no lines. Expected 'qid Q0 docid rank score tag' or 'qid 0 docid grade'.")
    grades = {} if qrels is None else {(line.qid, line.docid): line.grade for line in _lines(qrels)}
    texts_of_queries = _texts(queries, {line.qid for line in lines})
    texts = _texts(corpus, {line.docid for line in lines})
    members: dict[str, list[Line]] = {}
    for line in lines:
        for name, known, where in ((line.qid, texts_of_queries, queries), (line.docid, texts, corpus)):
            if name not in known:
                raise DataError(f"{line.source}: there is no text for the id {name!r} in {where}.")
        members.setdefault(line.qid, []).append(line)
    return [
        Group(
            texts_of_queries[qid],
            tuple(texts[line.docid] for line in own),
            tuple(grades.get((qid, line.docid)) if qrels is not None else line.grade for line in own),
            own[0].source,
            qid,
            tuple(line.docid for line in own),
        )
        for qid, own in members.items()
    ]


def _lines(path: Path) -> Iterator[Line]:
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a TREC run, TREC judgements or BEIR's qrels.")
    seen: dict[tuple[str, str], str] = {}
    for number, text in _decoded(path):
        source = f"{path}:{number}"
        parts = text.split()
        if not parts or (number == 1 and parts[0] in ("query-id", "qid", "query_id")):
            continue
        if len(parts) == 6:
            line = Line(parts[0], parts[2], None, source)
        elif len(parts) in (3, 4):
            line = Line(parts[0], parts[-2], _grade(parts[-1], source), source)
        else:
            raise DataError(
                f"{source}: {len(parts)} columns. Expected 'qid Q0 docid rank score tag' (a run), 'qid 0 docid grade' "
                "or 'query-id corpus-id score' (judgements)."
            )
        before = seen.setdefault((line.qid, line.docid), source)
        if before != source:
            raise DataError(f"{source}: query {line.qid!r} and document {line.docid!r} stood at {before} already.")
        yield line


def _grade(text: str, source: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{source}: the grade {text!r:.40} is not a number.") from None
    if value - value != 0.0:
        raise DataError(f"{source}: the grade must be finite; got {text}.")
    return value


def _texts(path: Path, wanted: set[str]) -> dict[str, str]:
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give JSONL with 'id' and 'text', or id and text separated by a tab.")
    found: dict[str, str] = {}
    for number, line in _decoded(path):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        name, text = _json_text(line, source) if line.lstrip().startswith("{") else _tab_text(line, source)
        if name in wanted:
            found[name] = check_text(text, source)
    return found


def _json_text(line: str, source: str) -> tuple[str, Any]:
    try:
        values: Mapping[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON: {error.msg} at position {error.colno}.") from None
    name, text = (next((values[key] for key in keys if key in values), None) for keys in (IDS, TEXTS))
    if name is None or text is None:
        raise DataError(f"{source}: expected one of {', '.join(IDS)} and one of {', '.join(TEXTS)}; got {line[:60]!r}.")
    title = values.get("title")
    return str(name), f"{title} {text}" if isinstance(title, str) and title.strip() else text


def _tab_text(line: str, source: str) -> tuple[str, str]:
    name, tab, text = line.rstrip("\r\n").partition("\t")
    if not tab:
        raise DataError(f"{source}: expected id and text separated by a tab; got {line[:60]!r}.")
    return name.strip(), text


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in decoded(path):
        if isinstance(line, DataError):
            raise line
        yield number, line
