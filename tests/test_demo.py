"""The demo on a tiny model: it measures what it says, and what it leaves can be asked and ranked with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from halfrank import CrossEncoder, demo
from halfrank.errors import DataError
from tiny import make_folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.Results, Path]:
    folder = tmp_path_factory.mktemp("demo")
    source = make_folder("bert", folder / "bert")
    return demo.tell(str(source), folder / "out", groups=24, queries=8), folder / "out"


def test_the_five_rows_and_the_proofs(told: tuple[demo.Results, Path]) -> None:
    results, _ = told
    assert list(results.ndcg_at_10) == [
        "BM25", "untrained", "cosine of the untouched model", "trained in float16", "trained + cosine",
    ]  # fmt: skip
    assert all(0 <= value <= 1 for value in results.ndcg_at_10.values())
    assert results.plain_adamw["non_finite_weights_after_each_step"][-1] > 0
    assert results.against_float32["ratio"] == pytest.approx(1, abs=0.02)
    assert results.against_float32["cosine"] > 0.99
    assert results.bytes_per_parameter < 16
    assert len(results.examples) == 5


def test_a_row_is_the_mean_of_one_over_log_rank(told: tuple[demo.Results, Path]) -> None:
    # With one right answer, nDCG@10 is 1/log2(1 + place): checked on BM25, where the place is known for five queries.
    results, _ = told
    for example in results.examples:
        place = example["place"]["BM25"]
        assert 1 <= place <= results.candidates
    assert 1 / np.log2(1 + results.candidates) <= results.ndcg_at_10["BM25"] + 1 / np.log2(12)


def test_what_is_left_loads_and_answers(told: tuple[demo.Results, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = told
    answers = demo.answer("split a string into words", out)
    assert [found["rank"] for found in answers] == [1, 2, 3, 4, 5]
    assert all(Path(found["where"].rpartition(":")[0]).suffix == ".py" for found in answers)
    functions = [json.loads(line) for line in (out / demo.FUNCTIONS).read_text().splitlines()]
    by_name = {function["name"]: function["text"] for function in functions}
    texts = [("split a string into words", by_name[found["function"]]) for found in answers]
    scores = CrossEncoder(str(out)).predict(texts, activation_fn=torch.nn.Identity())
    assert [found["score"] for found in answers] == pytest.approx(scores.tolist(), abs=1e-5)

    def refuse(*_: object) -> None:
        raise AssertionError("the cache was not read")

    embed = demo.Embedder.embed
    monkeypatch.setattr(
        demo.Embedder, "embed", lambda self, texts, *rest: embed(self, texts) if len(texts) == 1 else refuse()
    )
    assert demo.answer("split a string into words", out) == answers
    (out / demo.EMBEDDINGS).write_bytes(b"broken")
    with pytest.raises(AssertionError, match="cache"):
        demo.answer("split a string into words", out)


def test_embeddings_are_mean_pooled(tmp_path: Path) -> None:
    source = make_folder("bert", tmp_path / "bert")
    texts = ["I am happy", "Berlin is large", "a"]
    found = demo.Embedder(str(source)).embed(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(row, (hidden / hidden.norm()).numpy(), atol=1e-5)


def test_bootstrap_of_a_constant_difference_is_that_constant() -> None:
    assert demo.bootstrap(np.full(50, 0.25)) == (0.25, 0.25, 0.25)
    mean, low, high = demo.bootstrap(np.random.default_rng(1).normal(0.1, 1.0, 400))
    assert low < mean < high
    assert high - low == pytest.approx(4 / np.sqrt(400), rel=0.15)  # 3.92 standard errors of the mean


def test_a_broken_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MINILM_SHA256", "0" * 64)
    with pytest.raises(demo.ModelError, match="sha256"):
        demo.checked_minilm()


def test_an_empty_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="question"):
        demo.answer("  ", tmp_path)
