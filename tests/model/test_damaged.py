"""Weights that are not finite: which, and whether the file or the conversion is to blame."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfrank.diagnosis import Cause, explain_weights
from halfrank.errors import NonFiniteWeightError
from halfrank.model import folder
from tiny import make_folder

NAME = "bert.encoder.layer.1.intermediate.dense.weight"


def damaged(root: Path, value: float) -> Path:
    path = make_folder("bert", root / "bert")
    tensors = load_file(path / "model.safetensors")
    tensors[NAME][2, 3] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("value", "cause"),
    [(math.nan, Cause.CORRUPT_WEIGHT), (-math.inf, Cause.CORRUPT_WEIGHT), (1e5, Cause.WEIGHT_OUT_OF_RANGE)],
)
def test_a_load_in_float16_tells_a_corrupt_weight_from_a_large_one(tmp_path: Path, value: float, cause: Cause) -> None:
    path = damaged(tmp_path, value)
    with pytest.raises(NonFiniteWeightError) as caught:
        folder.load(path, folder.LoadOptions(dtype=torch.float16, num_labels=1))
    finding = explain_weights(caught.value)
    assert (finding.cause, finding.module) == (cause, NAME.removesuffix(".weight"))


def test_a_large_weight_loads_in_bfloat16_and_is_refused_when_stored_in_float16(tmp_path: Path) -> None:
    scorer = folder.load(damaged(tmp_path, 1e5), folder.LoadOptions(dtype=torch.bfloat16, num_labels=1))
    with pytest.raises(NonFiniteWeightError) as caught:
        folder.save(scorer, tmp_path / "saved", dtype=torch.float16)
    assert caught.value.tensors == (NAME,)
    assert explain_weights(caught.value).cause is Cause.WEIGHT_OUT_OF_RANGE
