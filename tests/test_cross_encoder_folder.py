"""Folders of the public face: what others load, what comes back, what is refused, what is uploaded."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentence_transformers as peer
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from halfrank.cross_encoder import CrossEncoder, folders
from halfrank.data.pairs import InputExample
from halfrank.errors import ModelError, NonFiniteWeightError
from tiny import PAIRS, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch)")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "three", num_labels=3)


def trained(path: Path, dtype: str) -> CrossEncoder:
    model = CrossEncoder(str(path), model_kwargs={"dtype": dtype})
    examples = [InputExample(texts=list(pair), label=number % 2) for number, pair in enumerate(PAIRS)]
    model.fit([examples] * 3, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("labels", ["one", "three"])
def test_a_saved_folder_scores_the_same_everywhere(
    request: pytest.FixtureRequest, tmp_path: Path, labels: str, dtype: str
) -> None:
    model = trained(request.getfixturevalue(labels), dtype)
    model.save(str(tmp_path / "saved"))
    scores = model.predict(PAIRS)
    rounding = 2e-6 if dtype == "float32" else 2e-3 if dtype == "float16" else 1e-2  # of the float32 head and norms
    again = CrossEncoder(tmp_path / "saved", compute="float32")
    assert again.dtype is getattr(torch, dtype)
    np.testing.assert_allclose(again.predict(PAIRS), scores, atol=rounding)
    theirs = peer.CrossEncoder(str(tmp_path / "saved"), model_kwargs={"torch_dtype": "float32"})
    np.testing.assert_allclose(theirs.predict(PAIRS, show_progress_bar=False), again.predict(PAIRS), atol=2e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    batch = AutoTokenizer.from_pretrained(tmp_path / "saved")(
        *zip(*PAIRS, strict=True), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = plain(**batch).logits
    wanted = again.predict(PAIRS, activation_fn=nn.Identity(), convert_to_tensor=True)
    torch.testing.assert_close(logits.squeeze(-1), wanted, atol=2e-6, rtol=0)


def test_a_folder_of_the_peer_loads_here(three: Path, tmp_path: Path) -> None:
    theirs = peer.CrossEncoder(str(three), activation_fn=nn.Tanh(), max_length=20)
    theirs.save(str(tmp_path / "theirs"))
    ours = CrossEncoder(tmp_path / "theirs")
    assert type(ours.activation_fn) is nn.Tanh
    assert ours.max_length == 20
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS, show_progress_bar=False), atol=2e-6)
    ours.save(tmp_path / "ours")
    assert type(peer.CrossEncoder(str(tmp_path / "ours")).activation_fn) is nn.Tanh


def test_saving_in_another_dtype_keeps_what_training_kept(one: Path, tmp_path: Path) -> None:
    model = trained(one, "bfloat16")
    model.save(tmp_path / "wide", dtype=torch.float32)
    model.save_pretrained(tmp_path / "narrow", dtype="float16")
    assert model.dtype is torch.bfloat16
    wide, narrow = CrossEncoder(tmp_path / "wide"), CrossEncoder(tmp_path / "narrow")
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.float16)
    joined = copy.deepcopy(model).float()
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, joined.state_dict()[name]), name
    np.testing.assert_allclose(wide.predict(PAIRS), model.predict(PAIRS), atol=1e-2)


def test_a_foreign_activation_is_not_stored_and_said(
    one: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="halfrank")
    CrossEncoder(one, activation_fn=lambda logits: logits * 2).save(tmp_path / "doubled")
    assert "function is not torch's own activation and is not stored" in caplog.text
    for kind in (CrossEncoder, peer.CrossEncoder):
        assert type(kind(str(tmp_path / "doubled")).activation_fn) is nn.Sigmoid


def test_the_card_is_written_or_left_alone(one: Path, tmp_path: Path) -> None:
    model = CrossEncoder(one)
    model.model_card_data.set_evaluation_metrics(SimpleNamespace(name="dev"), {"spearman": 0.5}, epoch=1, step=8)
    model.save(tmp_path / "a", "owner/name", train_datasets=["stsb"])
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# owner/name" in card
    assert "Trained on: stsb." in card
    assert "| spearman | 0.5 |" in card
    (tmp_path / "a" / "README.md").write_text("mine")
    model.save(tmp_path / "a", create_model_card=False)
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    model.save(tmp_path / "b", create_model_card=False)
    assert not (tmp_path / "b" / "README.md").exists()
    assert not [item for item in (tmp_path / "a").iterdir() if item.name.startswith(".")]


def test_pickles_are_not_written(one: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pickles"):
        CrossEncoder(one).save(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


def test_non_finite_weights_are_not_saved_and_leave_the_old_folder(one: Path, tmp_path: Path) -> None:
    model = CrossEncoder(one)
    model.save(tmp_path / "kept")
    before = {item.name: item.read_bytes() for item in (tmp_path / "kept").iterdir()}
    with torch.no_grad():
        model.model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=r"classifier\.weight"):
        model.save(tmp_path / "kept")
    assert {item.name: item.read_bytes() for item in (tmp_path / "kept").iterdir()} == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_score_the_same_bits_and_stand_alone(one: Path, way: Any) -> None:
    model = trained(one, "float16")
    model.prompts["q"] = "what "
    twin = way(model)
    np.testing.assert_array_equal(twin.predict(PAIRS), model.predict(PAIRS))
    assert twin.prompts == model.prompts
    assert twin._scorer.residuals.keys() == model._scorer.residuals.keys() != set()
    with torch.no_grad():
        twin.model.classifier.weight.zero_()
    assert abs(twin.predict(PAIRS) - model.predict(PAIRS)).max() > 1e-4


class Hub:
    """Stands in for the hub: notes what it is asked and keeps what it is given."""

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", token))

    calls: list[Any] = []  # noqa: RUF012
    has_readme = True

    def create_repo(self, **arguments: Any) -> Any:
        self.calls.append(("create_repo", arguments))
        return SimpleNamespace(repo_id="someone/" + arguments["repo_id"].split("/")[-1])

    def create_branch(self, **arguments: Any) -> None:
        self.calls.append(("create_branch", arguments))

    def file_exists(self, repo_id: str, filename: str, revision: str | None = None) -> bool:
        return self.has_readme

    def upload_folder(self, **arguments: Any) -> Any:
        files = sorted(item.name for item in Path(arguments["folder_path"]).iterdir())
        self.calls.append(("upload_folder", arguments | {"files": files}))
        return SimpleNamespace(pr_url="https://hub/pr/1", commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.has_readme = [], True
    monkeypatch.setattr(folders, "HfApi", Hub)
    return Hub


def test_push_to_hub_uploads_a_whole_folder(one: Path, hub: type[Hub], tmp_path: Path) -> None:
    model = CrossEncoder(one)
    assert model.push_to_hub("someone/reranker", token="t", private=True, revision="try") == "https://hub/commit/1"
    asked = dict(hub.calls)
    assert asked["token"] == "t"
    assert asked["create_repo"] == {"repo_id": "someone/reranker", "private": True, "exist_ok": False}
    assert asked["create_branch"] == {"repo_id": "someone/reranker", "branch": "try", "exist_ok": True}
    assert {"model.safetensors", "modules.json", "tokenizer.json"} <= set(asked["upload_folder"]["files"])
    assert "README.md" not in asked["upload_folder"]["files"]  # the repository has one, and keeps it
    hub.has_readme = False
    assert model.push_to_hub("reranker", create_pr=True, commit_message="m") == "https://hub/pr/1"
    last = hub.calls[-1][1]
    assert last["repo_id"] == "someone/reranker"
    assert "README.md" in last["files"]
    assert last["commit_message"] == "m"
    (tmp_path / "file").touch()
    model.push_to_hub("reranker", local_model_path=str(tmp_path))
    assert hub.calls[-1][1]["files"] == ["file"]


def test_save_to_hub_joins_organization_and_name(one: Path, hub: type[Hub]) -> None:
    model = CrossEncoder(one)
    model.save_to_hub("reranker", organization="team")
    assert dict(hub.calls)["create_repo"]["repo_id"] == "team/reranker"
    with pytest.raises(ValueError, match="another owner"):
        model.save_to_hub("other/reranker", organization="team")


def test_settings_of_another_kind_of_folder_are_not_read(one: Path, tmp_path: Path) -> None:
    model = CrossEncoder(one, prompts={"q": "x"})
    model.save(tmp_path / "a")
    settings = tmp_path / "a" / folders.SETTINGS
    content = json.loads(settings.read_text()) | {"model_type": "SentenceTransformer"}
    settings.write_text(json.dumps(content))
    assert CrossEncoder(tmp_path / "a").prompts == {}


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        CrossEncoder(str(path))
