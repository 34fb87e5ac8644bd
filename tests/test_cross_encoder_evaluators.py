"""Every evaluator of sentence-transformers judges our class and theirs alike, and ours agrees with theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers as peer
from sentence_transformers.cross_encoder import evaluation

from halfrank import CrossEncoder
from halfrank.data.pairs import Group, Pair
from halfrank.evaluate import evaluate_groups, evaluate_pairs
from judges import BINARY, CLASSES, JUDGED, JUDGES, RANKED, SIMILARITY, judge
from tiny import make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch|sklearn)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[CrossEncoder, Any]]:
    root = tmp_path_factory.mktemp("models")
    paths = {labels: str(make_folder("bert", root / str(labels), num_labels=labels)) for labels in (1, 3)}
    return {labels: (CrossEncoder(path), peer.CrossEncoder(path)) for labels, path in paths.items()}


def test_no_class_is_left_out() -> None:
    assert set(JUDGES) == set(evaluation.__all__)


@pytest.mark.parametrize("name", JUDGES)
def test_every_evaluator_gives_both_the_same_numbers_and_files(
    models: dict[int, Any], tmp_path: Path, name: str
) -> None:
    results = [
        model.evaluate(judge(name), str(tmp_path / str(number))) for number, model in enumerate(models[JUDGES[name][0]])
    ]
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) >= 1
    for key, value in results[1].items():
        assert results[0][key] == pytest.approx(value, abs=1e-5), key
    ours, theirs = (sorted(path.name for path in (tmp_path / side).iterdir()) for side in "01")
    assert ours == theirs != []


@pytest.mark.parametrize("name", ["CrossEncoderClassificationEvaluator", "CESoftmaxAccuracyEvaluator"])
def test_a_16_bit_model_is_judged_too(models: dict[int, Any], tmp_path: Path, name: str) -> None:
    model = models[JUDGES[name][0]][0]
    model.save(tmp_path / "narrow", dtype="bfloat16")
    narrow = CrossEncoder(tmp_path / "narrow")
    result = narrow.evaluate(judge(name))
    assert result.keys() == model.evaluate(judge(name)).keys()
    assert all(np.isfinite(value) for value in result.values())


def test_our_correlations_are_those_of_the_peer(models: dict[int, Any]) -> None:
    scores = models[1][0].predict(JUDGED)
    report = evaluate_pairs([Pair(*pair, label) for pair, label in zip(JUDGED, SIMILARITY, strict=True)], scores)
    theirs = models[1][1].evaluate(judge("CrossEncoderCorrelationEvaluator"))
    assert report.values["pearson"] == pytest.approx(theirs["pearson"], abs=1e-5)
    assert report.values["spearman"] == pytest.approx(theirs["spearman"], abs=1e-5)


def test_our_average_precision_is_that_of_the_peer_and_accuracy_of_classes_too(models: dict[int, Any]) -> None:
    scores = models[1][0].predict(JUDGED)
    report = evaluate_pairs([Pair(*pair, label) for pair, label in zip(JUDGED, BINARY, strict=True)], scores)
    theirs = models[1][1].evaluate(judge("CrossEncoderClassificationEvaluator"))
    assert report.values["average_precision"] == pytest.approx(theirs["dev_average_precision"], abs=1e-6)
    # The peer searches the threshold that fits these very labels; ours is 0.5, so ours is never the higher one.
    assert report.values["accuracy"] <= theirs["dev_accuracy"]
    assert report.values["f1"] <= theirs["dev_f1"]
    many = models[3][0].predict(JUDGED)
    report = evaluate_pairs([Pair(*pair, label) for pair, label in zip(JUDGED, CLASSES, strict=True)], many)
    plain = evaluation.CrossEncoderClassificationEvaluator(JUDGED, CLASSES)
    theirs = models[3][1].evaluate(plain)
    assert report.values["accuracy"] == pytest.approx(theirs["f1_micro"], abs=1e-6)  # micro F1 of one class a pair


def test_our_rank_metrics_are_those_of_the_peer(models: dict[int, Any]) -> None:
    sample = RANKED[0]
    documents = tuple(sample["positive"] + sample["negative"])
    grades = (1.0,) * len(sample["positive"]) + (0.0,) * len(sample["negative"])
    scores = models[1][0].predict([(sample["query"], document) for document in documents])
    report = evaluate_groups([Group(sample["query"], documents, grades)], scores)
    theirs = models[1][1].evaluate(evaluation.CrossEncoderRerankingEvaluator([sample], at_k=10))
    assert report.values["ndcg@10"] == pytest.approx(theirs["ndcg@10"], abs=1e-6)
    assert report.values["mrr@10"] == pytest.approx(theirs["mrr@10"], abs=1e-6)
    assert report.values["map"] == pytest.approx(theirs["map"], abs=1e-6)
