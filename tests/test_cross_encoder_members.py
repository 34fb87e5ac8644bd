"""The lesser members of the public face: features, islands, gradient checkpoints, averages, names on the hub, cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentence_transformers as peer
import torch

from halfrank import CrossEncoder, InputExample
from halfrank.cross_encoder.names import with_owner
from halfrank.errors import DataError, ModelError
from tiny import PAIRS, SENTENCES, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch)")
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "three", num_labels=3)


# Features


@pytest.mark.parametrize("prompt", [None, "what is "])
@pytest.mark.parametrize("inputs", [PAIRS[:4], SENTENCES[:3], []])
def test_features_and_their_scores_are_the_peer_s(one: Path, inputs: Any, prompt: str | None) -> None:
    ours, theirs = CrossEncoder(str(one)), peer.CrossEncoder(str(one)).eval()
    a, b = ours.preprocess(inputs, prompt), theirs.preprocess(inputs, prompt)
    assert list(a) == list(b)
    for key, value in b.items():
        assert torch.equal(a[key], value) if isinstance(value, torch.Tensor) else a[key] == value
    if inputs:
        torch.testing.assert_close(ours(a)["scores"], theirs(b)["scores"], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("abc", "got the text 'abc'"),
        ([("a", "b"), "c"], r"rows of \[1, 2\]"),
        ([("a", "b", "c")], r"rows of \[3\]"),
    ],
)
def test_what_is_neither_texts_nor_pairs_is_refused(one: Path, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CrossEncoder(one).preprocess(inputs)


def test_a_loss_of_the_peer_trains_our_model_through_its_features(one: Path) -> None:
    ours, theirs = (kind(str(one), config_kwargs=dict(DRY)).train() for kind in (CrossEncoder, peer.CrossEncoder))
    for model in (ours, theirs):
        model(model.preprocess(PAIRS))["scores"].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_collated_batches_hold_labels_as_the_loss_takes_them(one: Path, three: Path) -> None:
    examples = [InputExample(texts=[f" {q} ", f"{d}\n"], label=n % 2) for n, (q, d) in enumerate(PAIRS[:5])]
    for path in (one, three):
        ours, theirs = (kind(str(path)).smart_batching_collate(examples) for kind in (CrossEncoder, peer.CrossEncoder))
        assert torch.equal(ours[1], theirs[1])
        assert ours[1].dtype is theirs[1].dtype
        assert torch.equal(ours[0]["input_ids"], theirs[0]["input_ids"])


# Islands and memory


def test_the_chosen_modules_replace_those_before(one: Path) -> None:
    model = CrossEncoder(str(one), compute="emulated-float16", keep_in_fp32_modules=["bert.pooler.dense"])
    assert model.keep_in_fp32_modules == ["0.model.bert.pooler.dense"]
    plain = CrossEncoder(str(one), compute="emulated-float16")
    assert abs(model.predict(PAIRS) - plain.predict(PAIRS)).max() > 0
    model.set_keep_in_fp32_modules(["0.model.bert.encoder.layer.0.output.dense"])
    assert model.keep_in_fp32_modules == ["0.model.bert.encoder.layer.0.output.dense"]
    with pytest.raises(ValueError, match="got 'bert.nowhere'"):
        model.set_keep_in_fp32_modules(["bert.nowhere"])
    with pytest.raises(ValueError, match="a list of module names"):
        model.set_keep_in_fp32_modules("bert")
    assert model.keep_in_fp32_modules == ["0.model.bert.encoder.layer.0.output.dense"]
    model.set_keep_in_fp32_modules([])
    np.testing.assert_array_equal(model.predict(PAIRS), plain.predict(PAIRS))


def test_an_empty_list_disables_the_stored_islands(one: Path, tmp_path: Path) -> None:
    CrossEncoder(str(one), keep_in_fp32_modules=["bert.pooler.dense"]).save(tmp_path / "kept")
    for kind in (CrossEncoder, peer.CrossEncoder):
        assert kind(str(tmp_path / "kept")).keep_in_fp32_modules == ["0.model.bert.pooler.dense"]
        assert kind(str(tmp_path / "kept"), keep_in_fp32_modules=[]).keep_in_fp32_modules == []


@pytest.mark.parametrize(("family", "dtype"), [("bert", "float32"), ("bert", "float16"), ("albert", "float32")])
def test_gradient_checkpoints_change_no_gradient(one: Path, family: str, dtype: str, tmp_path: Path) -> None:
    ends = []
    path = one if family == "bert" else make_folder(family, tmp_path / family)
    for checkpoints in (False, True):
        torch.manual_seed(1)
        model = CrossEncoder(str(path), config_kwargs=dict(DRY), model_kwargs={"dtype": dtype})
        if checkpoints:
            model.gradient_checkpointing_enable()
        examples = [InputExample(texts=list(pair), label=n % 2) for n, pair in enumerate(PAIRS)]
        model.fit([examples] * 2, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
        ends.append(model.predict(PAIRS))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


# Averages


def moved(path: Path, seed: int, dtype: str) -> CrossEncoder:
    torch.manual_seed(seed)
    model = CrossEncoder(str(path), model_kwargs={"dtype": dtype})
    examples = [InputExample(texts=list(pair), label=(n + seed) % 2) for n, pair in enumerate(PAIRS)]
    model.fit([examples] * 2, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    return model


def exact(model: CrossEncoder, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    model.save(folder, dtype="float32")
    return iter(CrossEncoder(folder).state_dict().items())


@pytest.mark.parametrize(("dtype", "weights"), [("float32", None), ("float16", [3, 1]), ("bfloat16", [0.5, 0.5])])
def test_an_average_is_that_of_float64(one: Path, tmp_path: Path, dtype: str, weights: list[float] | None) -> None:
    models = [moved(one, seed, dtype) for seed in (1, 2)]
    merged = CrossEncoder.merge(models, parameters=None if weights is None else {"weight": weights})
    assert merged.dtype is torch.float32
    shares = weights or [1, 1]
    found = merged.state_dict()
    for (name, a), (_, b) in zip(*(exact(m, tmp_path / str(n)) for n, m in enumerate(models)), strict=True):
        if a.is_floating_point():
            wanted = (shares[0] * a.double() + shares[1] * b.double()) / sum(shares)
            torch.testing.assert_close(found[name].double(), wanted, atol=1e-7, rtol=1e-6)
    assert CrossEncoder.merge([str(tmp_path / "0"), tmp_path / "1"], out_dtype="float16").dtype is torch.float16


def test_what_cannot_be_averaged_is_refused(one: Path, three: Path) -> None:
    with pytest.raises(ModelError, match=r"Model 2 differs from the first in 'classifier\.bias'"):
        CrossEncoder.merge([one, three])
    for arguments, message in (
        ({"method": "slerp"}, "averages linearly"),
        ({"dtype": "float16"}, "in float32"),
        ({"parameters": {"t": 0.5}}, "'weight' alone; got 't'"),
        ({"parameters": {"weight": [1]}}, "2 numbers"),
        ({"parameters": {"weight": [1, -1]}}, "sum above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossEncoder.merge([one, one], **arguments)
    with pytest.raises(ValueError, match="at least two"):
        CrossEncoder.merge([one])
    with pytest.raises(TypeError, match="a list of models or folders; got str"):
        CrossEncoder.merge(str(one))


# Names, cards


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ms-marco-MiniLM-L6-v2", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("distilroberta-base", "distilroberta-base"),
        ("owner/name", "owner/name"),
        ("./here", "./here"),
        ("src", "src"),
    ],
)
def test_a_bare_name_belongs_to_the_cross_encoders(
    given: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_owner(given, CrossEncoder.default_huggingface_organization) == wanted


@pytest.mark.parametrize("kind", [CrossEncoder.model_card_data_class, peer.cross_encoder.CrossEncoderModelCardData])
def test_the_card_s_facts_are_read_by_the_hub(one: Path, tmp_path: Path, kind: Any) -> None:
    facts = kind(
        language="de", license="mit", model_name="Mine", tags=["reranker"], task_name="search",
        train_datasets=[{"name": "STSb", "id": "sentence-transformers/stsb"}, {"name": "own notes"}],
    )  # fmt: skip
    model = CrossEncoder(one, model_card_data=facts)
    if kind is CrossEncoder.model_card_data_class:
        facts.set_evaluation_metrics(SimpleNamespace(name="dev"), {"spearman": 0.5}, step=8)
    model.save(tmp_path / "m")
    card = huggingface_hub.ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.language in ("de", ["de"])  # the peer's class makes a list of it
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-ranking"
    assert card.data.library_name == "sentence-transformers"
    # The peer's class asks the hub whether the id exists, and drops it where there is no answer.
    assert card.data.datasets in (["sentence-transformers/stsb"], None)
    assert {"cross-encoder", "halfrank", "reranker"} <= set(card.data.tags)
    assert "# Mine" in card.text
    assert "Trained on: STSb, own notes." in card.text
    if kind is CrossEncoder.model_card_data_class:
        assert card.data.datasets is not None
        assert card.data.eval_results[0].metric_value == 0.5
    json.dumps(card.data.to_dict())


def test_a_classifier_s_card_says_so(three: Path, tmp_path: Path) -> None:
    CrossEncoder(three).save(tmp_path / "m")
    assert huggingface_hub.ModelCard.load(tmp_path / "m" / "README.md").data.pipeline_tag == "text-classification"
