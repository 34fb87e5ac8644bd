"""Metrics against ir-measures, scikit-learn and scipy on the same scores."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, nDCG
from scipy import stats
from sklearn import metrics as sk

from halfrank.data.pairs import Group, Pair
from halfrank.errors import DataError, NonFiniteScoreError
from halfrank.evaluate import evaluate_groups, evaluate_pairs


def group(grades: list[float | None]) -> Group:
    return Group("q", tuple(f"d{i}" for i in range(len(grades))), tuple(grades))


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_ranking_metrics_equal_ir_measures(k: int) -> None:
    draw = np.random.default_rng(0)
    groups = [group([float(g) for g in draw.integers(0, 4, size)]) for size in (5, 20, 60)]
    scores = draw.permutation(85) / 85
    qrels, run, start = [], [], 0
    for number, each in enumerate(groups):
        for i, grade in enumerate(each.grades):
            qrels.append(ir_measures.Qrel(str(number), str(i), int(grade or 0)))
            run.append(ir_measures.ScoredDoc(str(number), str(i), float(scores[start + i])))
        start += len(each.grades)
    expected = ir_measures.calc_aggregate([nDCG @ k, RR @ k, AP], qrels, run)
    report = evaluate_groups(groups, scores, cutoff=k)
    assert report.values == pytest.approx(
        {f"ndcg@{k}": expected[nDCG @ k], f"mrr@{k}": expected[RR @ k], "map": expected[AP]}
    )
    with pytest.raises(ValueError, match="1 document or more; got 0"):
        evaluate_groups(groups, scores, cutoff=0)
    assert (report.ties, report.count) == (0, 3)


def test_a_model_that_scores_all_alike_is_ranked_worst() -> None:
    report = evaluate_groups([group([1, 0, 0, 0])], np.zeros(4))
    assert report.values["mrr@10"] == 0.25
    assert report.ties == 4


def test_unjudged_documents_count_as_zero_and_hopeless_queries_are_left_out() -> None:
    report = evaluate_groups([group([1, None]), group([0, 0])], np.array([0.1, 0.9, 0.5, 0.4]))
    assert report.values["mrr@10"] == 0.5
    assert (report.count, report.skipped) == (1, 1)
    with pytest.raises(DataError, match="No query has a relevant document"):
        evaluate_groups([group([0, 0])], np.zeros(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scores_are_refused(bad: float) -> None:
    with pytest.raises(NonFiniteScoreError, match=r"pair 1 \(counted from 0\)"):
        evaluate_groups([group([1, 0])], np.array([0.1, bad]))
    with pytest.raises(NonFiniteScoreError, match=r"pair 0 \(counted from 0\)"):
        evaluate_pairs([Pair("a", "b", 1)], np.array([bad]))


def test_binary_metrics_equal_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    labels, scores = draw.integers(0, 2, 300), np.round(draw.random(300), 2)  # rounded: ties
    report = evaluate_pairs([Pair("a", "b", int(label)) for label in labels], scores)
    assert report.values["accuracy"] == pytest.approx(sk.accuracy_score(labels, scores > 0.5))
    assert report.values["f1"] == pytest.approx(sk.f1_score(labels, scores > 0.5))
    assert report.values["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores))
    assert report.ties > 0


def test_correlations_equal_scipy() -> None:
    draw = np.random.default_rng(2)
    labels, scores = draw.random(50) * 5, draw.random((50, 1))
    report = evaluate_pairs([Pair("a", "b", label) for label in labels], scores)
    assert report.values["spearman"] == pytest.approx(stats.spearmanr(labels, scores[:, 0]).statistic)
    assert report.values["pearson"] == pytest.approx(stats.pearsonr(labels, scores[:, 0]).statistic)


def test_several_labels_give_accuracy() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7]])
    assert evaluate_pairs([Pair("a", "b", label) for label in (1, 0, 0)], scores).score == pytest.approx(2 / 3)


def test_a_pair_without_label_is_named() -> None:
    with pytest.raises(DataError, match="file.jsonl:7"):
        evaluate_pairs([Pair("a", "b", None, "file.jsonl:7")], np.array([0.5]))
