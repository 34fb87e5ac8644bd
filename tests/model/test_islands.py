"""Islands: modules that compute in float32 while the rest of the model does not, and how folders remember them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfrank import CrossEncoder
from halfrank.data.packing import pack
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from tiny import PAIRS, make_folder


def loaded(path: Path, compute: str, islands: tuple[str, ...] = ()) -> Scorer:
    return folder.load(path, folder.LoadOptions(compute=compute, num_labels=1, islands=islands))


def logits(scorer: Scorer) -> torch.Tensor:
    batch = pack(scorer.pairs.encode(PAIRS[:6]), range(6))
    with torch.no_grad():
        return scorer.logits(batch)


@pytest.mark.parametrize("compute", ["emulated-float16", "emulated-bfloat16", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "llama", "mpnet"])
def test_a_model_that_is_one_island_computes_as_float32(family: str, compute: str, tmp_path: Path) -> None:
    path = make_folder(family, tmp_path / family)
    scorer = loaded(path, compute)
    assert not torch.equal(logits(scorer), logits(loaded(path, "float32")))
    scorer.widen(name for name, _ in scorer.model.named_children())
    assert torch.allclose(logits(scorer), logits(loaded(path, "float32")), rtol=0, atol=1e-6)


@pytest.mark.parametrize("compute", ["emulated-float16", "float16"])
def test_an_overflow_inside_an_island_does_not_happen(compute: str, tmp_path: Path) -> None:
    scorer = loaded(make_folder("bert", tmp_path / "bert"), compute)
    layer = scorer.model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight *= 1e5
        layer.output.dense.weight *= 1e-5
    assert not logits(scorer).isfinite().all()
    # The activation between the two reads the large numbers as well.
    scorer.widen(["bert.encoder.layer.1.intermediate", "bert.encoder.layer.1.output.dense"])
    assert logits(scorer).isfinite().all()


def test_attention_scores_beyond_float16_need_the_attention_as_island(tmp_path: Path) -> None:
    scorer = loaded(make_folder("llama", tmp_path / "llama"), "emulated-float16")
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(scorer.model.model.layers[0].self_attn, name).weight *= 3e3
    assert not logits(scorer).isfinite().all()
    scorer.widen(["model.layers.0.self_attn"])
    assert logits(scorer).isfinite().all()


def test_islands_travel_in_the_folder_and_to_the_peer(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder as Peer

    islands = ["bert.encoder.layer.1.output.dense", "bert.encoder.layer.0.attention"]
    path = make_folder("bert", tmp_path / "bert")
    model = CrossEncoder(str(path), num_labels=1, compute="emulated-float16", keep_in_fp32_modules=islands)
    expected = model.predict(PAIRS)
    model.save(str(tmp_path / "saved"))
    again = CrossEncoder(str(tmp_path / "saved"), compute="emulated-float16")
    assert again._scorer.islands == tuple(islands)
    assert (again.predict(PAIRS) == expected).all()
    peer = Peer(str(tmp_path / "saved"), device="cpu")
    assert set(peer.keep_in_fp32_modules) == {f"0.model.{name}" for name in model._scorer.wide_products()}
    peer.save_pretrained(str(tmp_path / "peer"))
    (tmp_path / "peer" / "config.json").write_text(  # as a folder that the peer alone has written
        json.dumps({**json.loads((tmp_path / "peer" / "config.json").read_text()), "keep_in_fp32_modules": None})
    )
    assert list(CrossEncoder(str(tmp_path / "peer"))._scorer.islands) == model._scorer.wide_products()
    again.to(torch.float16)
    assert again._scorer.islands == tuple(islands)


def test_a_folder_without_islands_does_not_mention_them(tmp_path: Path) -> None:
    CrossEncoder(str(make_folder("bert", tmp_path / "bert")), num_labels=1).save(str(tmp_path / "saved"))
    assert "keep_in_fp32_modules" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_an_unknown_island_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'bert.nowhere'"):
        CrossEncoder(str(make_folder("bert", tmp_path / "bert")), num_labels=1, keep_in_fp32_modules=["bert.nowhere"])
