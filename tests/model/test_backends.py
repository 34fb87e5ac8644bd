"""Graphs beside torch: every family scores alike in ONNX Runtime and OpenVINO, whatever is not a graph is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfrank import CrossEncoder
from halfrank.errors import MissingExtraError, ModelError, NonFiniteScoreError
from halfrank.model import backends, folder, graphs
from halfrank.model.scorer import Scorer
from halfrank.precision import detect
from halfrank.predict import Scores, predict
from tiny import MORE_SIZES, PAIRS, SENTENCES, SIZES, make_causal_folder, make_folder

KINDS = {"onnx": "onnxruntime", "openvino": "openvino"}
FAMILIES = sorted({*SIZES, *MORE_SIZES} - {"bert", "xlm-roberta"})  # the first below, the second as roberta
LONG = [*PAIRS, (SENTENCES[0], " ".join(SENTENCES * 3)), ("", ""), *PAIRS]


def written(scorer: Scorer, path: Path, kind: str, *, int8: bool = False) -> Path:
    """A folder with the graph of `scorer`, not certified: its scores are what is tested."""
    for package in backends.FORMATS[kind].packages:
        pytest.importorskip(package, reason=f"needs the extra [{kind}]")
    path.mkdir()
    graphs.write_graph(scorer, path, kind, int8=int8)
    folder.write_settings(scorer, path)
    return path


def scored(path: Path, kind: str, **options: Any) -> Scores:
    return predict(folder.load(path, folder.LoadOptions(backend=kind, **options)), LONG)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module", params=sorted(KINDS))
def exported(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One model as a folder of each runtime."""
    place = tmp_path_factory.mktemp("exported") / request.param
    return request.param, written(folder.load(bert, folder.LoadOptions(compute="float32")), place, request.param)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_scores_as_torch(family: str, kind: str, tmp_path: Path) -> None:
    labels = 3 if family == "electra" else 1
    source = make_folder(family, tmp_path / "source", num_labels=labels)
    scorer = folder.load(source, folder.LoadOptions(compute="float32"))
    found = scored(written(scorer, tmp_path / "graph", kind), kind)
    wanted = predict(scorer, LONG)
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5, rtol=0)
    assert found.values.shape == (len(LONG), labels)
    assert found.truncated == wanted.truncated > 0
    assert np.ptp(wanted.values, axis=0).min() > 1e-3


def test_activation_order_and_rank(exported: tuple[str, Path], bert: Path) -> None:
    kind, path = exported
    torch.set_num_threads(2)  # pieces finish in any order
    ours, theirs = CrossEncoder(path, backend=kind, max_length=40), CrossEncoder(bert, compute="float32", max_length=40)
    assert ours.get_backend() == ours.backend == kind
    for activation in (None, torch.nn.Identity(), torch.tanh):
        wanted = theirs.predict(LONG, activation_fn=activation)
        np.testing.assert_allclose(ours.predict(LONG, activation_fn=activation), wanted, atol=1e-5)
    assert ours.predict(LONG[0]) == pytest.approx(theirs.predict(LONG[0]), abs=1e-5)
    assert len(ours.predict([])) == 0
    found, wanted = (model.rank(SENTENCES[0], SENTENCES) for model in (ours, theirs))
    assert [row["corpus_id"] for row in found] == [row["corpus_id"] for row in wanted]


def test_yes_no_of_a_causal_model(tmp_path: Path) -> None:
    source = make_causal_folder("llama", tmp_path / "source")
    scorer = folder.load(source, folder.LoadOptions(compute="float32", template="qwen3"))
    path = written(scorer, tmp_path / "graph", "onnx")
    for text in ("", "Be strict."):
        wanted = predict(scorer, LONG, instruction=text).values
        found = predict(folder.load(path, folder.LoadOptions(backend="onnx")), LONG, instruction=text).values
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_16_bit_weights_are_exported_with_what_training_kept_beside_them(tmp_path: Path) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "source", dtype=torch.float16), folder.LoadOptions())
    name = next(name for name, parameter in scorer.model.named_parameters() if parameter.dtype is torch.float16)
    scorer.residuals[name] = torch.full_like(scorer.model.get_parameter(name), 100, dtype=torch.int8)
    wrapped, inputs = graphs._wrapped(scorer, "eager")
    assert torch.equal(wrapped.model.state_dict()[name], folder.exported_weights(scorer, torch.float32)[name])
    assert not torch.equal(wrapped.model.state_dict()[name], scorer.model.state_dict()[name].float())
    assert wrapped(*inputs.values()).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_last_layer_computes_the_first_token_alone(dtype: torch.dtype, bert: Path) -> None:
    scorer = folder.load(bert, folder.LoadOptions(compute="float32"))
    assert scorer.one_token
    wrapped, inputs = graphs._wrapped(scorer, "eager" if dtype is torch.float32 else "sdpa")
    layer: Any = wrapped.model.bert.encoder.layer[-1]
    short = wrapped(*inputs.values())
    seen: list[tuple[int, ...]] = []
    layer.output.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    wrapped(*inputs.values())
    assert seen == [(3, 1, 32)]
    del layer.forward
    torch.testing.assert_close(short, wrapped(*inputs.values()), atol=1e-6, rtol=0)
    assert seen[1] == (3, inputs["input_ids"].shape[1], 32)


def test_what_needs_weights_is_refused(exported: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = exported
    model = CrossEncoder(path, backend=kind)
    tries = (
        lambda: model.fit([]),
        lambda: model.save(tmp_path / "copy"),
        lambda: model.half(),
        lambda: model.model,
        lambda: model.add_adapter(4),
        lambda: model.start_multi_process_pool(["cpu"]),
        lambda: model.to("cuda"),
        lambda: model.set_keep_in_fp32_modules(["bert"]),
    )
    for attempt in tries:
        with pytest.raises(ModelError, match="needs torch weights.*backend='torch'"):
            attempt()
    assert not (tmp_path / "copy").exists()


def test_a_folder_without_the_graph_says_which_line_makes_it(bert: Path, exported: tuple[str, Path]) -> None:
    kind, path = exported
    with pytest.raises(ModelError, match=f"halfrank export MODEL --format {kind}"):
        CrossEncoder(bert, backend=kind)
    with pytest.raises(ModelError, match=f"load it with backend='{kind}'"):
        CrossEncoder(path)
    with pytest.raises(ModelError, match="give one as file_name"):
        CrossEncoder(path, backend=kind, model_kwargs={"file_name": "other.onnx"})
    usual = Path(backends.FORMATS[kind].file).name
    assert CrossEncoder(path, backend=kind, model_kwargs={"file_name": usual}).num_labels == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"backend": "tensorrt"}, "backend must be one of torch, onnx, openvino"),
        ({"backend": "onnx", "num_labels": 2}, "num_labels goes with backend='torch'"),
        ({"backend": "onnx", "device": "cuda"}, "runs on the CPU"),
        ({"backend": "onnx", "compute": "bfloat16"}, "computes in float32; got"),
        ({"backend": "onnx", "model_kwargs": {"export": True}}, "halfrank export --format"),
    ],
)
def test_settings_that_a_graph_has_not(settings: dict[str, Any], text: str, bert: Path) -> None:
    if settings.get("compute"):
        pytest.importorskip("onnxruntime")
        (bert / "onnx").mkdir(exist_ok=True)
        (bert / "onnx" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=text):
        CrossEncoder(bert, **settings)


def test_a_missing_extra_is_named(exported: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    kind, path = exported
    monkeypatch.setitem(__import__("sys").modules, KINDS[kind], None)
    line = rf"pip install 'halfrank\[{kind}\]'"
    with pytest.raises(MissingExtraError, match=line):
        CrossEncoder(path, backend=kind)
    with pytest.raises(MissingExtraError, match=line):
        graphs.write_graph(folder.load(bert), bert, kind)


def test_damaged_and_foreign_graphs(exported: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = exported
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    config = json.loads((copy / "config.json").read_text())
    few = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
    (copy / "config.json").write_text(json.dumps(few | {"num_labels": 2}))
    with pytest.raises(ModelError, match="gives 1 scores a pair, .* has 2"):
        CrossEncoder(copy, backend=kind)
    graph = copy / backends.FORMATS[kind].file
    graph.write_bytes(graph.read_bytes()[:200])
    with pytest.raises(ModelError, match=f"cannot read .*halfrank export MODEL --format {kind}"):
        CrossEncoder(copy, backend=kind)


def test_no_score_that_is_not_finite(exported: tuple[str, Path]) -> None:
    scorer = folder.load(exported[1], folder.LoadOptions(backend=exported[0]))
    assert scorer.engine is not None
    run = scorer.engine._opened.run

    def broken(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.where(inputs["input_ids"][:, :1] > 0, np.nan, run(inputs))

    scorer.engine._opened = scorer.engine._opened._replace(run=broken)
    with pytest.raises(NonFiniteScoreError, match=f"in {scorer.engine.name}.*backend='torch'"):
        predict(scorer, PAIRS)


def test_pieces_waste_little_and_lose_nobody() -> None:
    lengths = sorted(np.random.default_rng(0).integers(5, 300, 500).tolist(), reverse=True)
    pieces = list(backends._pieces(lengths, 1024))
    assert [row for piece in pieces for row in piece] == list(range(500))
    padded = [len(piece) * lengths[piece.start] for piece in pieces]
    assert max(padded) <= 1024
    assert sum(padded) < 1.05 * sum(lengths)
    assert list(backends._pieces([3000, 10], 1024)) == [range(0, 1), range(1, 2)]


def test_openvino_in_bfloat16_is_asked_for(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder.load(bert, folder.LoadOptions(compute="float32")), tmp_path / "graph", "openvino")
    wanted = predict(folder.load(bert, folder.LoadOptions(compute="float32")), LONG).values
    assert np.abs(scored(path, "openvino").values - wanted).max() < 1e-6  # its own default is bfloat16 where it can
    if detect().bfloat16_products:
        assert 1e-6 < np.abs(scored(path, "openvino", compute="bfloat16").values - wanted).max() < 0.01
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(ValueError, match="needs a processor that multiplies it"):
        scored(path, "openvino", compute="bfloat16")
