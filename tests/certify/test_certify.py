"""Copies and saves: sound ones pass, damaged ones are refused with their cause, nothing trained is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from halfrank import CrossEncoder, InputExample
from halfrank.certify import certificate as certificates
from halfrank.certify import saving
from halfrank.certify.budget import budget_for
from halfrank.certify.compare import certify
from halfrank.data import probes
from halfrank.errors import CertificateError, NonFiniteWeightError
from halfrank.export import export
from halfrank.model import folder
from halfrank.model.template import KINDS
from tiny import PAIRS, make_body_folder, make_causal_folder, make_folder

GROUPS = probes.groups()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "reference")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first feed-forward output leaves float16, and whose scores do not show it in float32."""
    path = make_folder("bert", tmp_path_factory.mktemp("models") / "overflowing")
    weights = load_file(path / "model.safetensors")
    weights["bert.encoder.layer.0.intermediate.dense.weight"] *= 3000
    weights["bert.encoder.layer.0.output.dense.weight"] *= 300
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "llama", "mpnet"])
def test_sound_copies_pass(family: str, dtype: str, tmp_path: Path) -> None:
    source = make_folder(family, tmp_path / "source")
    saved = export(source, tmp_path / "copy", dtype=dtype)
    assert saved is not None
    assert saved.passed
    found, _ = certify(tmp_path / "copy", source, GROUPS)
    assert found.passed, found.reasons
    assert [m.compute for m in found.measured] == ["float32", f"emulated-{dtype}"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sound_copies_of_a_yes_no_model_pass_and_a_turned_row_does_not(dtype: str, tmp_path: Path) -> None:
    source = make_causal_folder("qwen3", tmp_path / "source", chat_template=KINDS["qwen3"].template)
    saved = export(source, tmp_path / "copy", dtype=dtype)
    assert saved is not None
    assert saved.passed
    found, _ = certify(tmp_path / "copy", source, GROUPS)
    assert found.passed, found.reasons
    spoil("score.weight", torch.Tensor.neg_)(tmp_path / "copy")
    found, _ = certify(tmp_path / "copy", source, GROUPS)
    assert not found.passed
    assert "score.weight" in " ".join(str(reason) for reason in found.reasons)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sound_copies_of_a_modular_folder_pass(pooling: str, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    body = Transformer(str(make_body_folder("bert", tmp_path / "body")))
    head = Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    Peer(modules=[body, Pooling(32, pooling), head], device="cpu").save_pretrained(str(tmp_path / "source"))
    saved = export(tmp_path / "source", tmp_path / "copy", dtype="float16")
    assert saved is not None
    assert saved.passed
    found, _ = certify(tmp_path / "copy", tmp_path / "source", GROUPS)
    assert found.passed, found.reasons


def test_numbers_are_those_of_other_tools(reference: Path, tmp_path: Path) -> None:
    export(reference, tmp_path / "copy", dtype="bfloat16")
    found, _ = certify(tmp_path / "copy", reference, GROUPS, computes=["float32"])
    texts = [text for group in GROUPS for text in group.texts]
    wanted, got = (CrossEncoder(p, compute="float32").predict(texts) for p in (reference, tmp_path / "copy"))
    assert found.measured[0].values["max_score_error"] == pytest.approx(np.abs(wanted - got).max(), rel=1e-3)
    assert found.measured[0].values["mean_score_error"] == pytest.approx(np.abs(wanted - got).mean(), rel=1e-3)


def spoil(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        change(weights[name])
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def configure(file: str, **values: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(content | values))

    return apply


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one weight moved": ("weights-differ", spoil(QUERY, lambda w: w[3, 3].add_(0.01))),
    "infinite weight": ("non-finite-weights", spoil(QUERY, lambda w: w[3, 3].fill_(float("inf")))),
    "pad id": ("pad-token", configure("config.json", pad_token_id=5)),
    "activation": (
        "activation",
        configure("config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Tanh"),
    ),
    "labels": ("labels", configure("config.json", id2label={"0": "wrong"}, label2id={"wrong": 0})),
    "hidden activation": ("architecture", configure("config.json", hidden_act="relu")),
    "length": ("max-length", configure("tokenizer_config.json", model_max_length=20)),
    "unreadable": ("unreadable", lambda path: (path / "model.safetensors").write_bytes(b"no")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_copies_are_refused_with_their_cause(name: str, reference: Path, tmp_path: Path) -> None:
    export(reference, tmp_path / "copy", dtype="float16")
    cause, damage = DAMAGES[name]
    damage(tmp_path / "copy")
    found, _ = certify(tmp_path / "copy", reference, GROUPS)
    assert [reason.cause for reason in found.reasons][:1] == [cause], found.reasons


def test_overflow_is_refused_named_and_repaired(overflowing: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"layer\.0\.output\.dense") as refused:
        export(overflowing, tmp_path / "copy", dtype="float16")
    assert "copy-float32" in str(refused.value)
    assert not (tmp_path / "copy").exists()
    kept = CrossEncoder(tmp_path / "copy-float32")
    np.testing.assert_array_equal(kept.predict(PAIRS), CrossEncoder(overflowing).predict(PAIRS))

    scorer = folder.load(overflowing)
    folder.save(scorer, tmp_path / "raw", dtype=torch.float16)
    found, _ = certify(tmp_path / "raw", overflowing, GROUPS)
    assert {"overflow"} <= {reason.cause for reason in found.reasons}
    repaired, copy = certify(tmp_path / "raw", overflowing, GROUPS, repair=True)
    assert repaired.passed, repaired.reasons
    assert copy is not None
    folder.record_islands(copy, tmp_path / "raw")
    again, _ = certify(tmp_path / "raw", overflowing, GROUPS)
    assert again.passed
    assert "bert.encoder.layer.0.output.dense" in again.model["islands"]
    lost = shutil.copytree(tmp_path / "raw", tmp_path / "lost")
    for name in ("config.json", "config_sentence_transformers.json"):
        configure(name, keep_in_fp32_modules=[])(lost)
    without, _ = certify(lost, tmp_path / "raw", GROUPS)
    assert without.reasons[0].cause == "islands"


def test_a_float16_export_beyond_its_range_keeps_float32(reference: Path, tmp_path: Path) -> None:
    model = CrossEncoder(reference)
    with torch.no_grad():
        model.model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e6
    with pytest.raises(NonFiniteWeightError, match="kept in float32"):
        model.save(tmp_path / "narrow", dtype=torch.float16)
    assert not (tmp_path / "narrow").exists()
    assert CrossEncoder(tmp_path / "narrow-float32").model.bert.encoder.layer[0].output.dense.weight[0, 0] == 1e6


def test_certifying_in_memory_changes_nothing(reference: Path) -> None:
    model = CrossEncoder(reference, model_kwargs={"dtype": "bfloat16"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = model.predict(PAIRS)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    found = saving.certify_in_memory(model._scorer, torch.float16, budget_for(torch.float16))
    assert found.passed
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    np.testing.assert_array_equal(model.predict(PAIRS), scores)


def test_a_save_is_certified_and_a_float32_save_drops_the_old_certificate(reference: Path, tmp_path: Path) -> None:
    model = CrossEncoder(reference)
    model.save(tmp_path / "m", dtype=torch.float16)
    found = certificates.read(tmp_path / "m")
    assert found is not None
    assert found.passed
    assert not certificates.changes(tmp_path / "m", found)
    assert "halfrank certificate" in (tmp_path / "m" / "README.md").read_text()
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert certificates.changes(tmp_path / "m", found) == ["model.safetensors has changed"]
    model.save(tmp_path / "m")
    assert certificates.read(tmp_path / "m") is None


def test_a_damaged_certificate_is_named(reference: Path, tmp_path: Path) -> None:
    (tmp_path / certificates.NAME).write_text("{")
    with pytest.raises(folder.ModelError, match="Certify again"):
        certificates.read(tmp_path)


def test_a_sharded_folder_is_certified_as_a_whole(reference: Path, tmp_path: Path) -> None:
    export(reference, tmp_path / "shards", dtype="float16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    found, _ = certify(tmp_path / "shards", reference, GROUPS)
    assert found.passed
    assert sum(name.endswith(".safetensors") for name in found.model["sha256"]) > 1


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = budget_for(torch.float16, {"max_score_error": 0.0})
    monkeypatch.setattr(saving, "budget_for", lambda storage: tight)


@pytest.mark.usefixtures("refusing")
def test_a_refused_run_ends_with_its_model_in_float32(reference: Path, tmp_path: Path) -> None:
    from halfrank.data.pairs import Pair
    from halfrank.train.config import TrainConfig
    from halfrank.train.examples import from_pairs
    from halfrank.train.loop import train

    scorer = folder.load(reference, folder.LoadOptions(dtype=torch.float16))
    examples = from_pairs([Pair(q, d, float(q < d)) for q, d in PAIRS], scorer.pairs)
    with pytest.raises(CertificateError, match="score-error"):
        train(scorer, examples, TrainConfig(steps=3, lr=1e-3), out=tmp_path / "run")
    joined = folder.exported_weights(scorer, torch.float32)
    saved = load_file(tmp_path / "run-float32" / "model.safetensors")
    assert all(torch.equal(joined[name], tensor) for name, tensor in saved.items())
    journal = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in journal if row.get("event") == "certificate"] == [False]
    assert journal[-1]["event"] == "end"


@pytest.mark.usefixtures("refusing")
def test_a_refused_best_model_of_fit_is_kept_in_float32_and_said_at_the_end(
    reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = CrossEncoder(str(reference), model_kwargs={"torch_dtype": torch.float16})
    examples = [InputExample(texts=[q, d], label=float(q < d)) for q, d in PAIRS]
    kept: list[dict[str, torch.Tensor]] = []

    def evaluator(model: CrossEncoder, output_path: str | None, epoch: float, steps: int) -> float:
        weights = folder.exported_weights(model._scorer, torch.float32)
        kept.append({name: tensor.clone() for name, tensor in weights.items()})
        return -float(len(kept))  # the first is the best

    with pytest.raises(CertificateError, match="score-error"):
        model.fit(DataLoader(examples, batch_size=4), evaluator, epochs=2, output_path=str(tmp_path / "fit"))
    assert len(kept) == 2
    assert caplog.text.count("was not saved to") == 1
    saved = load_file(tmp_path / "fit-float32" / "model.safetensors")
    assert all(torch.equal(kept[0][name], tensor) for name, tensor in saved.items())
    assert any(not torch.equal(kept[1][name], tensor) for name, tensor in saved.items())
