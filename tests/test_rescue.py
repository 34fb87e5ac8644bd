"""Scores that overflow: islands are found once, kept and saved; what they cannot mend is computed in float32."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from halfrank import CrossEncoder
from halfrank.data.readers import stream
from halfrank.diagnosis.islands import ahead_of
from halfrank.errors import NonFiniteScoreError
from halfrank.score import score
from tiny import PAIRS, make_folder

HOT = {
    "bert": ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"),
    "llama": ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    "mpnet": ("mpnet.encoder.layer.1.intermediate.dense", "mpnet.encoder.layer.1.output.dense"),
}


def overflowing(family: str, root: Path) -> Path:
    """A folder whose model leaves float16's range between two products, and is itself in float32."""
    model = CrossEncoder(str(make_folder(family, root / "plain")), num_labels=1)
    up, down = HOT[family]
    with torch.no_grad():
        model.model.get_submodule(up).weight.mul_(1e5)
        model.model.get_submodule(up).bias.mul_(1e5) if model.model.get_submodule(up).bias is not None else None
        model.model.get_submodule(down).weight.mul_(1e-4)
    model.save(str(root / "hot"))
    return root / "hot"


@pytest.mark.parametrize("compute", ["emulated-float16", "float16"])
@pytest.mark.parametrize("family", list(HOT))
def test_islands_are_found_kept_and_saved(
    family: str, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = overflowing(family, tmp_path)
    exact = CrossEncoder(str(path), compute="float32").predict(PAIRS)
    model = CrossEncoder(str(path), compute=compute)
    scores, report = model.predict(PAIRS, return_report=True)
    assert report.rescued
    assert 0 < len(report.islands) <= 4
    assert np.abs(scores - exact).max() < 5e-3
    again, second = model.predict(PAIRS, return_report=True)
    assert not second.rescued
    assert not second.islands
    assert np.abs(again - exact).max() < 5e-3
    model.save(str(tmp_path / "saved"))
    fresh, third = CrossEncoder(str(tmp_path / "saved"), compute=compute).predict(PAIRS, return_report=True)
    assert not third.rescued
    assert (fresh == again).all()


def test_what_runs_before_a_stream_that_stays_too_large_is_wide_as_well(tmp_path: Path) -> None:
    path = make_folder("llama", tmp_path / "llama")
    config = AutoConfig.from_pretrained(path, num_hidden_layers=4)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e7)  # every later layer adds to a stream beyond 65,504
    model.save_pretrained(path)
    exact = CrossEncoder(str(path), compute="float32").predict(PAIRS)
    scores, report = CrossEncoder(str(path), compute="emulated-float16").predict(PAIRS, return_report=True)
    assert report.rescued
    assert {"model.embed_tokens", "model.layers.0", "model.layers.1"} < set(report.islands)
    assert not {"model.layers.2", "model.layers.3"} & set(report.islands)
    assert np.abs(scores - exact).max() < 5e-3


@pytest.mark.parametrize(
    ("islands", "ahead"),
    [
        (["bert.encoder.layer.1.output.LayerNorm"], []),  # one product beyond the range, and no stream
        (["bert.encoder.layer.0.output", "bert.encoder.layer.1.output"], []),  # nothing is ahead
        (["bert.pooler.dense"], []),
    ],
)
def test_nothing_else_is_wide_where_one_product_overflows(islands: list[str], ahead: list[str], tmp_path: Path) -> None:
    model = CrossEncoder(str(make_folder("bert", tmp_path / "bert"))).model
    assert list(ahead_of(model, islands)) == ahead


def test_bfloat16_needs_no_island_where_float16_does(tmp_path: Path) -> None:
    model = CrossEncoder(str(overflowing("bert", tmp_path)), compute="emulated-bfloat16")
    assert model.predict(PAIRS, return_report=True)[1].islands == ()


def test_a_pair_without_a_finite_score_is_named_with_its_cause(tmp_path: Path) -> None:
    model = CrossEncoder(str(make_folder("bert", tmp_path / "bert")), num_labels=1, compute="emulated-float16")
    token = model.tokenizer(PAIRS[5][0])["input_ids"][1]
    model.model.bert.embeddings.word_embeddings.weight.data[token] = math.inf
    with pytest.raises(NonFiniteScoreError, match="no finite score even in float32") as caught:
        model.predict(PAIRS)
    assert "corrupt weight" in str(caught.value)
    assert "bert.embeddings.word_embeddings" in str(caught.value)


def test_the_command_line_counts_what_was_rescued(tmp_path: Path) -> None:
    path = overflowing("bert", tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in PAIRS))
    command = ["score", str(data), "--model", str(path), "--compute", "emulated-float16", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "halfrank", *command, "--out", str(tmp_path / "out.jsonl")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert facts["rescued"] == len(PAIRS)
    assert facts["islands"] > 0
    assert "are float32 from now on" in done.stderr


def test_scoring_a_file_names_the_line_of_a_pair_without_a_finite_score(tmp_path: Path) -> None:
    folder = make_folder("bert", tmp_path / "bert")
    model = CrossEncoder(str(folder), num_labels=1)
    token = model.tokenizer("flute")["input_ids"][1]
    data = tmp_path / "pairs.jsonl"
    texts = [("a", "b")] * 30 + [("a flute", "b")]
    data.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in texts))
    with torch.no_grad():
        model.model.bert.embeddings.word_embeddings.weight[token] = math.inf
    with pytest.raises(NonFiniteScoreError, match=r"the first is .*pairs\.jsonl:31 \('a flute', 'b'\)"):
        score(model._scorer, stream(data), tmp_path / "out.jsonl")
