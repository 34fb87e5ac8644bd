"""Files and Hugging Face datasets to pairs or groups; a bad row is named with what is wrong and what was expected."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from halfrank.data.lines import decoded
from halfrank.data.pairs import Group, Pair, by_query, check_text
from halfrank.data.trec import beir_of, read_beir
from halfrank.errors import DataError, MissingExtraError

NAMES: dict[str, tuple[str, ...]] = {
    "query": ("query", "sentence1", "question", "anchor", "text1", "sentence_1", "premise"),
    "document": ("document", "sentence2", "passage", "text2", "sentence_2", "hypothesis", "text", "answer", "response"),
    "label": ("label", "score", "labels", "scores", "similarity_score", "similarity", "grade"),
    "docs": ("docs", "documents", "passages"),
    "pos": ("pos", "positive", "positives"),
    "neg": ("neg", "negative", "negatives"),
    "pos_scores": ("pos_scores",),
    "neg_scores": ("neg_scores",),
    "qid": ("qid", "query_id"),
}
SHAPES = "query with pos and neg, query with docs[].text and docs[].grade, or query and document with a label or score"
SEPARATORS = ";\t|,"
SHOWN_PROBLEMS = 5  # bad rows named at once: enough to see a pattern, few enough to read


class Row(NamedTuple):
    """A row as it was found: its values by column name, or the error that stands in its place."""

    source: str
    values: Mapping[str, Any] | DataError


@dataclass(frozen=True)
class Dataset:
    """Pairs or groups, never both; `notes` tell what was left out or guessed."""

    pairs: list[Pair] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def grouped(self) -> bool:
        """True where the rows are queries with several documents."""
        return bool(self.groups)

    @property
    def queries(self) -> list[Group]:
        """Its groups, or its pairs gathered by query."""
        return self.groups if self.grouped else by_query(self.pairs)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """What is scored: (query, document) of every row, in order."""
        items: list[Pair | Group] = [*self.groups, *self.pairs]
        return [text for item in items for text in item.texts]

    def __len__(self) -> int:
        return len(self.groups or self.pairs)


def read(
    path: str | os.PathLike[str], *, columns: Mapping[str, str] | None = None, keep_unjudged: bool = False
) -> Dataset:
    """Read a JSONL, CSV, TSV or Parquet file, a BEIR folder or one of its qrels; raises DataError naming bad rows.

    `columns` says which column plays a role of `NAMES`, as in {"query": "title"}. Documents whose grade is null are
    left out, as training needs grades; `keep_unjudged` keeps them with grade None, as a ranking needs all candidates.
    """
    notes: list[str] = []
    return collected(read_items(path, columns=columns, keep_unjudged=keep_unjudged, notes=notes), notes)


def read_items(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    keep_unjudged: bool = False,
    notes: list[str],
) -> Iterator[Pair | Group]:
    """What `read` reads, one row after the other; `notes` are added to, at the latest with the last row.

    Bad rows are named together, by a DataError where the rows end.
    """
    path = Path(path)
    if (beir := beir_of(path)) is not None:
        groups, told = read_beir(*beir)
        data = joined(groups, keep_unjudged=keep_unjudged)
        notes += told + data.notes
        yield from data.groups
        return
    rows = _reader_of(path)(path, columns or {})
    yield from _kept(rows, _Columns(columns or {}), keep_unjudged=keep_unjudged, what=str(path), notes=notes)


def stream(path: str | os.PathLike[str], *, columns: Mapping[str, str] | None = None) -> Iterator[Pair | Group]:
    """The rows of a file one after the other, for scoring: labels may be absent. Raises DataError at a bad row."""
    path = Path(path)
    if (beir := beir_of(path)) is not None:
        yield from read_beir(*beir)[0]
        return
    found = _Columns(columns or {})
    first: Pair | Group | None = None
    for source, values in _reader_of(path)(path, columns or {}):
        item = _item(source, values, found)
        first = first or item
        _check_kind(item, first)
        yield item
    if first is None:
        raise DataError(f"{path} holds no rows. Expected {SHAPES}.")


def joined(groups: Sequence[Group], *, keep_unjudged: bool = False) -> Dataset:
    """Groups that were put together from several files, as a data set; see `read` for what `keep_unjudged` does."""
    counts = {"unjudged": 0, "without": 0}
    kept = list(groups) if keep_unjudged else [one for one in (_judged(group, counts) for group in groups) if one]
    if not kept:
        raise DataError(
            f"No query has a graded document ({groups[0].source}). Training and evaluation need judgements."
        )
    return Dataset(groups=kept, notes=_notes(counts))


def from_hf(dataset: Any, *, columns: Mapping[str, str] | None = None, keep_unjudged: bool = False) -> Dataset:
    """Read a Hugging Face dataset with the columns that sentence-transformers takes; raises DataError naming the row.

    These are what its miner of hard negatives writes: labeled-pair (text, text, label), labeled-list (text, texts,
    labels), triplet and n-tuple (text, right text, wrong texts, perhaps a list of scores). Columns with other names
    are taken in their order, as sentence-transformers does: two texts and a label.
    """
    names = getattr(dataset, "column_names", None)
    if isinstance(names, Mapping):
        splits = ", ".join(map(repr, names))
        raise DataError(
            f"This is a dictionary of splits ({splits}), not a dataset. Choose one, as in dataset['train']."
        )
    rows = (Row(f"row {number} (counted from 0)", _plain(values)) for number, values in enumerate(dataset))
    notes: list[str] = []
    known = _Columns(columns or {}, by_order=True)
    return collected(_kept(rows, known, keep_unjudged=keep_unjudged, what="The dataset", notes=notes), notes)


def _plain(values: Any) -> Any:
    """A row whose arrays and tensors, which a dataset's format may make of lists, are lists again."""
    if not isinstance(values, Mapping):
        return values
    return {name: v.tolist() if getattr(v, "ndim", 0) and hasattr(v, "tolist") else v for name, v in values.items()}


def collected(items: Iterable[Pair | Group], notes: list[str]) -> Dataset:
    """Rows as a data set."""
    pairs: list[Pair] = []
    groups: list[Group] = []
    for item in items:
        if isinstance(item, Pair):
            pairs.append(item)
        else:
            groups.append(item)
    return Dataset(pairs, groups, notes)


def _reader_of(path: Path) -> Callable[[Path, Mapping[str, str]], Iterator[Row]]:
    readers = {
        ".jsonl": _json_rows,
        ".ndjson": _json_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _tsv_rows,
        ".parquet": _parquet_rows,
    }
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}. Give a file: {', '.join(readers)}.")
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} has the ending {path.suffix!r}. Files are read by their ending: {', '.join(readers)}.")
    return readers[path.suffix.lower()]


# Lines


def _json_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    for number, line in decoded(path):
        source = f"{path}:{number}"
        if isinstance(line, DataError):
            yield Row(source, line)
        elif line.strip():
            yield Row(source, _json_object(line, source))


def _json_object(line: str, source: str) -> Mapping[str, Any] | DataError:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        if line.strip() in ("[", "{"):
            return DataError(f"{source}: the JSON runs over several lines. Expected one object on each line (JSONL).")
        return DataError(f"{source}: not JSON: {error.msg} at position {error.colno}. Expected one object a line.")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 1,000 deep
        return DataError(f"{source}: not JSON that can be read: {error}.")
    if isinstance(values, dict):
        return values
    return DataError(f"{source}: expected an object, got {type(values).__name__}. Write one object a line (JSONL).")


def _parquet_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("Parquet files need the extra [parquet]: pip install 'halfrank[parquet]'.") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for values in batch.to_pylist():
                yield Row(f"{path}, row {number} (counted from 0)", values)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0][:120]}.") from error


def _csv_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    wrong: list[DataError] = []

    def lines() -> Iterator[str]:
        for _, line in decoded(path):
            if isinstance(line, DataError):
                wrong.append(line)
                return
            yield line

    reader = csv.reader(lines(), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        start = 1
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1

    try:
        yield from _table_rows(path, numbered(), columns, ",")
    except csv.Error as error:
        if not wrong:  # where a line could not be decoded, its quotes stay open
            where = f"{path}:{reader.line_num}"
            yield Row("", DataError(f"{where}: not CSV: {error}. A quote inside a quoted text is doubled."))
    if wrong:
        yield Row("", wrong[0])


def _tsv_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    wrong: list[DataError] = []

    def numbered() -> Iterator[tuple[int, list[str]]]:
        for number, line in decoded(path):
            if isinstance(line, DataError):
                wrong.append(line)
                return
            text = line.rstrip("\r\n")
            yield number, [_unquoted(one) for one in text.split("\t")] if text.strip() else []

    yield from _table_rows(path, numbered(), columns, "tab")
    if wrong:
        yield Row("", wrong[0])


def _unquoted(text: str) -> str:
    # Many TSV files never quote, so a lone quote must not swallow the lines after it; pandas quotes fields with quotes.
    inner = text[1:-1]
    whole = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else text


def _table_rows(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: Mapping[str, str], separator: str
) -> Iterator[Row]:
    header: list[str] | None = None
    for number, fields in rows:
        if not fields:
            continue
        if header is None:
            header = _header(fields, columns, separator, f"{path}:{number}")
            if header is fields:
                continue
        yield Row(f"{path}:{number}", _table_values(fields, header, separator, f"{path}:{number}"))


def _header(fields: list[str], columns: Mapping[str, str], separator: str, source: str) -> list[str]:
    """`fields` itself if it names columns, else the names of a table without header: text, text, number."""
    known = {name for names in NAMES.values() for name in names} | set(columns.values())
    if known & set(fields):
        return fields
    if not columns and len(fields) == 3 and _is_number(fields[2]):
        return ["query", "document", "label"]
    other = next((mark for mark in SEPARATORS if mark != separator and mark in separator.join(fields)), None)
    if len(fields) == 1 and other is not None:
        raise DataError(
            f"{source}: the columns seem to be separated by {other!r}, but this file is read with {separator!r}: "
            f"{fields[0]!r:.120}. Write it with commas and the ending .csv, or with tabs and the ending .tsv."
        )
    raise DataError(
        f"{source}: the first row is neither a header with known columns nor text, text, number: {fields!r:.120}. "
        "Expected a header such as query,document,label, or names for the columns there are: --column query=title, "
        "or columns={'query': 'title', ...} in Python."
    )


def _table_values(fields: list[str], header: list[str], separator: str, source: str) -> Mapping[str, Any] | DataError:
    if len(fields) != len(header):
        return DataError(
            f"{source}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}) separated by {separator!r}. "
            "A separator inside a text needs quotes around the text."
        )
    values: dict[str, Any] = dict(zip(header, fields, strict=True))
    return values | {name: _number_in(values[name]) for name in header if name in NUMERIC}


NUMERIC = {name for role in ("label", "pos_scores", "neg_scores") for name in NAMES[role]}


def _is_number(text: str) -> bool:
    return not isinstance(_number_in(text), str)


def _number_in(text: str) -> int | float | str | None:
    """The number a table's field holds, None if it is empty, the text itself if it is no number."""
    if not text.strip():
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Rows


class _Columns:
    """Which column plays which role, found once for every set of column names."""

    def __init__(self, given: Mapping[str, str], *, by_order: bool = False) -> None:
        unknown = sorted(set(given) - set(NAMES))
        if unknown:
            raise DataError(f"columns has the unknown role {unknown[0]!r}. Roles are {', '.join(NAMES)}.")
        self._given = given
        self._by_order = by_order
        self._found: dict[tuple[str, ...], dict[str, list[str]]] = {}
        self.notes: list[str] = []

    def roles(self, names: tuple[str, ...], source: str) -> dict[str, list[str]]:
        """Columns of each role, in the row's order; several only for `pos` and `neg`."""
        if names not in self._found:
            self._found[names] = self._match(names, source)
        return self._found[names]

    def _match(self, names: tuple[str, ...], source: str) -> dict[str, list[str]]:
        roles = {role: [name] for role, name in self._given.items()}
        for name in roles.values():
            if name[0] not in names:
                raise DataError(f"{source}: there is no column {name[0]!r}. The columns are {', '.join(names)}.")
        for role, known in NAMES.items():
            # negative_1, negative_2, ... are further columns of the same role.
            members = [name for name in names if name in known or (role in ("pos", "neg") and _stem(name) in known)]
            if role not in roles and members:
                roles[role] = members if role in ("pos", "neg") else [min(members, key=known.index)]
        if "query" in roles and roles.keys() & {"document", "docs", "pos"}:
            return _settled(roles)
        rest = [name for name in names if name not in roles.get("label", [])]
        if self._by_order and len(rest) == 2 and not self._given:
            self.notes.append(f"Columns {rest[0]!r} and {rest[1]!r} were taken as query and document.")
            return {"query": rest[:1], "document": rest[1:], **{r: roles[r] for r in ("label",) if r in roles}}
        missing = "document, docs or pos" if "query" in roles else "query"
        raise DataError(f"{source}: no column is the {missing}. The columns are {', '.join(names)}; expected {SHAPES}.")


def _stem(name: str) -> str:
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else name


def _kept(
    rows: Iterable[Row], columns: _Columns, *, keep_unjudged: bool, what: str, notes: list[str]
) -> Iterator[Pair | Group]:
    """The rows that can be used, all of one kind; raises DataError at the end for those that are wrong, or for none."""
    first: Pair | Group | None = None
    problems: list[str] = []
    counts = {"unjudged": 0, "without": 0}
    for source, values in rows:
        try:
            item = _item(source, values, columns)
            if first is not None:
                _check_like(item, first)
        except DataError as error:
            if first is None and not counts["unjudged"]:
                raise  # the first row: the whole file has another shape, naming five rows would say it five times
            problems.append(str(error))
            if len(problems) == SHOWN_PROBLEMS:
                problems.append(f"These are the first {SHOWN_PROBLEMS} problems; there may be more.")
                break
            continue
        kept = _judged(item, counts) if isinstance(item, Group) and not keep_unjudged else item
        if kept is not None:
            first = first or kept
            yield kept
    if problems:
        raise DataError("\n".join(problems))
    notes += columns.notes + _notes(counts)
    if first is None:
        because = f" that can be used ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{what} holds no rows{because}. Expected {SHAPES}.")


def _notes(counts: Mapping[str, int]) -> list[str]:
    notes = []
    if counts["unjudged"]:
        notes.append(f"{counts['unjudged']} documents without a grade were left out.")
    if counts["without"]:
        notes.append(f"{counts['without']} queries without any graded document were left out.")
    return notes


def _judged(group: Group, counts: dict[str, int]) -> Group | None:
    kept = [index for index, grade in enumerate(group.grades) if grade is not None]
    counts["unjudged"] += len(group.grades) - len(kept)
    if not kept:
        counts["without"] += 1
        return None
    docids = tuple(group.docids[index] for index in kept) if group.docids is not None else None
    documents = tuple(group.documents[index] for index in kept)
    return Group(group.query, documents, tuple(group.grades[i] for i in kept), group.source, group.qid, docids)


def _check_like(item: Pair | Group, first: Pair | Group) -> None:
    """Raise DataError unless `item` is of the kind of the `first` row."""
    _check_kind(item, first)
    if isinstance(item, Pair) and isinstance(first, Pair) and (item.label is None) != (first.label is None):
        has = "has no label, but" if item.label is None else "has a label, but"
        raise DataError(f"{item.source}: the row {has} {first.source} {'has' if item.label is None else 'has none'}.")


def _check_kind(item: Pair | Group, first: Pair | Group) -> None:
    if type(item) is not type(first):
        kinds = {Pair: "a single pair", Group: "a query with several documents"}
        raise DataError(
            f"{item.source}: {kinds[type(item)]}, but {first.source} is {kinds[type(first)]}. "
            "Keep them in separate files."
        )


def _item(source: str, values: Mapping[str, Any] | DataError, columns: _Columns) -> Pair | Group:
    if isinstance(values, DataError):
        raise values
    if not isinstance(values, Mapping):
        raise DataError(f"{source}: expected a row with named columns, got {type(values).__name__}.")
    roles = columns.roles(tuple(values), source)
    row = {role: values[names[0]] for role, names in roles.items()}
    query = check_text(row["query"], f"{source}, {roles['query'][0]!r}")
    if "pos" in roles:
        return _contrast(query, row, [(n, values[n]) for n in roles["pos"]], _named(values, roles, "neg"), source)
    if "docs" in roles or isinstance(row.get("document"), list | tuple):
        return _graded(query, row, source)
    document = check_text(row["document"], f"{source}, {roles['document'][0]!r}")
    return Pair(query, document, _label(row.get("label"), f"{source}, {_name(roles, 'label')!r}"), source)


def _settled(roles: dict[str, list[str]]) -> dict[str, list[str]]:
    """Roles where one column alone would mislead: a document beside wrong ones is right, a labelled one is either."""
    if "neg" in roles and "pos" not in roles and "document" in roles:
        return {**roles, "pos": roles["document"]}
    if "label" in roles and "neg" not in roles and len(roles.get("pos", [])) == 1:
        return {role: names for role, names in roles.items() if role != "pos"} | {"document": roles["pos"]}
    return roles


def _named(values: Mapping[str, Any], roles: Mapping[str, list[str]], role: str) -> list[tuple[str, Any]]:
    return [(name, values[name]) for name in roles.get(role, [])]


def _name(roles: Mapping[str, list[str]], role: str) -> str:
    return roles.get(role, [role])[0]


def _contrast(
    query: str,
    row: Mapping[str, Any],
    positives: list[tuple[str, Any]],
    negatives: list[tuple[str, Any]],
    source: str,
) -> Group:
    """A group from right and wrong documents; their scores, where given, are the grades instead of 1 and 0."""
    right, wrong = _texts(positives, source), _texts(negatives, source)
    if not right:
        raise DataError(f"{source}: {positives[0][0]!r} is empty. A query needs at least one right document.")
    if (row.get("pos_scores") is None) != (row.get("neg_scores") is None):
        raise DataError(f"{source}: only one of pos_scores and neg_scores is given. Give both or none.")
    if row.get("pos_scores") is None and row.get("label") is not None:
        grades = _scores_of_all(row["label"], len(right), len(wrong), source)
    else:
        grades = _scores(row.get("pos_scores"), "pos_scores", len(right), 1.0, source)
        grades += _scores(row.get("neg_scores"), "neg_scores", len(wrong), 0.0, source)
    return Group(query, tuple(right + wrong), tuple(grades), source, _qid(row))


def _texts(columns: list[tuple[str, Any]], source: str) -> list[str]:
    found = []
    for name, value in columns:
        for text in value if isinstance(value, list | tuple) else [value]:
            found.append(check_text(text, f"{source}, {name!r}"))
    return found


def _scores_of_all(value: Any, right: int, wrong: int, source: str) -> list[float]:
    """Scores of right and wrong texts in one list; one number beside one of each says how much better the right is."""
    if not isinstance(value, list | tuple) and right == wrong == 1:
        return [float(_number(value, f"{source}, 'score'")), 0.0]
    if not isinstance(value, list | tuple):
        raise DataError(f"{source}: {right + wrong} texts need a list of {right + wrong} scores; got {value!r:.60}.")
    return _scores(value, "scores", right + wrong, 0.0, source)


def _scores(value: Any, name: str, count: int, default: float, source: str) -> list[float]:
    if value is None:
        return [default] * count
    scores = value if isinstance(value, list | tuple) else [value]
    if len(scores) != count:
        raise DataError(f"{source}: {name} has {len(scores)} numbers for {count} texts. Expected one for each text.")
    return [float(_number(score, f"{source}, {name!r}")) for score in scores]


def _graded(query: str, row: Mapping[str, Any], source: str) -> Group:
    docs = row["docs"] if "docs" in row else row["document"]
    if not isinstance(docs, list | tuple) or not docs:
        raise DataError(f"{source}: 'docs' must be a list with at least one document; got {docs!r:.60}.")
    if not isinstance(docs[0], Mapping):
        return _labelled_list(query, docs, row, source)
    texts, grades, docids = [], [], []
    for place, doc in enumerate(docs):
        where = f"{source}, docs[{place}]"
        if not isinstance(doc, Mapping) or "text" not in doc:
            raise DataError(f"{where}: expected an object with 'text' (and 'grade', 'docid'); got {doc!r:.60}.")
        texts.append(check_text(doc["text"], f"{where}.text"))
        grade = _label(doc.get("grade"), f"{where}.grade")
        grades.append(None if grade is None else float(grade))
        docids.append(str(doc.get("docid", place)))
    return Group(query, tuple(texts), tuple(grades), source, _qid(row), tuple(docids))


def _labelled_list(query: str, docs: Sequence[Any], row: Mapping[str, Any], source: str) -> Group:
    texts = [check_text(doc, f"{source}, docs[{place}]") for place, doc in enumerate(docs)]
    labels = row.get("label")
    if not isinstance(labels, list | tuple) or len(labels) != len(texts):
        raise DataError(f"{source}: {len(texts)} documents need a list of {len(texts)} labels; got {labels!r:.60}.")
    grades = [_label(label, f"{source}, labels[{place}]") for place, label in enumerate(labels)]
    return Group(query, tuple(texts), tuple(None if g is None else float(g) for g in grades), source, _qid(row))


def _qid(row: Mapping[str, Any]) -> str | None:
    return None if row.get("qid") is None else str(row["qid"])


def _label(value: Any, source: str) -> int | float | None:
    return None if value is None else _number(value, source)


def _number(value: Any, source: str) -> int | float:
    """`value` as a finite number; raises DataError, saying what it is, otherwise."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        advice = "numbers without quotes" if _is_number(value) else "labels as numbers, 0 and 1 for example"
        raise DataError(f"{source}: expected a number, got the text {value!r:.40}. Write {advice}.")
    if not isinstance(value, int | float):
        raise DataError(f"{source}: expected a number, got {type(value).__name__} {value!r:.40}.")
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**53:
        raise DataError(f"{source}: expected a finite number, got {value!r:.40}. Repair or drop the row.")
    return value
