"""Adapters against peft itself: what it saves is read with its scores, what is saved here it reads."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from halfrank import CrossEncoder
from halfrank.errors import ModelError
from halfrank.model import adapters, folder
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from judges import peft_scores
from tiny import PAIRS, make_folder

FAMILIES = ("bert", "albert", "llama", "deberta-v2")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(request.param, tmp_path_factory.mktemp(request.param) / "base", dtype=torch.float16)


def scores(scorer: Scorer) -> np.ndarray:
    return predict(scorer, PAIRS, activation=torch.nn.Identity()).values


def moved(parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def trained(base: Path, place: Path) -> Scorer:
    """Adapters that are no longer zero, saved at `place`."""
    scorer = folder.load(base, folder.LoadOptions(compute="float32"))
    adapters.add(scorer, adapters.settings(scorer.model, 4))
    moved([p for p in scorer.model.parameters() if p.requires_grad])
    folder.save(scorer, place)
    return scorer


def test_fresh_adapters_change_no_score_and_leave_16_bit_weights_frozen(base: Path) -> None:
    scorer = folder.load(base, folder.LoadOptions(compute="float32"))
    before = scores(scorer)
    adapters.add(scorer, adapters.settings(scorer.model, 4))
    assert np.array_equal(scores(scorer), before)
    assert {p.dtype for p in scorer.model.parameters() if p.requires_grad} == {torch.float32}
    assert any(p.dtype is torch.float16 for p in scorer.model.parameters())
    assert not any(p.requires_grad for p in scorer.model.parameters() if p.dtype is torch.float16)


def test_saved_adapters_score_alike_here_in_peft_and_merged(base: Path, tmp_path: Path) -> None:
    before = scores(trained(base, tmp_path / "a"))
    again = folder.load(tmp_path / "a", folder.LoadOptions(compute="float32"))
    assert np.abs(scores(again) - before).max() <= 1e-5
    assert np.abs(peft_scores(tmp_path / "a") - before).max() <= 1e-5
    adapters.merge(again)
    folder.save(again, tmp_path / "m")
    assert np.abs(scores(folder.load(tmp_path / "m")) - before).max() <= 1e-5


def test_adapters_saved_by_peft_are_read_with_their_head(base: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    linear = sorted(name for name, module in model.named_modules() if name and type(module) is torch.nn.Linear)
    targets = [name for name in linear if name.startswith(f"{model.base_model_prefix}.")]
    wrapped = get_peft_model(model, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=targets))
    moved([p for p in wrapped.parameters() if p.requires_grad])
    wrapped.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    mine = CrossEncoder(tmp_path / "theirs", compute="float32").predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.abs(mine.reshape(-1, 1) - peft_scores(tmp_path / "theirs")).max() <= 1e-5


def test_a_model_with_adapters_is_copied_with_them(tmp_path: Path) -> None:
    trained(make_folder("bert", tmp_path / "base", dtype=torch.float16), tmp_path / "a")
    model = CrossEncoder(tmp_path / "a", compute="float32")
    assert np.array_equal(copy.deepcopy(model).predict(PAIRS), model.predict(PAIRS))


def test_a_missing_or_another_base_is_named(tmp_path: Path) -> None:
    base = make_folder("bert", tmp_path / "base", dtype=torch.float16)
    trained(base, tmp_path / "a")
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"adapters \(LoRA\) of the model '.*base', which is not there"):
        folder.load(tmp_path / "a")
    place = tmp_path / "a" / adapters.CONFIG
    other = folder.load(tmp_path / "elsewhere")
    moved(list(other.model.parameters()))
    folder.save(other, tmp_path / "other")
    place.write_text(json.dumps(json.loads(place.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ModelError, match="is not the model that the adapters in"):
        folder.load(tmp_path / "a")


def test_a_body_that_was_trained_takes_no_adapters(tmp_path: Path) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "base"))
    moved(list(scorer.model.parameters()))
    with pytest.raises(ModelError, match="is not what '.*base' holds any more"):
        adapters.add(scorer, adapters.settings(scorer.model, 4))


@pytest.mark.parametrize("rank", [0, 33, 100_000])
def test_ranks_that_no_matrix_of_the_model_has_are_refused(rank: int, tmp_path: Path) -> None:
    model = folder.load(make_folder("bert", tmp_path / "bert")).model
    assert adapters.settings(model, 32).r == 32
    with pytest.raises(ValueError, match=f"between 1 and 32, .* got {rank}"):
        adapters.settings(model, rank)


def test_adapters_are_never_saved_over_their_own_base(tmp_path: Path) -> None:
    base = make_folder("bert", tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    model = CrossEncoder(base)
    model.add_adapter(2)
    for save in (model.save, lambda place: folder.save(model._scorer, place)):
        with pytest.raises(ModelError, match="holds the model that these adapters belong to"):
            save(base)
    assert (base / "model.safetensors").read_bytes() == before
    model.save(tmp_path / "beside")
    assert CrossEncoder(tmp_path / "beside").predict(PAIRS) == pytest.approx(model.predict(PAIRS))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (LoraConfig(r=2, use_dora=True), "use_dora"),
        (LoraConfig(r=2, bias="all"), "bias='all'"),
        (LoraConfig(r=2, target_modules=["nope"]), "No modules were targeted"),
        (LoraConfig(r=2, target_modules=["query", "word_embeddings"]), "word_embeddings' is no plain Linear"),
        (PrefixTuningConfig(), "PREFIX_TUNING"),
        (1.5, "1.5"), ("4", "'4'"), (None, "None"), (True, "True"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_leave_the_model_as_it_was(asked: object, said: str, tmp_path: Path) -> None:
    model = CrossEncoder(make_folder("bert", tmp_path / "base", dtype=torch.float16))
    before = {name: (p.dtype, p.requires_grad, p.clone()) for name, p in model.model.named_parameters()}
    with pytest.raises(ModelError, match=said):
        model.add_adapter(asked)
    after = dict(model.model.named_parameters())
    assert after.keys() == before.keys()
    for name, (dtype, trained, values) in before.items():
        assert (after[name].dtype, after[name].requires_grad) == (dtype, trained), name
        assert torch.equal(after[name], values), name
    model.add_adapter(2)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_card_of_adapters_says_how_peft_opens_them(family: str, tmp_path: Path) -> None:
    model = CrossEncoder(make_folder(family, tmp_path / "base"))
    model.add_adapter(2)
    moved([p for p in model.model.parameters() if p.requires_grad])
    model.save(tmp_path / "adapters")
    card = (tmp_path / "adapters" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("\n```")[0]
    found = eval(code, {"AutoPeftModelForSequenceClassification": AutoPeftModelForSequenceClassification},
                 {"folder": str(tmp_path / "adapters")})  # fmt: skip
    inputs = model.tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = found.eval()(**inputs).logits[:, 0]
    assert logits.numpy() == pytest.approx(model.predict(PAIRS, activation_fn=torch.nn.Identity()), abs=1e-5)
