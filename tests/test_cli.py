"""The command line as a person meets it: verbs, files, errors, exit codes, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scipy.stats import spearmanr

from halfrank import CrossEncoder
from halfrank.cli import main
from tiny import PAIRS, make_causal_folder, make_folder


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def halfrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["halfrank", *map(str, words)])
        code: object = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return Ran(int(str(code or 0)), out, err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "groups.jsonl"
    rows = [
        {"query": q, "pos": [d], "neg": [PAIRS[i - 1][1], PAIRS[i - 2][1]]} for i, (q, d) in enumerate(PAIRS) if q != d
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    lines = [f'"{q}","{d}",{i / len(PAIRS):.3f}' for i, (q, d) in enumerate(PAIRS)]
    path.write_text("query,document,score\n" + "\n".join(lines) + "\n")
    return path


def test_help_shows_verbs_and_examples(halfrank: Run) -> None:
    shown = halfrank("--help")
    assert shown.code == 0
    assert all(verb in shown.out for verb in ("train", "score", "rank", "evaluate", "demo"))
    for verb in ("train", "score", "rank", "evaluate", "demo"):
        assert f"Example: halfrank {verb}" in " ".join(halfrank(verb, "--help").out.split())


def test_train_score_rank_and_evaluate(halfrank: Run, model: Path, groups: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    settings = ["--precision", "float16", "--epochs", 3, "--lr", 3e-3, "--batch-size", 4]
    ran = halfrank("train", groups, "--model", model, "--out", out, *settings, "--eval", groups, "--json")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["best_score"] > 0.6
    assert "float16 weights" in summary["precision"]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}
    journal = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert journal[0]["event"] == "start"
    assert journal[-1]["event"] == "end"
    assert {"loss", "gradient_norm", "loss_scale", "tokens_per_second", "lr"} <= journal[1].keys()

    measured = halfrank("evaluate", groups, "--model", out, "--json")
    # The saved folder rounds norms and head to 16 bits: of documents that score almost alike two may change places.
    assert json.loads(measured.out)["ndcg@10"] == pytest.approx(summary["best_score"], abs=0.05)

    listing = tmp_path / "scores.jsonl"
    assert halfrank("score", groups, "--model", out, "--out", listing).code == 0
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    expected = CrossEncoder(str(out)).predict([(row["query"], row["document"]) for row in rows])
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)

    documents = tmp_path / "documents.txt"
    documents.write_text("\n".join(d for _, d in PAIRS[:7]) + "\n\n")
    found = json.loads(
        halfrank("rank", PAIRS[0][0], "--documents", documents, "--model", out, "--top-k", 3, "--json").out
    )
    assert [row["rank"] for row in found["results"]] == [1, 2, 3]
    values = CrossEncoder(str(out)).predict([(PAIRS[0][0], d) for _, d in PAIRS[:7]])
    assert [row["line"] - 1 for row in found["results"]] == sorted(range(7), key=lambda i: -values[i])[:3]


def test_pairs_with_scores_train_by_correlation(halfrank: Run, model: Path, scored: Path, tmp_path: Path) -> None:
    ran = halfrank(
        "train", scored, "--model", model, "--out", tmp_path / "tuned", "--steps", 4, "--eval", scored, "--json"
    )
    assert ran.code == 0, ran.err
    report = json.loads(halfrank("evaluate", scored, "--model", tmp_path / "tuned", "--json").out)
    values = CrossEncoder(str(tmp_path / "tuned")).predict(PAIRS)
    assert report["spearman"] == pytest.approx(spearmanr(values, range(len(PAIRS)))[0], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "{groups}", "--model", "{model}", "--out", "{full}"], 2, "not empty"),
        (["train", "{missing}", "--model", "{model}", "--out", "{new}"], 1, "does not exist"),
        (["train", "{groups}", "--model", "{missing}", "--out", "{new}"], 1, "missing"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--precision", "float17"], 2, "float17"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--loss", "hinge"], 2, "hinge"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--lr", "7"], 2, "lr must be"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--resume"], 1, "checkpoint"),
        (["train", "{broken}", "--model", "{model}", "--out", "{new}"], 1, "broken.jsonl:2"),
        (["score", "{groups}", "--model", "{model}", "--column", "query"], 2, "role=name"),
        (["score", "{groups}", "--model", "{model}", "--max-length", "100000"], 1, "max_length"),
        (["rank", " ", "--documents", "{groups}", "--model", "{model}"], 1, "empty"),
        (["rank", "q", "--documents", "{missing}", "--model", "{model}"], 1, "no file"),
        (["rank", "q", "--documents", "{empty}", "--model", "{model}"], 1, "no documents"),
        (["demo", "--ask", "anything", "--out", "{new}"], 1, "halfrank demo"),
        (["demo", "--out", "{full}"], 1, "not empty"),
        (
            ["train", "{unlabelled}", "--model", "{model}", "--out", "{new}"],
            1,
            "unlabelled.jsonl:1: the pair has no label",
        ),
        (["train", "{groups}", "--model", "{model}", "--out", "{empty}"], 2, "is a file"),
        (["train", "{groups}", "--model", "{model}", "--out", "/proc/halfrank"], 1, "Cannot write to"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--patience", "-1"], 2, "patience must be"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--seed", "-1"], 2, "seed must be"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--num-labels", "3"], 1, "another shape"),
        (["train", "{groups}", "--model", "{model}", "--out", "{new}", "--num-labels", "0"], 2, "num_labels must be"),
        (["train", "{scored}", "--model", "{model}", "--out", "{new}", "--loss", "softmax"], 1, "single pairs"),
        (["rank", "q", "--documents", "{groups}", "--model", "{model}", "--top-k", "0"], 2, "top-k"),
        (["sing"], 2, "sing"),
    ],
)
def test_mistakes_say_what_to_do(
    halfrank: Run, model: Path, groups: Path, scored: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "unlabelled.jsonl").write_text('{"query": "a", "document": "b", "labell": 1}\n' * 2)
    (tmp_path / "broken.jsonl").write_text('{"query": "a", "pos": ["b"], "neg": ["c"]}\n{"query": "a", "pos"\n')
    places = {
        "groups": groups, "scored": scored, "unlabelled": tmp_path / "unlabelled.jsonl",
        "model": model, "full": tmp_path / "full", "missing": tmp_path / "missing",
        "new": tmp_path / "new", "empty": tmp_path / "empty.txt", "broken": tmp_path / "broken.jsonl",
    }  # fmt: skip
    ran = halfrank(*[word.format(**places) for word in words])
    assert ran.code == code, ran
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_ctrl_c_saves_and_resume_ends_with_the_same_bits(model: Path, groups: Path, tmp_path: Path) -> None:
    def command(out: Path, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "halfrank", "train", str(groups), "--model", str(model), "--out", str(out),
            "--precision", "float16", "--steps", "150", "--lr", "1e-3", "--batch-size", "4", *more,
        ]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    stopped = subprocess.Popen(command(tmp_path / "stopped"), env=environment, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "stopped" / "train.jsonl"
    deadline = time.monotonic() + 100
    while not (journal.exists() and journal.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130, said
    assert "--resume" in said
    reached = sum('"gradient_norm":' in line for line in journal.read_text().splitlines())
    assert 0 < reached < 150
    assert (tmp_path / "stopped" / "model.safetensors").exists()  # usable as it is

    subprocess.run(command(tmp_path / "stopped", "--resume"), env=environment, check=True, capture_output=True)
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    steps = [json.loads(line)["step"] for line in journal.read_text().splitlines() if '"gradient_norm":' in line]
    assert steps == list(range(1, 151))


def test_a_trec_run_is_scored_and_evaluated(halfrank: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\t{PAIRS[i][0]}\n" for i in range(3)))
    documents = [json.dumps({"_id": f"d{i}", "text": document}) for i, (_, document) in enumerate(PAIRS)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    run = "".join(f"q{i} Q0 d{j} {j + 1} {-j} bm25\n" for i in range(3) for j in range(8))
    (tmp_path / "run.txt").write_text(run)
    (tmp_path / "qrels.txt").write_text("".join(f"q{i} 0 d{i} 1\nq{i} 0 d{i + 3} 0\n" for i in range(3)))
    texts = ["--queries", tmp_path / "queries.tsv", "--corpus", tmp_path / "corpus.jsonl"]
    out = tmp_path / "new.run"
    ran = halfrank("score", tmp_path / "run.txt", *texts, "--model", model, "--out", out, "--format", "trec", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["pairs"] == 24
    rows = [line.split() for line in out.read_text().splitlines()]
    values = CrossEncoder(str(model)).predict([(PAIRS[0][0], document) for _, document in PAIRS[:8]])
    assert [row[2] for row in rows if row[0] == "q0"] == [f"d{j}" for j in sorted(range(8), key=lambda j: -values[j])]
    judged = ["--qrels", tmp_path / "qrels.txt"]
    report = json.loads(halfrank("evaluate", tmp_path / "run.txt", *texts, *judged, "--model", model, "--json").out)
    place = [next(row[3] for row in rows if row[0] == f"q{i}" and row[2] == f"d{i}") for i in range(3)]
    expected = sum(1 / int(rank) for rank in place) / 3
    assert report["mrr@10"] == pytest.approx(expected, abs=1e-6)
    alone = halfrank("score", tmp_path / "run.txt", "--queries", tmp_path / "queries.tsv", "--model", model)
    assert (alone.code, "go together" in alone.err) == (2, True)


def test_scores_reach_a_pipe_while_the_bar_is_on_a_terminal(model: Path, groups: Path) -> None:
    pty = pytest.importorskip("pty")
    screen, terminal = pty.openpty()
    words = [sys.executable, "-m", "halfrank", "score", str(groups), "--model", str(model)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=terminal, env=os.environ | {"TERM": "xterm"})
    os.close(terminal)
    out = process.communicate(timeout=100)[0].decode()
    os.close(screen)
    assert process.returncode == 0
    assert len([json.loads(line)["score"] for line in out.splitlines()]) == 3 * len(groups.read_text().splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full disk is Linux's")
def test_output_that_cannot_be_written_is_one_message(model: Path, groups: Path) -> None:
    words = [sys.executable, "-m", "halfrank", "score", str(groups), "--model", str(model)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("halfrank: Cannot write to standard output: No space left")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_ctrl_c_before_anything_is_done_says_so(
    halfrank: Run, model: Path, groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halfrank.cli._load", stopped)
    ended = halfrank("score", groups, "--model", model)
    assert (ended.code, ended.err.strip()) == (130, "interrupted")


def test_a_closed_standard_output_is_no_error_of_ours(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("A cat sleeps.\n")
    words = [sys.executable, "-m", "halfrank", "rank", "a cat", "--documents", tmp_path / "texts", "--model", model]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *map(str, words)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_doctor_certify_export_and_report(halfrank: Run, model: Path, groups: Path, tmp_path: Path) -> None:
    looked = halfrank("doctor", model, "--data", groups, "--html", tmp_path / "page" / "doctor.html", "--json")
    report = json.loads(looked.out)
    assert looked.code == (0 if report["sound"] else 1)
    assert {row["name"] for row in report["modules"]} >= {"bert.encoder.layer.1.attention.self.query", "classifier"}
    assert (tmp_path / "page" / "doctor.html").read_text().startswith("<!doctype html>")
    leaking = halfrank("doctor", model, "--data", groups, "--eval", groups)
    assert leaking.code == 1
    assert "leakage" in leaking.out

    narrow = tmp_path / "narrow"
    assert halfrank("export", model, "--dtype", "float16", "--out", narrow).code == 0
    assert halfrank("certify", narrow, "--reference", model, "--data", groups).code == 0
    assert halfrank("certify", narrow, "--verify").code == 0
    tight = halfrank("certify", narrow, "--reference", model, "--max-score-error", "1e-9", "--json")
    assert tight.code == 1
    assert json.loads(tight.out)["reasons"][0]["cause"] == "score-error"
    assert halfrank("certify", narrow).code == 2
    documents = tmp_path / "documents.txt"
    documents.write_text("one\ntwo\n")
    assert "certificate of" in halfrank("rank", "q", "--documents", documents, "--model", narrow).err

    tuned = tmp_path / "tuned"
    settings = ["--steps", 3, "--precision", "float16", "--eval", groups]
    ran = halfrank("train", groups, "--model", model, "--out", tuned, *settings)
    assert ran.code == 0, ran.err
    card = ModelCard.load(tuned / "README.md")
    assert card.data.pipeline_tag == "text-ranking"
    assert "groups.jsonl" in card.text
    assert "halfrank certificate" in card.text
    assert card.data.eval_results is not None
    assert {result.metric_type for result in card.data.eval_results} >= {"ndcg@10", "map"}
    drawn = (tuned / "report.html").read_text()
    assert "loss scale" in drawn
    last = json.loads((tuned / "train.jsonl").read_text().splitlines()[-1])
    assert last["memory_measured_mib"] > 0
    assert f"measured {last['memory_measured_mib']} MiB" in ran.err
    assert "Memory, planned and measured" in drawn
    assert str(last["memory_planned_mib"]) in drawn
    (tuned / "report.html").unlink()
    assert halfrank("report", tuned).code == 0
    assert (tuned / "report.html").read_text() == drawn
    assert halfrank("report", tmp_path).code == 1


def test_a_causal_model_is_trained_and_asked_through_a_template(halfrank: Run, groups: Path, tmp_path: Path) -> None:
    causal, tuned = make_causal_folder("qwen3", tmp_path / "causal"), tmp_path / "tuned"
    words = ["train", groups, "--model", causal, "--out", tuned, "--precision", "float16", "--steps", 2]
    done = halfrank(*words, "--template", "qwen3", "--instruction", "Find the answer.", "--json")
    assert done.code == 0, done.err
    stored = json.loads((tuned / "config_sentence_transformers.json").read_text())
    assert stored["prompts"][stored["default_prompt_name"]] == "Find the answer."
    scores = {}
    for told in ("Find the answer.", "Find what is wrong.", None):
        asked = [] if told is None else ["--instruction", told]
        found = halfrank("score", groups, "--model", tuned, "--format", "scores", *asked)
        assert found.code == 0, found.err
        scores[told] = [float(line) for line in found.out.split()]
    assert scores[None] == scores["Find the answer."] != scores["Find what is wrong."]
    texts = [tuple(pair) for row in map(json.loads, groups.read_text().splitlines()) for pair in _texts(row)]
    assert CrossEncoder(tuned).predict(texts) == pytest.approx(scores[None], abs=1e-6)
    documents = tmp_path / "documents.txt"
    documents.write_text("\n".join(document for _, document in PAIRS[:5]))
    assert halfrank("rank", "who", "--documents", documents, "--model", tuned, "--top-k", 2).code == 0
    assert "map" in halfrank("evaluate", groups, "--model", tuned, "--json").out
    refused = halfrank("score", groups, "--model", causal, "--template", "chatml")
    assert refused.code == 2
    assert "template must be qwen3, mxbai, bge or plain" in refused.err


def _texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["query"], document) for document in (*row["pos"], *row["neg"])]


def test_a_run_is_resumed_with_its_own_model(halfrank: Run, model: Path, groups: Path, tmp_path: Path) -> None:
    words = ["train", groups, "--out", tmp_path / "out", "--steps", 2, "--batch-size", 2]
    assert halfrank(*words, "--model", model).code == 0
    other = make_folder("bert", tmp_path / "other")
    refused = halfrank(*words, "--model", other, "--resume")
    assert refused.code == 1
    assert f"model: '{model.resolve()}' then, '{other.resolve()}' now" in refused.err.replace("\n", " ")
    assert halfrank(*words, "--model", model, "--resume").code == 0
