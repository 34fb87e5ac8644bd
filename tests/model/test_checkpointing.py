"""Layers that are computed again: the same bits, for every family, with less held in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfrank.data.packing import pack
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from tiny import PAIRS, SIZES, make_folder


def gradients(scorer: Scorer, *, checkpointing: bool, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores, all gradients, and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in scorer.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    scorer.checkpointing = checkpointing
    scorer.model.train().zero_grad()
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = scorer.logits(pack(scorer.pairs.encode(PAIRS), range(len(PAIRS))))
    (scores.square().sum()).backward()
    found = [p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]
    return scores.detach(), torch.cat([part.float() for part in found]), sum(kept.values())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", sorted(SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_with_less_kept(family: str, dtype: torch.dtype, padded: bool, tmp_path: Path) -> None:
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), 0.2)
    options: dict[str, Any] = {"dtype": dtype, "compute": "float32", "config": dropout}
    scorer = folder.load(make_folder(family, tmp_path / family), folder.LoadOptions(**options))
    if not (padded or scorer.packed):
        pytest.skip("this family is padded anyway")
    if padded:
        scorer._layout = None
    assert not torch.equal(*(gradients(scorer, checkpointing=False, seed=seed)[0] for seed in (3, 4)))
    plain, wanted, all_of_it = gradients(scorer, checkpointing=False)
    scores, found, kept = gradients(scorer, checkpointing=True)
    assert torch.equal(scores, plain)
    assert torch.equal(found, wanted)
    assert wanted.norm() > 0
    assert kept < 0.7 * all_of_it
    scorer.checkpointing = False
    assert gradients(scorer, checkpointing=False)[2] == all_of_it
