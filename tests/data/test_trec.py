"""Runs, judgements and collections joined to groups; what does not fit is named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfrank.data.readers import read
from halfrank.data.trec import read_joined
from halfrank.errors import DataError

DOCUMENTS = {"d1": "one", "d2": "two", "d3": "three"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "queries.tsv").write_text("q1\twhat is one\nq2\twhat is two\nq9\tnobody asks\n")
    rows = [{"_id": name, "title": "T" if name == "d3" else "", "text": text} for name, text in DOCUMENTS.items()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.txt").write_text("q1 Q0 d1 1 9.5 bm25\nq1 Q0 d3 2 9.0 bm25\nq2 Q0 d2 1 3 bm25\n")
    (tmp_path / "judged.txt").write_text("q1 0 d3 2\nq2 0 d2 0\nq2 0 d1 1\n")
    return tmp_path


def joined(place: Path, name: str, qrels: str | None = None) -> list[tuple[object, ...]]:
    files = {"queries": place / "queries.tsv", "corpus": place / "corpus.jsonl"}
    groups = read_joined(place / name, **files, qrels=None if qrels is None else place / qrels)
    return [(group.qid, group.documents, group.grades) for group in groups]


def test_a_run_is_joined_with_its_texts_and_grades(place: Path) -> None:
    assert joined(place, "run.txt") == [("q1", ("one", "T three"), (None, None)), ("q2", ("two",), (None,))]
    assert joined(place, "run.txt", "judged.txt") == [("q1", ("one", "T three"), (None, 2.0)), ("q2", ("two",), (0.0,))]


def test_judgements_alone_are_groups(place: Path) -> None:
    assert joined(place, "judged.txt") == [("q1", ("T three",), (2.0,)), ("q2", ("two", "one"), (0.0, 1.0))]


def test_a_beir_folder_reads_as_it_lies(place: Path) -> None:
    rows = [{"_id": "q1", "text": "what is one"}]
    (place / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "qrels").mkdir()
    (place / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n")
    (group,) = read(place).groups
    assert (group.query, group.documents, group.grades) == ("what is one", ("one", "two"), (1.0, 0.0))
    assert (group.qid, group.docids) == ("q1", ("d1", "d2"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.txt", "q1 Q0 d1\nq1 0 d3 two\n", "run.txt:1: the grade 'd1' is not a number"),
        ("run.txt", "q1 Q0 d1 1 9.5 bm25\nq1 d3\n", "run.txt:2: 2 columns"),
        ("run.txt", "q1 Q0 d7 1 9.5 bm25\n", "run.txt:1: there is no text for the id 'd7' in .*corpus.jsonl"),
        ("run.txt", "q7 Q0 d1 1 9.5 bm25\n", "no text for the id 'q7' in .*queries.tsv"),
        ("run.txt", "q1 0 d1 nan\n", "the grade must be finite"),
        ("run.txt", "q1 0 d1 1\nq1 0 d1 2\n", "run.txt:2: query 'q1' and document 'd1' stood at .*run.txt:1"),
        ("run.txt", "\n", "holds no lines"),
        ("corpus.jsonl", '{"_id": "d1"}\n', "corpus.jsonl:1: expected one of _id"),
        ("corpus.jsonl", '{"_id": "d1", "text"\n', "corpus.jsonl:1: not JSON"),
        ("corpus.jsonl", "d1 one\n", "id and text separated by a tab"),
        ("corpus.jsonl", "d1\t \n", "corpus.jsonl:1: the text is empty"),
        ("queries.tsv", "q1\twh\xe4t\n", "queries.tsv:1: byte 0xe4"),
    ],
)
def test_bad_files_are_named(place: Path, name: str, content: str, message: str) -> None:
    (place / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        joined(place, "run.txt")


def test_missing_files_are_named(place: Path) -> None:
    (place / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match="corpus.jsonl does not exist"):
        joined(place, "run.txt")
    with pytest.raises(DataError, match="nothing.txt does not exist"):
        joined(place, "nothing.txt")


def test_the_split_of_a_beir_folder_is_said_and_can_be_chosen(place: Path) -> None:
    (place / "queries.jsonl").write_text('{"_id": "q1", "text": "what is one"}\n')
    (place / "qrels").mkdir()
    for name, document in (("train", "d1"), ("test", "d2")):
        (place / "qrels" / f"{name}.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\t{document}\t1\n")
    whole, test = read(place), read(place / "qrels" / "test.tsv")
    assert whole.groups[0].documents == ("one",)
    assert whole.notes == [f"qrels/train.tsv was read; give '{place / 'qrels' / 'test'}.tsv' for another split."]
    assert (test.groups[0].documents, test.notes) == (("two",), [])
    (place / "qrels" / "train.tsv").unlink()
    (place / "qrels" / "test.tsv").unlink()
    with pytest.raises(DataError, match="has none of train.tsv, test.tsv, dev.tsv"):
        read(place)
