"""Modular folders of sentence-transformers: the same scores, gradients and folders, both ways, and in 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfrank import CrossEncoder, InputExample
from halfrank.cross_encoder.pool import from_portable, portable
from halfrank.data.packing import pack
from halfrank.errors import ModelError
from halfrank.model import folder
from halfrank.model.modular import Modular
from halfrank.predict import predict
from tiny import PAIRS, make_body_folder

IDENTITY = torch.nn.Identity()
KINDS: list[tuple[str, Any, int]] = [  # family, pooling, labels
    ("bert", "cls", 1), ("modernbert", "mean", 1), ("roberta", ("cls", "mean"), 3), ("bert", "lasttoken", 1),
    ("mpnet", "mean", 1), ("deberta-v2", "max", 1), ("bert", "weightedmean", 2),
    ("modernbert", "mean_sqrt_len_tokens", 1),
]  # fmt: skip


def modular_folder(family: str, pooling: Any, labels: int, place: Path) -> Path:
    """Body, pooling, dense with GELU, norm, and the dense that writes the scores, built and saved by the peer."""
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling

    body = make_body_folder(family, place / "body")
    torch.manual_seed(3)
    pool = Pooling(32, pooling)
    first = Dense(
        pool.get_embedding_dimension(), 32, activation_function=torch.nn.GELU(), use_residual=pooling == "mean"
    )
    last = Dense(32, labels, bias=labels > 1, activation_function=IDENTITY, module_output_name="scores")
    steps = [Transformer(str(body)), pool, first, LayerNorm(32), Dropout(0.1), last]
    Peer(modules=steps, device="cpu").save_pretrained(str(place / "modular"))
    return place / "modular"


def peer(path: Path) -> Any:
    from sentence_transformers import CrossEncoder as Peer

    return Peer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})


def scores(model: Any) -> np.ndarray:
    return model.predict(PAIRS, activation_fn=IDENTITY, show_progress_bar=False)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="session")
def ettin_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modular_folder("bert", "cls", 1, tmp_path_factory.mktemp("ettin"))


@pytest.mark.parametrize(("family", "pooling", "labels"), KINDS)
def test_scores_and_folders_travel(family: str, pooling: Any, labels: int, tmp_path: Path) -> None:
    path = modular_folder(family, pooling, labels, tmp_path)
    wanted, model = scores(peer(path)), CrossEncoder(str(path))
    assert model._scorer.packed is (family not in ("mpnet", "deberta-v2"))
    assert model.num_labels == labels
    assert apart(scores(model), wanted) <= 1e-5
    model.save(tmp_path / "ours")
    assert apart(scores(CrossEncoder(str(tmp_path / "ours"))), wanted) <= 1e-5
    back = peer(tmp_path / "ours")
    assert apart(scores(back), wanted) <= 1e-5
    assert [type(module).__name__ for module in back] == [type(module).__name__ for module in peer(path)]


def test_gradients_are_those_of_the_peer(ettin_like: Path) -> None:
    theirs, ours = peer(ettin_like), CrossEncoder(str(ettin_like))
    features = theirs.preprocess(PAIRS)
    weights = torch.linspace(0.5, 1.5, len(PAIRS))
    theirs.eval()
    (theirs(features)["scores"][:, 0] * weights).sum().backward()
    scorer = ours._scorer
    batch = pack(scorer.pairs.encode(PAIRS), range(len(PAIRS)))
    (scorer.logits(batch)[:, 0] * weights[batch.rows]).sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {folder._peer_name(scorer.model, name): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    largest = max(grad.abs().max() for grad in wanted.values())
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) <= 1e-5 * largest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_trains_in_sixteen_bits_and_loads_in_the_peer(ettin_like: Path, dtype: str, tmp_path: Path) -> None:
    model = CrossEncoder(str(ettin_like), model_kwargs={"dtype": dtype})
    before = scores(model)
    formats = {name: p.dtype for name, p in model.named_parameters() if p.ndim > 1}
    assert {d for name, d in formats.items() if name.startswith("head.")} == {torch.float32}
    assert {d for name, d in formats.items() if name.startswith("body.")} == {getattr(torch, dtype)}
    examples = [InputExample(texts=list(pair), label=number % 2) for number, pair in enumerate(PAIRS)]
    model.fit(examples * 2, epochs=2, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    after, labels = scores(model), np.arange(len(PAIRS)) % 2
    assert apart(after, before) > 1e-2
    assert after[labels == 1].mean() > after[labels == 0].mean()
    model.save(tmp_path / "narrow")
    assert (
        apart(scores(peer(tmp_path / "narrow")), scores(CrossEncoder(tmp_path / "narrow", compute="float32"))) <= 1e-5
    )
    model.save(tmp_path / "wide", dtype=torch.float32)
    assert apart(scores(peer(tmp_path / "wide")), scores(CrossEncoder(tmp_path / "wide"))) <= 1e-5


def test_a_worker_builds_the_same_model(ettin_like: Path) -> None:
    scorer = folder.load(ettin_like)
    again = from_portable(portable(scorer))
    assert isinstance(again.model, Modular)
    assert np.array_equal(predict(again, PAIRS).values, predict(scorer, PAIRS).values)


def test_islands_keep_their_names_in_either_library(ettin_like: Path, tmp_path: Path) -> None:
    scorer = folder.load(ettin_like)
    scorer.widen(["body.encoder.layer.0.intermediate.dense", "head.2.linear"])
    folder.save(scorer, tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / folder.SETTINGS).read_text())["keep_in_fp32_modules"]
    assert stored == ["0.model.encoder.layer.0.intermediate.dense", "2.linear"]
    theirs = peer(tmp_path / "ours")
    assert theirs.keep_in_fp32_modules == stored
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert set(folder.load(tmp_path / "theirs").islands) == set(scorer.islands)


def changed(path: Path, place: Path, name: str, **values: Any) -> Path:
    shutil.copytree(path, place)
    content = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps(content | values if isinstance(content, dict) else values["entries"]))
    return place


def test_what_cannot_be_read_says_why(ettin_like: Path, tmp_path: Path) -> None:
    entries = json.loads((ettin_like / "modules.json").read_text())
    with pytest.raises(ModelError, match=r"make 1 scores and not 4\. Leave num_labels out"):
        folder.load(ettin_like, folder.LoadOptions(num_labels=4))
    foreign = [*entries[:2], entries[2] | {"type": "my_package.Gate"}, *entries[3:]]
    with pytest.raises(ModelError, match=r"'my_package\.Gate' is not one of Pooling, Dense"):
        folder.load(changed(ettin_like, tmp_path / "foreign", "modules.json", entries=foreign))
    with pytest.raises(ModelError, match="no dense layer|No dense layer"):
        folder.load(changed(ettin_like, tmp_path / "scoreless", "modules.json", entries=entries[:-1]))
    outside = [entries[0], entries[1] | {"path": "../elsewhere"}, *entries[2:]]
    with pytest.raises(ModelError, match="leads out of the folder"):
        folder.load(changed(ettin_like, tmp_path / "outside", "modules.json", entries=outside))
    with pytest.raises(ModelError, match="not one of torch.nn"):
        folder.load(changed(ettin_like, tmp_path / "coded", "2_Dense/config.json", activation_function="my.Gelu"))
    with pytest.raises(ModelError, match="does not hold what its config.json says"):
        folder.load(changed(ettin_like, tmp_path / "shape", "2_Dense/config.json", out_features=16))
    with pytest.raises(ModelError, match="pooling 'median'"):
        folder.load(changed(ettin_like, tmp_path / "median", "1_Pooling/config.json", pooling_mode="median"))
    lacking = changed(ettin_like, tmp_path / "lacking", "2_Dense/config.json")
    (lacking / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'2_Dense' holds no model\.safetensors"):
        folder.load(lacking)


def test_older_names_of_poolings_are_read(ettin_like: Path, tmp_path: Path) -> None:
    old = changed(ettin_like, tmp_path / "old", "1_Pooling/config.json")
    (old / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    assert apart(scores(CrossEncoder(str(old))), scores(peer(ettin_like))) <= 1e-5
