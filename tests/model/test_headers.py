"""Whether the files of a model fit its config is seen in their headers, by a plan and by a load alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfrank import memory
from halfrank.errors import ModelError
from halfrank.model import folder
from tiny import MORE_SIZES, SIZES, make_causal_folder, make_folder


def damaged(path: Path, kind: str) -> None:
    weights, config = path / "model.safetensors", path / "config.json"
    content = json.loads(config.read_text())
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "no header":
        weights.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    elif kind == "missing shard":
        weights.rename(path / "model-00002-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "shards alone":
        weights.rename(path / "model-00001-of-00002.safetensors")
    elif kind == "no index":
        weights.rename(path / "model-00002-of-00002.safetensors")
        (path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    elif kind == "another's sizes":
        config.write_text(json.dumps(content | {"intermediate_size": 48}))
    elif kind == "more layers":
        config.write_text(json.dumps(content | {"num_hidden_layers": 3}))
    elif kind == "no such activation":
        config.write_text(json.dumps(content | {"hidden_act": "nope"}))
    elif kind == "whole numbers":
        tensors = load_file(weights)
        name = next(name for name in tensors if name.endswith("query.weight"))
        save_file(tensors | {name: tensors[name].to(torch.int8)}, weights, metadata={"format": "pt"})
    elif kind == "no such dtype":
        config.write_text(json.dumps(content | {"dtype": "foo"}))
    else:
        config.write_text(json.dumps(content | {"hidden_size": -384}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", "corrupt or truncated"), ("empty", "corrupt"), ("no header", "corrupt"),
        ("missing shard", "model-00001-of-00002"), ("no index", "not an index"), ("no such dtype", "foo"),
        ("shards alone", "holds 'model-00001-of-00002.safetensors' but not model.safetensors.index.json"),
        ("no such activation", "cannot be built: 'nope'"), ("whole numbers", "query.weight' in .* is stored as I8"),
        ("negative size", "cannot be built"), ("another's sizes", r"\(64, 32\) in the file and \(48, 32\) by"),
        ("more layers", "lack 16 of the model's weights, 'encoder.layer.2"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_not_planned(kind: str, said: str, tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    damaged(path, kind)
    with pytest.raises(ModelError, match=said):
        memory.describe(path)
    with pytest.raises(ModelError):
        folder.load(path)


@pytest.mark.parametrize("layers", [0, -1, "two"])
def test_a_config_without_layers_is_refused_in_one_message(layers: object, tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
    for read in (memory.describe, folder.load):
        with pytest.raises(ModelError, match="config.json of .* cannot be used"):
            read(path)


def test_a_misfit_is_named_by_its_weight_and_not_as_the_head(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    damaged(path, "another's sizes")
    for read in (memory.describe, folder.load):
        with pytest.raises(ModelError, match=r"does not fit its weights: 'encoder\.layer\.0\.intermediate"):
            read(path)
    other = make_folder("bert", tmp_path / "other")
    for read in (memory.describe, folder.load):
        with pytest.raises(ModelError, match=r"another shape: 1 labels, not 3\. Leave"):
            read(other, folder.LoadOptions(num_labels=3))


def test_another_kind_of_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "roberta", "architectures": None}))
    for read in (memory.describe, folder.load):
        with pytest.raises(ModelError, match="lack|does not fit its weights"):
            read(path)


def test_layers_that_a_config_leaves_out_are_told_of(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    assert not folder.load(path).notes
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    (note,) = folder.load(path).notes
    assert memory.describe(path).notes == (note,)
    assert "holds 16 weights of layers that its config leaves out, 'bert.encoder.layer.1." in note


@pytest.mark.parametrize("family", [*SIZES, *MORE_SIZES])
def test_no_family_lacks_a_weight_of_its_own_folder(family: str, tmp_path: Path) -> None:
    path = make_folder(family, tmp_path / family)
    assert memory.describe(path).arrived is torch.float32
    assert not [note for note in folder.load(path).notes if "leaves out" in note]


def test_files_that_are_no_weights_of_the_model_are_not_read(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(3)}, path / "training_state.safetensors")
    assert memory.describe(path).arrived is torch.float32


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_no_causal_model_lacks_a_weight_of_its_own_folder(family: str, tmp_path: Path) -> None:
    path = make_causal_folder(family, tmp_path / family)
    assert memory.describe(path).arrived is torch.float32
    assert not [note for note in folder.load(path, folder.LoadOptions(num_labels=1)).notes if "leaves out" in note]
