"""The demo's corpus: read with ast, the same every time, nothing on both sides."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from halfrank.data import docstrings
from halfrank.data.docstrings import Bm25, collect, first_sentence, functions_in, unique, words
from halfrank.errors import DataError, MissingExtraError

SOURCE = '''
"""A module's own docstring is no function's."""
raise SystemExit("nothing here may run")

def load_HTTPPage(self_url, *parts, timeout=3, **more):
    """Load a page from the `self_url` given.  It may fail.

    More text.
    """
    def inner():
        """Nobody finds a function in a function."""

def short(): "Too short."
def _private(): "Nobody asks for a private function."
def undocumented(): ...

if True:
    class TextReader2:
        """A class is no function either way."""
        async def readLine(self, size, /, *, keep=True):
            """Return one :class:`~x.Line`, or
            **None** at the *end*."""
'''
WORDS = ["read", "write", "open", "close", "file", "line", "page", "text", "socket", "thread", "queue", "lock", "time"]
WORDS += ["date", "parse", "format", "number", "list"]


def write(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


def invented(folder: Path, name: str, count: int, seed: int) -> None:
    """`count` functions with random names and sentences that share words with them."""
    chosen = random.Random(seed)
    parts = []
    for number in range(count):
        named = chosen.sample(WORDS, 3)
        sentence = f"{' '.join(chosen.sample(named, 2)).capitalize()} for case {name} {number}."
        parts.append(f'def {"_".join(named)}_{name}{number}(a, b):\n    """{sentence}"""\n')
    write(folder, f"{name}.py", "\n".join(parts))


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A small installed Python: a standard library and two package folders."""
    library, site = tmp_path / "python", tmp_path / "python" / "site-packages"
    for number in range(3):
        invented(library, f"std{number}", 30, number)
        invented(site, f"pack{number}", 40, 10 + number)
    shared = 'def copied_everywhere(a):\n    """Read what stands on both sides."""\n'
    write(library, "vendored.py", shared)
    write(site, "vendored.py", shared)
    write(library, "test/test_std.py", 'def from_a_test():\n    """Tests are never a part of it."""\n')
    write(site, "broken.py", "def (:\n")
    write(site, "binary.py", "\0")
    places = {"stdlib": library, "purelib": site, "platlib": site}
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda kind: str(places[kind]))


def test_functions_of_a_file(tmp_path):
    path = write(tmp_path, "net/pages.py", SOURCE)
    first, second = functions_in(path, tmp_path)
    assert first.text == "load http page (self url, parts, timeout, more)"
    assert first.sentence == "Load a page from the self_url given."
    assert first.name == "net.pages.load_HTTPPage(self_url, parts, timeout, more)"
    assert first.where == f"{Path('net/pages.py')}:5"
    assert second.text == "text reader2: read line (size, keep)"
    assert second.sentence == "Return one x.Line, or None at the end."
    assert second.name == "net.pages.TextReader2.readLine(size, keep)"


@pytest.mark.parametrize("source", [b"def (:", b"\0", b"# coding: nonsense\n", "é = 1".encode("latin1"), b"(" * 3000])
def test_files_that_cannot_be_parsed_are_passed_over(tmp_path, source):
    path = tmp_path / "bad.py"
    path.write_bytes(source)
    assert functions_in(path, tmp_path) == []


@pytest.mark.parametrize(
    ("identifier", "spoken"),
    [
        ("HTTPServer", "http server"),
        ("read_text2", "read text2"),
        ("getElementById", "get element by id"),
        ("__x__", "x"),
        ("UTF8", "utf8"),
        ("größe_max", "größe max"),
        ("a", "a"),
        ("", ""),
    ],
)
def test_identifiers_in_words(identifier, spoken):
    assert words(identifier) == spoken


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of all. Or not.", "Return the sum of all."),
        ("Return e.g. the sum\n  of all\n\nMore.", "Return e.g. the sum of all"),
        ("Return ``None`` if the file is *not* there!  Always.", "Return None if the file is not there!"),
        ("Too short here.", ""),
        ("S.join(iterable) -> str and so on it goes", ""),
        ("x (int): the number of what is counted", ""),
        (">>> add(1, 2) gives three at once", ""),
        ("word " * 41, ""),
        ("", ""),
    ],
)
def test_first_sentences(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_texts_with_two_answers_are_left_out(tmp_path):
    source = 'def {}(a):\n    """{}."""\n'
    same = [
        ("one", "The same text for both"),
        ("two", "The same text, for both"),
        ("three", "Another text for this one"),
    ]
    path = write(tmp_path, "m.py", "".join(source.format(*pair) for pair in same))
    assert [function.text for function in unique(functions_in(path, tmp_path))] == ["three (a)"]


def test_bm25_breaks_ties_by_row():
    index = Bm25(["read file"] * 6 + ["write socket file", "nothing"])
    (rows, scores), (other, _) = index.top(["read", "socket"], 4)
    assert rows.tolist() == [0, 1, 2, 3]
    assert len(set(scores.tolist())) == 1
    assert other[0] == 6


def test_bm25_equals_the_formula():
    texts = ["read one file", "read read socket", "close the socket now quickly"]
    (rows, scores) = Bm25(texts).top(["read socket"], 3)[0]
    terms = [text.replace(" the", "").split() for text in texts]  # "the" and "now" carry no weight: stopwords
    mean = np.mean([len(t) for t in terms])
    wanted = np.zeros(3)
    for term in ("read", "socket"):
        frequency = np.array([t.count(term) for t in terms])
        idf = np.log(1 + (3 - (frequency > 0).sum() + 0.5) / ((frequency > 0).sum() + 0.5))
        wanted += idf * frequency / (frequency + 1.5 * (0.25 + 0.75 * np.array([len(t) for t in terms]) / mean))
    assert rows.tolist() == np.argsort(-wanted).tolist()
    np.testing.assert_allclose(scores, np.sort(wanted)[::-1], rtol=1e-5)


def test_a_corpus(installation):
    seen = []
    corpus = collect(groups=60, queries=25, seed=3, progress=lambda *step: seen.append(step))
    assert len(corpus.train) == 60
    assert {len(group.documents) for group in corpus.train} == {8}
    assert len(corpus.held_out) == len(corpus.bm25) == 25
    for group, scores in zip(corpus.held_out, corpus.bm25, strict=True):
        assert len(group.documents) == len(set(group.documents)) == len(scores) == 20
        assert (np.diff(scores) <= 0).all()
        right = corpus.documents[int(group.qid)]
        assert (right.text, right.sentence) == (group.documents[group.grades.index(1.0)], group.query)
    assert all(sum(group.grades) == 1 for group in [*corpus.train, *corpus.held_out])
    assert len(corpus.documents) == 91  # three modules of 30 and the vendored function, no test
    both = {text for g in corpus.train for text in (g.query, *g.documents)} & {
        t for f in corpus.documents for t in (f.text, f.sentence)
    }
    assert not both
    assert {what for what, _, _ in seen} == {"standard library", "installed packages"}
    assert all(done <= of for _, done, of in seen)


def test_a_corpus_depends_on_the_seed_alone(installation):
    first, again, other = [collect(groups=40, queries=20, seed=seed) for seed in (1, 1, 2)]
    assert (first.train, first.held_out) == (again.train, again.held_out)
    assert first.train != other.train
    assert first.held_out != other.held_out


def test_too_little_source(installation):
    with pytest.raises(DataError, match=r"gives \d+ training groups and 25 held-out queries; expected 500 and 25"):
        collect(groups=500, queries=25)


def test_bm25s_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"finds its candidates with bm25s: pip install 'halfrank\[demo\]'"):
        Bm25(["a"])


def test_this_python_imports_nothing_it_reads():
    code = (
        "import sys; from halfrank.data.docstrings import standard_library\n"
        "found = standard_library()\n"
        "assert len(found) > 1000 and 'this' not in sys.modules and 'tkinter' not in sys.modules\n"
        "assert any(f.name.startswith('textwrap.dedent(') for f in found)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
