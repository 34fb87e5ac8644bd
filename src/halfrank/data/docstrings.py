"""The demo's corpus: functions of the installed Python, read with `ast`; nothing is imported.

A query is the first sentence of a docstring, the document it asks for is the function's signature in words. Training
groups come from the installed packages, held-out groups from the standard library: no module is on both sides.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from halfrank.data.pairs import Group
from halfrank.errors import DataError, MissingExtraError

SKIPPED = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
SKIPPED |= {"idlelib", "turtledemo", "ensurepip"}
MIN_WORDS, MAX_WORDS = 4, 40  # of a query: shorter says nothing, longer is no sentence
CANDIDATES = 20  # of BM25, for a held-out query
POOL, NEGATIVES = 24, 7  # wrong documents of a training group: 7 of BM25's top 24

Progress = Callable[[str, int, int], None]  # (what, done, of)


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function: its signature in words, its docstring's first sentence, and where it stands."""

    text: str  # "json decoder: raw decode (s, idx)"
    sentence: str
    name: str  # "json.decoder.JSONDecoder.raw_decode(s, idx)"
    where: str  # "json/decoder.py:343"


@dataclass(frozen=True)
class Corpus:
    """Groups to train on, and held-out groups whose documents stand in BM25's order with BM25's scores beside them."""

    train: list[Group]
    held_out: list[Group]
    bm25: list[np.ndarray]  # (20,) float32 for each held-out group
    documents: list[Function]


def collect(*, groups: int = 1000, queries: int = 200, seed: int = 0, progress: Progress | None = None) -> Corpus:
    """Read the installed Python: training groups from its packages, held-out queries from its standard library.

    The same installation and seed give the same corpus. Raises DataError when there is too little source to read,
    MissingExtraError without bm25s.
    """
    chosen = random.Random(seed)
    documents = standard_library(progress=progress)
    known = {text for function in documents for text in (_key(function.text), _key(function.sentence))}
    # More functions than groups: a wrong document should be wrong for want of nearness, not for want of choice.
    found = _packages(int(groups * 1.5) + POOL, chosen, known, progress)
    held_out, scores = _held_out(documents, queries, chosen)
    train = _training_groups(found, groups, chosen)
    if len(train) < groups or len(held_out) < queries:
        raise DataError(
            f"The installed Python gives {len(train)} training groups and {len(held_out)} held-out queries; "
            f"expected {groups} and {queries}. Install packages with their sources, or ask for fewer."
        )
    return Corpus(train, held_out, scores, documents)


def standard_library(*, progress: Progress | None = None) -> list[Function]:
    """Documented public functions of the standard library, each text once."""
    root = Path(sysconfig.get_path("stdlib"))
    return unique(_functions(_sources(root), root, "standard library", progress))


def _packages(count: int, chosen: random.Random, known: set[str], progress: Progress | None) -> list[Function]:
    """`count` functions of installed packages, from files in random order; none has a text in `known`."""
    roots = sorted({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})
    files = [path for root in roots for path in _sources(root)]
    chosen.shuffle(files)
    found: list[Function] = []
    for start in range(0, len(files), 100):
        found += _functions(files[start : start + 100], roots[0], "", None)
        kept = [f for f in unique(found) if not known & {_key(f.text), _key(f.sentence)}]
        if progress is not None:
            progress("installed packages", min(len(kept), count), count)
        if len(kept) >= count:
            return kept[:count]
    return kept if files else []


def _sources(root: Path) -> list[Path]:
    found = (path for path in root.rglob("*.py") if not path.name.startswith("test_"))
    return sorted(path for path in found if not SKIPPED & set(path.relative_to(root).parts))


def _functions(files: Sequence[Path], root: Path, what: str, progress: Progress | None) -> Iterator[Function]:
    for done, path in enumerate(files, 1):
        yield from functions_in(path, root)
        if progress is not None:
            progress(what, done, len(files))


def functions_in(path: Path, root: Path) -> list[Function]:
    """Documented public functions of one source file; none for a file that cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    place = path.relative_to(root) if path.is_relative_to(root) else path
    module = ".".join(part for part in place.with_suffix("").parts if part != "__init__")
    return [
        _function(node, owner, module, str(place), sentence)
        for node, owner in _definitions(tree, "")
        if not node.name.startswith("_") and (sentence := first_sentence(ast.get_docstring(node) or ""))
    ]


Definition = ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST, owner: str) -> Iterator[tuple[Definition, str]]:
    """Functions with the class they stand in; functions inside functions are nobody's to find."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, owner
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, child.name)
        elif not isinstance(child, ast.expr):
            yield from _definitions(child, owner)


def _function(node: Definition, owner: str, module: str, place: str, sentence: str) -> Function:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    names = [one.arg for one in every if one is not None and one.arg not in ("self", "cls")]
    title = ".".join(part for part in (module, owner, node.name) if part)
    text = f"{words(owner)}: {words(node.name)}" if owner else words(node.name)
    return Function(
        f"{text} ({', '.join(words(name) for name in names)})" if names else text,
        sentence,
        f"{title}({', '.join(names)})",
        f"{place}:{node.lineno}",
    )


def words(identifier: str) -> str:
    """An identifier in lower-case words: `HTTPServer` is "http server", `read_text2` is "read text2"."""
    humps = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", identifier)
    return " ".join(re.sub(r"[\W_]+", " ", humps).lower().split())


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring without markup; empty where it is not a sentence of 4 to 40 words."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    plain = re.sub(r":\w+(?::\w+)*:`~?([^`]*)`|`+([^`]*)`+|\*\*?(\w+)\*\*?", r"\1\2\3", paragraph)
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain, maxsplit=1)[0].strip()
    looks_like_code = re.match(r"[\w.]+ ?\(|\W", sentence) or re.search(r"->| = ", sentence)
    return sentence if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and not looks_like_code else ""


def unique(functions: Iterable[Function]) -> list[Function]:
    """The functions whose sentence occurs once and whose signature occurs once: others have more than one answer."""
    found = list(functions)
    counts = Counter(text for f in found for text in (_key(f.text), _key(f.sentence)))
    return [f for f in found if counts[_key(f.text)] == 1 and counts[_key(f.sentence)] == 1]


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


# Candidates


class Bm25:
    """BM25 over texts, by bm25s."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._library = _bm25s()
        self._index = self._library.BM25()
        self._index.index(self._tokens(texts), show_progress=False)
        self._count = len(texts)

    def top(self, queries: Sequence[str], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query the rows of the best `count` texts, best first, and their scores; ties by row."""
        wanted = min(self._count, 2 * count)  # ties at the border are settled by row, not by the library's mood
        found = self._index.retrieve(self._tokens(queries), k=wanted, show_progress=False)
        tops = []
        for rows, scores in zip(found.documents, found.scores, strict=True):
            order = np.lexsort((rows, -scores))[:count]
            tops.append((rows[order], scores[order].astype(np.float32)))
        return tops

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        return self._library.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


def _bm25s() -> Any:
    try:
        return import_module("bm25s")
    except ImportError as error:
        raise MissingExtraError("The demo finds its candidates with bm25s: pip install 'halfrank[demo]'.") from error


def _held_out(documents: Sequence[Function], count: int, chosen: random.Random) -> tuple[list[Group], list[np.ndarray]]:
    """Queries whose answer is among BM25's candidates, with these candidates in BM25's order."""
    groups, scores = [], []
    tops = Bm25([f.text for f in documents]).top([f.sentence for f in documents], CANDIDATES)
    answerable = [row for row, (candidates, _) in enumerate(tops) if row in candidates]
    for row in sorted(chosen.sample(answerable, min(count, len(answerable)))):
        candidates, values = tops[row]
        groups.append(_group(documents, row, candidates.tolist()))
        scores.append(values)
    return groups, scores


def _training_groups(functions: Sequence[Function], count: int, chosen: random.Random) -> list[Group]:
    """One right document and 7 of BM25's top 24, for functions in random order."""
    if len(functions) <= NEGATIVES:
        return []
    tops = Bm25([f.text for f in functions]).top([f.sentence for f in functions], POOL)
    groups = []
    for row in chosen.sample(range(len(functions)), min(count, len(functions))):
        others = [other for other in tops[row][0].tolist() if other != row]
        groups.append(_group(functions, row, [row, *chosen.sample(others, min(NEGATIVES, len(others)))]))
    return groups


def _group(functions: Sequence[Function], row: int, members: list[int]) -> Group:
    return Group(
        functions[row].sentence,
        tuple(functions[member].text for member in members),
        tuple(float(member == row) for member in members),
        functions[row].where,
        str(row),
        tuple(str(member) for member in members),
    )
