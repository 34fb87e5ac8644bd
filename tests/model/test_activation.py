"""The activation that a folder means, in every spelling that sentence-transformers 2 to 6 wrote."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers as peer
from torch import nn

from halfrank import CrossEncoder
from tiny import PAIRS, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch)")
IDENTITY = "torch.nn.modules.linear.Identity"
SIGMOID = "torch.nn.modules.activation.Sigmoid"
TANH = "torch.nn.modules.activation.Tanh"
OLD = "sbert_ce_default_activation_function"
RERANKER = {"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": None}
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]

HEAD = {
    "transformer_task": "sequence-classification",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "scores",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "bare")


def written(bare: Path, path: Path, config: dict[str, Any], beside: dict[str, Any] | None, modules: bool) -> Path:
    shutil.copytree(bare, path)
    whole = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(whole))
    if beside is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps(beside))
    if modules:
        (path / "modules.json").write_text(json.dumps(MODULES))
        (path / "sentence_bert_config.json").write_text(json.dumps(HEAD))
    return path


# Version that wrote it, config.json, config_sentence_transformers.json, modules.json, what it means.
MEANT = {
    "2 and 3, none given": ({}, None, False, "Sigmoid"),
    "2 and 3, given": ({OLD: IDENTITY}, None, False, "Identity"),
    "2 and 3, null": ({OLD: None}, None, False, "Sigmoid"),
    "2 and 3, short path": ({OLD: "torch.nn.Tanh"}, None, False, "Tanh"),
    "4 and 5": ({"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.1.0"}}, None, False, "Identity"),
    "4 and 5, over a folder of 3": (
        {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.0.1"}, OLD: SIGMOID}, None, False,
        "Identity",
    ),
    "4 and 5, version only": ({"sentence_transformers": {"version": "4.1.0"}, OLD: TANH}, None, False, "Tanh"),
    "6": ({}, RERANKER | {"activation_fn": TANH}, True, "Tanh"),
    "6, over a folder of 5": (
        {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.1.0"}},
        RERANKER | {"activation_fn": TANH}, True, "Tanh",
    ),
    "6, null": (
        {"sentence_transformers": {"activation_fn": IDENTITY}}, RERANKER | {"activation_fn": None}, True, "Identity"
    ),
    "an embedding model": ({}, {"model_type": "SentenceTransformer", "activation_fn": TANH}, True, "Sigmoid"),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_folders_of_every_version_load_with_what_they_mean(bare: Path, tmp_path: Path, name: str) -> None:
    config, beside, modules, meant = MEANT[name]
    path = str(written(bare, tmp_path / "old", config, beside, modules))
    ours, theirs = CrossEncoder(path), peer.CrossEncoder(path)
    assert type(ours.activation_fn).__name__ == type(theirs.activation_fn).__name__ == meant
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS, show_progress_bar=False), atol=2e-6)


def test_a_folder_of_6_without_modules_keeps_its_activation_although_the_peer_forgets_it(
    bare: Path, tmp_path: Path
) -> None:
    path = str(written(bare, tmp_path / "cut", {}, RERANKER | {"activation_fn": TANH}, False))
    assert type(peer.CrossEncoder(path).activation_fn) is nn.Sigmoid
    assert type(CrossEncoder(path).activation_fn) is nn.Tanh


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("__main__.Scaled", "'__main__.Scaled' is not one of torch.nn"),
        ("torch.sigmoid", "'torch.sigmoid' is not one of torch.nn"),
        ("torch.nn.modules.activation.Gone", "cannot be made"),
        ("torch.nn.modules.activation.Threshold", "cannot be made"),
        ("torch.nn.functional.has_torch_function", "cannot be made"),
        ("torch.nn.ParameterList.__class__", "cannot be made"),
        (3, "'3' is not one of torch.nn"),
    ],
)
def test_an_activation_that_cannot_be_used_is_said(
    bare: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: Any, said: str
) -> None:
    caplog.set_level(logging.WARNING, logger="halfrank")
    path = written(bare, tmp_path / "odd", {"sentence_transformers": {"activation_fn": stored}}, None, False)
    assert type(CrossEncoder(path).activation_fn) is nn.Sigmoid
    assert said in caplog.text
    assert "Sigmoid is used" in caplog.text
    assert type(CrossEncoder(path, activation_fn=nn.Identity()).activation_fn) is nn.Identity


@pytest.mark.parametrize("first", [CrossEncoder, peer.CrossEncoder])
def test_an_old_folder_saved_anew_means_the_same_to_every_version(bare: Path, tmp_path: Path, first: Any) -> None:
    path = written(bare, tmp_path / "old", {OLD: IDENTITY}, None, False)
    model = first(str(path))
    model.activation_fn = nn.Tanh()
    model.save(str(tmp_path / "new"))
    for kind in (CrossEncoder, peer.CrossEncoder):
        assert type(kind(str(tmp_path / "new")).activation_fn) is nn.Tanh
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config.get(OLD) in (TANH, None)
    if first is CrossEncoder:
        assert config["sentence_transformers"]["activation_fn"] == config[OLD] == TANH
