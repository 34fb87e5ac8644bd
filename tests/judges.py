"""Other libraries that tests are judged by: the evaluators of sentence-transformers, scores of peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sentence_transformers import InputExample
from sentence_transformers.cross_encoder import evaluation
from transformers import AutoTokenizer

from tiny import PAIRS, SENTENCES

# No pair twice: a batch of the peer's gives equal pairs other last bits, and whichever comes first then is chance.
JUDGED = [(SENTENCES[n % 11], SENTENCES[(3 * n + 1 + n // 11) % 11]) for n in range(len(PAIRS))]
BINARY = [number % 2 for number in range(len(PAIRS))]
CLASSES = [number % 3 for number in range(len(PAIRS))]
SIMILARITY = [number % 5 / 4 for number in range(len(PAIRS))]
RANKED = [
    {"query": SENTENCES[0], "positive": SENTENCES[1:3], "negative": SENTENCES[3:]},
    {"query": SENTENCES[5], "positive": [SENTENCES[6]], "documents": SENTENCES[2:]},
]


def old(name: str, labels: list[Any]) -> Any:
    """A class of before 4.0, made from examples as scripts of then make it."""
    examples = [InputExample(texts=list(pair), label=label) for pair, label in zip(JUDGED, labels, strict=True)]
    return getattr(evaluation, name).from_input_examples(examples, name="old")


def nano_beir() -> Any:
    """The benchmark of small retrieval sets, fed from here and not from the network."""
    from datasets import Dataset

    tables = {
        "corpus": [{"_id": f"d{n}", "text": text} for n, text in enumerate(SENTENCES)],
        "queries": [{"_id": "q0", "text": SENTENCES[0]}, {"_id": "q5", "text": SENTENCES[5]}],
        "qrels": [{"query-id": "q0", "corpus-id": "d1"}, {"query-id": "q5", "corpus-id": "d6"}],
        "bm25": [{"query-id": q, "corpus-ids": [f"d{n}" for n in range(1, 10)]} for q in ("q0", "q5")],
    }
    with mock.patch("datasets.load_dataset", lambda _, subset, split: Dataset.from_list(tables[subset])):
        return evaluation.CrossEncoderNanoBEIREvaluator(["msmarco", "scifact"], rerank_k=8)


JUDGES: dict[str, tuple[int, Callable[[], Any]]] = {  # by class: labels of the model, and how one is made
    "CrossEncoderCorrelationEvaluator": (1, lambda: evaluation.CrossEncoderCorrelationEvaluator(JUDGED, SIMILARITY)),
    "CrossEncoderClassificationEvaluator": (
        1, lambda: evaluation.CrossEncoderClassificationEvaluator(JUDGED, BINARY, name="dev"),
    ),
    "CrossEncoderRerankingEvaluator": (1, lambda: evaluation.CrossEncoderRerankingEvaluator(RANKED)),
    "CrossEncoderNanoBEIREvaluator": (1, nano_beir),
    "CEBinaryAccuracyEvaluator": (1, lambda: old("CEBinaryAccuracyEvaluator", BINARY)),
    "CEBinaryClassificationEvaluator": (1, lambda: old("CEBinaryClassificationEvaluator", BINARY)),
    "CEF1Evaluator": (1, lambda: old("CEF1Evaluator", BINARY)),
    "CESoftmaxAccuracyEvaluator": (3, lambda: old("CESoftmaxAccuracyEvaluator", CLASSES)),
    "CECorrelationEvaluator": (1, lambda: old("CECorrelationEvaluator", SIMILARITY)),
    "CERerankingEvaluator": (1, lambda: evaluation.CERerankingEvaluator(RANKED[:1])),
}  # fmt: skip


def judge(name: str) -> Any:
    """An evaluator of the class `name`; the older classes warn that they are old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return JUDGES[name][1]()


def peft_scores(place: Path) -> np.ndarray:
    """Logits (P, 1) that peft itself gives `PAIRS` with the adapters in a folder."""
    from peft import AutoPeftModelForSequenceClassification

    model = AutoPeftModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    with torch.no_grad():
        rows = [model(**tokenizer(*pair, truncation=True, return_tensors="pt")).logits for pair in PAIRS]
    return torch.cat(rows).numpy()
