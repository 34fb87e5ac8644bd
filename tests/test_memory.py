"""What a plan says, against what is really held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from halfrank import memory
from halfrank.cli import app
from halfrank.data.pairs import Pair
from halfrank.errors import MemoryLimitError
from halfrank.model import folder
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from tiny import PAIRS, make_folder

LENGTHS = [40, 31, 30, 12]


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 * 2**30), ("500 MB", 500 * 10**6), ("1.5g", 15 * 10**8), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "12 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 16GiB"):
        memory.parse_size(text)


@pytest.mark.parametrize("scheme", ["float32", "float16", "bfloat16"])
def test_weights_residual_and_moments_are_those_of_a_real_run(scheme: str, tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    scorer = folder.load(path, folder.LoadOptions(dtype=getattr(torch, scheme), compute="float32"))
    examples = from_pairs([Pair(q, d, 1.0) for q, d in PAIRS], scorer.pairs)
    optimizer = train(scorer, examples, TrainConfig(steps=1)).optimizer
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    kept = sum(t.nbytes for t in state if t.ndim) + sum(p.nbytes for p in scorer.model.parameters())
    need = memory.need(memory.describe(path), memory.Way(scheme), LENGTHS)
    blocks = 4 * len(state)  # the last block of a tensor is not full
    assert need.weights + need.residual + need.moments == pytest.approx(kept, abs=blocks)


@pytest.mark.parametrize("family", ["bert", "mpnet", "llama"])
def test_activations_are_counted_on_the_models_own_code(family: str, tmp_path: Path) -> None:
    described = memory.describe(make_folder(family, tmp_path / family))
    once, twice = (memory.need(described, memory.Way("float32"), LENGTHS * n).activations for n in (1, 2))
    recomputed = memory.need(described, memory.Way("float32", checkpointing=True), LENGTHS * 2)
    assert 1.9 * once < twice < 2.1 * once
    assert recomputed.activations < 0.7 * twice


def test_the_fastest_way_that_fits_is_chosen(tmp_path: Path) -> None:
    described = memory.describe(make_folder("bert", tmp_path / "bert"))
    batches = [[30] * 40, [5] * 8]
    plenty = memory.plan(described, batches, limit=10**9, base=0)
    assert plenty.tokens == 1200
    assert plenty.chosen is not None
    assert plenty.chosen.way == memory.Way("float32")
    peaks = sorted({row.need.peak for row in plenty.rows})
    tight = memory.plan(described, batches, limit=peaks[1], base=0)
    assert tight.chosen is not None
    assert tight.chosen.need.peak <= peaks[1]
    assert all(row.way.cost >= tight.chosen.way.cost for row in tight.rows if row.fits)
    assert "->" + str(tight.chosen.way) in str(tight)
    nothing = memory.plan(described, batches, limit=10, base=0)
    assert nothing.chosen is None
    assert "Nothing fits" in str(nothing)


def test_a_limit_is_kept() -> None:
    memory.require(0, None, "nothing")
    with pytest.raises(MemoryLimitError, match="a step needs"):
        memory.require(2**60, None, "a step")
    assert 0 < memory.resident() <= memory.peak_resident()


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"query": q, "document": d, "label": 1}) for q, d in PAIRS))
    done = CliRunner().invoke(app, ["plan", str(path), "--data", str(data), "--memory", "40GiB", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["batch_pairs"] == 16
    assert found["rows"][found["chosen"]]["fits"]
    refused = CliRunner().invoke(app, ["plan", str(path), "--memory", "1MB"])
    assert refused.exit_code == 1
    assert "does not fit" in refused.stdout
