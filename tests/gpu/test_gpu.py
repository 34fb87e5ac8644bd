"""The same numbers on a GPU: scores, rescue, update and training beside the CPU. Run: pytest -m gpu -n 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from halfrank import CrossEncoder
from halfrank.data.pairs import Pair
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from tiny import MORE_SIZES, PAIRS, SIZES, make_folder

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU not measured"),
]
COMPUTES = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}  # largest difference of a score
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELLED = [Pair(query, document, float(i % 2)) for i, (query, document) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.mark.parametrize("compute", sorted(COMPUTES))
@pytest.mark.parametrize("family", sorted((*SIZES, *MORE_SIZES)))
def test_scores_are_those_of_the_cpu(family: str, compute: str, tmp_path: Path) -> None:
    source = make_folder(family, tmp_path / family)
    wanted = CrossEncoder(source, compute="float32", device="cpu").predict(PAIRS)
    found = CrossEncoder(source, compute=compute, device=DEVICE).predict(PAIRS)
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= COMPUTES[compute]


def test_overflow_is_rescued_and_emulation_foresees_it(bert: Path, tmp_path: Path) -> None:
    model = CrossEncoder(bert, device="cpu")
    with torch.no_grad():
        layer = model.model.bert.encoder.layer[1]
        layer.intermediate.dense.weight.mul_(1e5)
        layer.intermediate.dense.bias.mul_(1e5)
        layer.output.dense.weight.mul_(1e-4)
    model.save(tmp_path / "hot")
    exact = CrossEncoder(tmp_path / "hot", compute="float32", device="cpu").predict(PAIRS)
    foreseen = CrossEncoder(tmp_path / "hot", compute="emulated-float16", device="cpu")
    native = CrossEncoder(tmp_path / "hot", compute="float16", device=DEVICE)
    expected, found = (m.predict(PAIRS, return_report=True) for m in (foreseen, native))
    assert found[1].rescued == expected[1].rescued != ()
    assert found[1].islands == expected[1].islands
    assert np.abs(found[0] - exact).max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_update_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    moved = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(64, 300).to(dtype).to(device))
        optimizer = AdamW([("layer.weight", weight)], lr=1e-3)
        before = weight.detach().float().cpu().clone()
        for step in range(5):
            weight.grad = torch.randn(64, 300, generator=torch.Generator().manual_seed(step)).to(dtype).to(device)
            optimizer.step()
        exact = optimizer.exact(weight) if dtype is not torch.float32 else weight.detach()
        moved.append((exact.float().cpu() - before).double().flatten())
    ours, wanted = moved[1], moved[0]
    assert float(ours @ wanted / (ours.norm() * wanted.norm())) > 0.9999
    assert float(ours.norm() / wanted.norm()) == pytest.approx(1, abs=1e-3)


def trained(path: Path, device: str, dtype: torch.dtype, out: Path | None = None, **options: object) -> Scorer:
    scorer = folder.load(path, folder.LoadOptions(dtype=dtype, device=device, config=STILL))
    config = TrainConfig(batch_size=8, epochs=4, lr=1e-3, seed=3)
    train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=out, **options)  # type: ignore[arg-type]
    return scorer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_moves_weights_as_float32_on_the_cpu(dtype: torch.dtype, bert: Path) -> None:
    start = folder.exported_weights(folder.load(bert, folder.LoadOptions(device="cpu")), torch.float32)
    moved = []
    for device, own in (("cpu", torch.float32), (DEVICE, dtype)):
        weights = folder.exported_weights(trained(bert, device, own), torch.float32)
        parts = [(weights[name].cpu().double() - start[name].double()).flatten() for name in sorted(start)]
        moved.append(torch.cat(parts))
    assert bool(moved[1].isfinite().all())
    cosine = float(moved[0] @ moved[1] / (moved[0].norm() * moved[1].norm()))
    assert cosine > (0.999 if dtype is torch.float32 else 0.95)
    assert float(moved[1].norm() / moved[0].norm()) == pytest.approx(1, abs=0.05)


def test_a_repeated_run_has_the_same_bits(bert: Path, tmp_path: Path) -> None:
    whole = trained(bert, DEVICE, torch.float16, tmp_path / "whole")
    again = trained(bert, DEVICE, torch.float16, tmp_path / "again")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_memory_of_16_bit_weights_is_half(bert: Path) -> None:
    scorer = folder.load(bert, folder.LoadOptions(dtype=torch.float16, device=DEVICE))
    matrices = [p for p in scorer.model.parameters() if p.ndim > 1 and p.dtype is torch.float16]
    assert all(p.device.type == DEVICE for p in scorer.model.parameters())
    assert sum(p.numel() for p in matrices) > 0.8 * scorer.model.num_parameters()
