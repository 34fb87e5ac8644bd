"""Scoring a file chunk by chunk: the same output whether it went through, was stopped, or was killed between writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfrank import score as module
from halfrank.data.pairs import Group, Pair
from halfrank.errors import DataError, SaveError
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from tiny import PAIRS, make_folder

ITEMS = [Pair(query, document, None, f"row {row}") for row, (query, document) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    torch.set_num_threads(1)
    return folder.load(make_folder("bert", tmp_path_factory.mktemp("model") / "bert"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)


def stopping(after: int, error: BaseException) -> Iterator[Pair]:
    yield from ITEMS[:after]
    raise error


def test_lines_hold_what_predict_gives(scorer: Scorer, tmp_path: Path) -> None:
    done = module.score(scorer, ITEMS, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert done.pairs == len(ITEMS)
    assert [(row["query"], row["document"]) for row in rows] == PAIRS
    assert [row["score"] for row in rows] == pytest.approx(predict(scorer, PAIRS).values[:, 0].tolist(), abs=1e-6)
    module.score(scorer, ITEMS, tmp_path / "out.txt", shape="scores")
    assert [float(line) for line in (tmp_path / "out.txt").read_text().split()] == [row["score"] for row in rows]


@pytest.mark.parametrize("after", [0, 3, 5, 12, 23])
def test_an_interrupted_run_goes_on_to_the_same_bytes(scorer: Scorer, tmp_path: Path, after: int) -> None:
    module.score(scorer, ITEMS, tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        module.score(scorer, stopping(after, KeyboardInterrupt()), tmp_path / "out.jsonl", fingerprint="same")
    assert not (tmp_path / "out.jsonl").exists()
    partial = tmp_path / ".out.jsonl.partial"
    partial.write_text(partial.read_text() + '{"query": "half a li')  # what a kill in the middle of a write leaves
    done = module.score(scorer, ITEMS, tmp_path / "out.jsonl", fingerprint="same")
    assert done.resumed == after // 5 * 5
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_other_data_or_settings_begin_anew(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        module.score(scorer, stopping(12, KeyboardInterrupt()), tmp_path / "out.jsonl", fingerprint="one")
    assert module.score(scorer, ITEMS, tmp_path / "out.jsonl", fingerprint="another").resumed == 0


def test_a_bad_row_leaves_nothing_behind(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 12"):
        module.score(scorer, stopping(12, DataError("row 12: broken")), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_ordered_by_score(scorer: Scorer, tmp_path: Path) -> None:
    group = Group("q", tuple(d for _, d in PAIRS[:7]), (None,) * 7, "run:1", "q7", tuple(f"d{i}" for i in range(7)))
    module.score(scorer, [group], tmp_path / "out.run", shape="trec")
    lines = [line.split() for line in (tmp_path / "out.run").read_text().splitlines()]
    values = predict(scorer, [("q", d) for d in group.documents]).values[:, 0]
    assert [line[2] for line in lines] == [f"d{i}" for i in sorted(range(7), key=lambda i: -values[i])]
    assert [line[3] for line in lines] == [str(rank) for rank in range(1, 8)]
    assert {(line[0], line[1], line[5]) for line in lines} == {("q7", "Q0", "halfrank")}
    with pytest.raises(DataError, match="with ids"):
        module.score(scorer, ITEMS, tmp_path / "pairs.run", shape="trec")


def test_two_writers_of_one_file_do_not_mix(scorer: Scorer, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def meanwhile() -> Iterator[Pair]:
        yield from ITEMS[:7]
        with pytest.raises(SaveError, match=r"Another process is writing '.*out.jsonl'.*another --out"):
            module.score(scorer, ITEMS[:3], out)
        yield from ITEMS[7:]

    module.score(scorer, meanwhile(), out)
    module.score(scorer, ITEMS, tmp_path / "alone.jsonl")
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    module.score(scorer, ITEMS[:3], out)
    assert len(out.read_text().splitlines()) == 3


def test_a_full_disk_leaves_nothing_or_what_is_finished(scorer: Scorer, tmp_path: Path) -> None:
    def filled(after: int) -> Iterator[Pair]:
        yield from ITEMS[:after]
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"No space left on device\. Scored so far: 0"):
        module.score(scorer, filled(3), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SaveError, match="Scored so far: 10"):
        module.score(scorer, filled(12), tmp_path / "out.jsonl", fingerprint="same")
    assert module.score(scorer, ITEMS, tmp_path / "out.jsonl", fingerprint="same").resumed == 10
    with pytest.raises(SaveError, match="Cannot write"):
        module.score(scorer, ITEMS, Path("/dev/full/x"))
