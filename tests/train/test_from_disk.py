"""Training from tokens on disk ends with the bits of training from memory, and bad rows are found before the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from halfrank.cli import app
from halfrank.data.source import Source
from halfrank.errors import DataError
from halfrank.model import folder
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, from_groups, from_pairs, from_source
from halfrank.train.loop import train
from tiny import PAIRS, make_folder


def rows(kind: str) -> list[dict[str, object]]:
    if kind == "pairs":
        return [{"query": q, "document": d, "label": i % 2} for i, (q, d) in enumerate(PAIRS)]
    documents = [d for _, d in PAIRS]
    return [
        {"query": PAIRS[i][0], "pos": documents[i : i + 1], "neg": documents[i + 1 : i + 3]}
        for i in range(0, len(PAIRS), 3)
    ]


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_with_and_without_the_cache_a_run_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    data, path = tmp_path / "data.jsonl", make_folder("bert", tmp_path / "bert")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    ends = []
    for on_disk in (False, True):
        scorer = folder.load(path, folder.LoadOptions(dtype=torch.float16, compute="float32"))
        if on_disk:
            examples: Examples = from_source(Source(data), scorer.pairs, tmp_path / "tokens")
        else:
            held = Source(data).dataset()
            examples = from_groups(held.groups, scorer.pairs) if held.grouped else from_pairs(held.pairs, scorer.pairs)
        config = TrainConfig(epochs=2, batch_size=5, lr=1e-3, max_tokens=200)
        result = train(scorer, examples, config)
        state = [v for entry in result.optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
        ends.append((result.losses, [*scorer.model.state_dict().values(), *state]))
    assert (tmp_path / "tokens").exists()
    assert len(ends[0][0]) > 2
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


@pytest.mark.parametrize("row", ['{"query": "a"}', '{"query": "a", "document": "b"}', "no json"])
def test_a_bad_last_row_is_found_before_the_model_is_read(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows("pairs")) + row + "\n")
    monkeypatch.setattr(folder, "load", lambda *more: pytest.fail("the model was read"))
    done = CliRunner().invoke(app, ["train", str(data), "--model", "nowhere", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, DataError), done.output
    assert f"{len(PAIRS) + 1}" in str(done.exception)
    assert not (tmp_path / "out").exists()
