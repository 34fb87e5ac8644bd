"""Classes and numbers as a user meets them: names of classes kept, softmax, regression, worker processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers as peer
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from halfrank import CrossEncoder, InputExample
from halfrank.cli import main
from halfrank.errors import DataError, ModelError
from tiny import PAIRS, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch)")
NAMES = {0: "contradiction", 1: "entailment", 2: "neutral"}
CLASSES = [number % 11 % 3 for number in range(len(PAIRS))]  # pairs 11 apart are the same pair
QUIET = {"warmup_steps": 0, "show_progress_bar": False}


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_folder("bert", tmp_path_factory.mktemp("models") / "nli", num_labels=3)
    config = json.loads((path / "config.json").read_text())
    config |= {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def halfrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    def run(*words: object) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["halfrank", *map(str, words)])
        code: object = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return int(str(code or 0)), json.loads(out) if out.startswith("{") else err

    return run


def examples(labels: list[Any]) -> list[InputExample]:
    return [InputExample(texts=list(pair), label=label) for pair, label in zip(PAIRS, labels, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_classes_are_learnt_and_keep_their_names_everywhere(nli: Path, tmp_path: Path, dtype: str) -> None:
    model = CrossEncoder(str(nli), num_labels=3, model_kwargs={"dtype": dtype})
    assert type(model.activation_fn) is nn.Identity
    model.fit([examples(CLASSES)] * 40, optimizer_params={"lr": 4e-3}, **QUIET)
    shares = model.predict(PAIRS, apply_softmax=True)
    assert shares.shape == (24, 3)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert (shares.argmax(1) == CLASSES).mean() == 1
    model.save(tmp_path / "ours")
    peer.CrossEncoder(str(tmp_path / "ours")).save(str(tmp_path / "theirs"))
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        for kind in (CrossEncoder, peer.CrossEncoder):
            again = kind(str(path))
            assert again.config.id2label == NAMES
            assert again.config.label2id == {name: number for number, name in NAMES.items()}
            assert [again.config.id2label[row] for row in again.predict(PAIRS).argmax(1)] == [
                NAMES[label] for label in CLASSES
            ]
    told = pipeline(
        "text-classification",
        model=AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "ours"),
    )([{"text": query, "text_pair": document} for query, document in PAIRS])
    assert [row["label"] for row in told] == [NAMES[label] for label in CLASSES]


def test_another_number_of_classes_needs_a_new_head_and_says_so(nli: Path) -> None:
    with pytest.raises(ModelError, match="score head of .* has another shape"):
        CrossEncoder(str(nli), num_labels=2)
    model = CrossEncoder(str(nli), num_labels=2, model_kwargs={"ignore_mismatched_sizes": True})
    assert model.predict(PAIRS).shape == (24, 2)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(DataError, match="2"):
        model.fit([examples([2.0] * 24)], **QUIET)


def test_classes_through_the_command_line(halfrank: Any, nli: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": q, "sentence2": d, "label": c} for (q, d), c in zip(PAIRS, CLASSES, strict=True)]
    data = tmp_path / "nli.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    settings = ["--steps", 60, "--lr", "4e-3", "--batch-size", 24, "--precision", "float16", "--eval", data]
    code, summary = halfrank("train", data, "--model", nli, "--out", out, *settings, "--json")
    assert (code, summary["best_score"]) == (0, 1.0)
    assert halfrank("evaluate", data, "--model", out, "--json")[1]["accuracy"] == 1.0
    assert halfrank("score", data, "--model", out, "--out", tmp_path / "scored.jsonl")[0] == 0
    found = [json.loads(line)["score"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found, CrossEncoder(out).predict(PAIRS), atol=1e-6)
    assert peer.CrossEncoder(str(out)).config.id2label == NAMES
    (tmp_path / "documents.txt").write_text("one\ntwo\n")
    code, said = halfrank("rank", "q", "--documents", tmp_path / "documents.txt", "--model", out)
    assert (code, "one label" in said) == (2, True)


def test_regression_through_the_command_line_returns_the_labels_own_scale(halfrank: Any, tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    stars = [number % 11 / 2 for number in range(24)]  # 0 to 5, as in the STS benchmark
    data = tmp_path / "sts.csv"
    lines = [f'"{q}","{d}",{label}' for (q, d), label in zip(PAIRS, stars, strict=True)]
    data.write_text("sentence1,sentence2,score\n" + "\n".join(lines) + "\n")
    words = ["train", data, "--model", path, "--out", tmp_path / "out", "--steps", 100, "--lr", "4e-3"]
    code, said = halfrank(*words)
    assert (code, "labels from 0 to 1" in said, "use the mse loss" in said) == (1, True, True)
    code, said = halfrank(*words, "--loss", "mse", "--batch-size", 24, "--schedule", "constant")
    assert (code, "without a sigmoid" in said) == (0, True), said
    for kind in (CrossEncoder, peer.CrossEncoder):
        model = kind(str(tmp_path / "out"))
        assert type(model.activation_fn) is nn.Identity
        assert np.abs(model.predict(PAIRS) - stars).mean() < 0.5
    report = halfrank("evaluate", data, "--model", tmp_path / "out", "--json")[1]
    assert report["pearson"] > 0.9


def test_regression_in_python_is_the_peer_s(tmp_path: Path) -> None:
    path = str(make_folder("bert", tmp_path / "bert"))
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends = []
    for kind in (CrossEncoder, peer.CrossEncoder):
        model = kind(path, num_labels=1, default_activation_function=nn.Identity(), config_kwargs=dict(dry))
        batch = [peer.InputExample(texts=list(pair), label=n % 11 / 2) for n, pair in enumerate(PAIRS)]
        loader = torch.utils.data.DataLoader(batch, batch_size=24)
        (model.fit if kind is CrossEncoder else model.old_fit)(
            loader, epochs=5, loss_fct=nn.MSELoss(), optimizer_params={"lr": 1e-3}, **QUIET
        )
        ends.append(model.predict(PAIRS, show_progress_bar=False))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)


def test_workers_give_the_scores_of_one_process(tmp_path: Path) -> None:
    path = make_folder("mpnet", tmp_path / "mpnet", num_labels=3)  # a class that is padded, not packed
    model = CrossEncoder(str(path), model_kwargs={"dtype": "float16"}, keep_in_fp32_modules=["mpnet.encoder.layer.0"])
    model.fit([examples(CLASSES)] * 2, optimizer_params={"lr": 1e-3}, **QUIET)  # residuals travel too
    alone = model.predict(PAIRS * 3, apply_softmax=True)
    shared = model.predict(PAIRS * 3, apply_softmax=True, device=["cpu", torch.device("cpu")], chunk_size=7)
    assert shared.dtype == alone.dtype
    np.testing.assert_allclose(shared, alone, atol=2e-6)


def test_ties_are_told_and_never_help(halfrank: Any, tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    model = CrossEncoder(path)
    with torch.no_grad():
        model.model.classifier.weight.zero_()  # every pair scores alike
    model.save(tmp_path / "flat")
    row = {"query": "a", "pos": ["b"], "neg": ["c", "d", "e"]}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 2)
    code, report = halfrank("evaluate", tmp_path / "data.jsonl", "--model", tmp_path / "flat", "--cutoff", 3, "--json")
    assert (code, report["ties"], report["mrr@3"], report["ndcg@3"]) == (0, 8, 0.0, 0.0)
    assert report["map"] == pytest.approx(0.25)
