"""Copies for other runtimes: certified by running them, and refused where eight bits break the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfrank import cli
from halfrank.certify import certificate as certificates
from halfrank.errors import CertificateError, DataError, ModelError
from halfrank.export import export_graph
from halfrank.model import backends, folder, graphs
from halfrank.predict import predict
from tiny import PAIRS, make_folder

KINDS = sorted(backends.FORMATS)


@pytest.fixture(autouse=True)
def packages(request: pytest.FixtureRequest) -> None:
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    for package in backends.FORMATS[kind or "onnx"].packages:
        pytest.importorskip(package, reason=f"needs the extra [{kind or 'onnx'}]")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread(make_folder("bert", tmp_path_factory.mktemp("models") / "reference"))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as large ones often are: a few dimensions are tiny in the activations and huge in the matrices that read
    them. In float32 nothing is wrong with it; one scale for eight bits of a row loses all the others.
    """
    path = spread(make_folder("bert", tmp_path_factory.mktemp("models") / "outliers"))
    weights = load_file(path / "model.safetensors")
    body = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    read_by = {"embeddings.": "encoder.layer.0.attention.self.", "encoder.layer.1.output.": "pooler."}
    read_by |= {f"encoder.layer.{n}.attention.output.": f"encoder.layer.{n}.intermediate." for n in (0, 1)}
    read_by["encoder.layer.0.output."] = "encoder.layer.1.attention.self."
    for norm, readers in read_by.items():
        for name, tensor in body.items():
            if name.startswith(f"{norm}LayerNorm."):
                tensor[:2] /= 2000
            if name.startswith(readers) and name.endswith("weight"):
                tensor[:, :2] *= 2000
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def spread(path: Path) -> Path:
    """Let scores lie as far apart as those of a trained model."""
    weights = load_file(path / "model.safetensors")
    weights["classifier.weight"] *= 20
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_int8_copy_is_certified(kind: str, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    found = export_graph(reference, out, kind=kind, int8=True)
    assert found.passed
    assert found.model["storage"] == f"int8 {kind}"
    assert [m.compute for m in found.measured] == [f"{kind} float32"]
    assert 0 < float(found.measured[0].values["max_score_error"] or 0) < 0.05
    assert backends.FORMATS[kind].file in found.model["sha256"]
    assert certificates.read(out) == found
    assert certificates.changes(out, found) == []
    assert not list(out.glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert "`float32`" not in (out / "README.md").read_text()
    whole = sum(path.stat().st_size for path in out.glob(f"{kind}/*"))
    assert whole < 0.75 * 4 * sum(t.numel() for t in load_file(reference / "model.safetensors").values()) + 400_000


@pytest.mark.parametrize("kind", KINDS)
def test_int8_that_breaks_a_model_is_refused(
    kind: str, outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"
    monkeypatch.setattr(
        "sys.argv", ["halfrank", "export", str(outliers), "--format", kind, "--int8", "--out", str(out)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert f"The int8 {kind} copy of this model is too far from float32 and was not written" in said
    assert "Export it without --int8" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["onnx"])
def test_the_same_model_passes_in_float32(kind: str, outliers: Path, tmp_path: Path) -> None:
    found = export_graph(outliers, tmp_path / "copy", kind=kind)
    assert found.passed, found.reasons
    wanted = predict(folder.load(outliers, folder.LoadOptions(compute="float32")), PAIRS).values
    ours = predict(folder.load(tmp_path / "copy", folder.LoadOptions(backend=kind)), PAIRS).values
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(wanted), atol=1e-5, rtol=0)


def test_a_graph_of_other_weights_is_refused(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = graphs._first_token
    # The last token in place of the first: what a wrong export would be.
    monkeypatch.setattr(
        graphs, "_first_token", lambda layer, hidden, *more, **named: plain(layer, hidden.flip(1), *more)
    )
    with pytest.raises(CertificateError, match="The float32 onnx copy .* not written .* score-error"):
        export_graph(reference, tmp_path / "copy", kind="onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the model itself"):
        export_graph(reference, reference, kind="onnx")
    with pytest.raises(ValueError, match="format must be one of onnx, openvino"):
        export_graph(reference, tmp_path / "copy", kind="tensorrt")
    scorer = folder.load(reference, folder.LoadOptions(compute="float32"))
    scorer._pads, scorer._layout = False, None
    with pytest.raises(ModelError, match="scores a padded pair differently"):
        graphs.write_graph(scorer, tmp_path, "onnx")
    assert not (tmp_path / "onnx").exists()
