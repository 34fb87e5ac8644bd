"""Packed equals padded: scores and gradients, in float32, and a user's own padded call stays right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfrank.data.packing import Batch, pack
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from tiny import PAIRS, make_causal_folder, make_folder

PACKED = ["bert", "roberta", "xlm-roberta", "llama"]


@pytest.fixture(scope="module", params=PACKED)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    path = make_folder(request.param, tmp_path_factory.mktemp("models") / request.param)
    return folder.load(path, folder.LoadOptions(num_labels=1))


def batch_of(scorer: Scorer) -> Batch:
    return pack(scorer.pairs.encode(PAIRS), range(len(PAIRS)))


def gradients(scorer: Scorer, logits: torch.Tensor) -> torch.Tensor:
    scorer.model.zero_grad()
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None])


def padded_by_transformers(scorer: Scorer, batch: Batch) -> torch.Tensor:
    queries, documents = zip(*(PAIRS[row] for row in batch.rows), strict=True)
    inputs = scorer.tokenizer(list(queries), list(documents), padding=True, return_tensors="pt")
    return scorer.model(**inputs).logits


def test_scores_and_gradients_equal_the_padded_call(scorer: Scorer) -> None:
    assert scorer.packed
    batch = batch_of(scorer)
    packed, padded = scorer.logits(batch), padded_by_transformers(scorer, batch)
    assert (packed - padded).abs().max() <= 1e-5 * padded.abs().max()
    ours, theirs = gradients(scorer, packed), gradients(scorer, padded)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_last_layer_computes_only_what_the_head_reads(scorer: Scorer) -> None:
    layout = scorer._layout
    assert layout is not None
    assert layout.one_token == (scorer.config.model_type != "llama")
    batch = batch_of(scorer)
    one = scorer.logits(batch)
    ours = gradients(scorer, one)
    scorer._layout = replace(layout, one_token=False)
    whole = scorer.logits(batch)
    theirs = gradients(scorer, whole)
    scorer._layout = layout
    assert (one - whole).abs().max() <= 5e-6 * whole.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_padding_is_not_ignored_in_a_users_own_call(scorer: Scorer) -> None:
    queries, documents = zip(*PAIRS[:3], strict=True)
    together = scorer.tokenizer(list(queries), list(documents), padding=True, return_tensors="pt")
    assert together["attention_mask"].min() == 0, "the three pairs must need padding"
    with torch.no_grad():
        batched = scorer.model(**together).logits
        alone = [
            scorer.model(**scorer.tokenizer(query, document, return_tensors="pt")).logits
            for query, document in PAIRS[:3]
        ]
    assert torch.allclose(batched, torch.cat(alone), atol=1e-5)


def test_the_packing_proof_catches_a_wrong_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfrank.model import attention

    monkeypatch.setattr(attention, "by_pair", lambda tensor, count, length: tensor.flip(2))
    path = make_folder("bert", tmp_path / "bert")
    scorer = folder.load(path)
    assert not scorer.packed
    assert "padded path" in scorer.notes[-1]


def test_mpnet_and_deberta_take_the_padded_path(tmp_path: Path) -> None:
    for family in ("mpnet", "deberta-v2"):
        scorer = folder.load(make_folder(family, tmp_path / family))
        assert not scorer.packed
        batch = batch_of(scorer)
        padded = padded_by_transformers(scorer, batch)
        assert (scorer.logits(batch) - padded).abs().max() <= 1e-5 * padded.abs().max()


def test_a_call_without_a_mask_keeps_the_window(tmp_path: Path) -> None:
    path = make_causal_folder("gemma3_text", tmp_path / "model", sliding_window=6)
    scorer = folder.load(path, folder.LoadOptions(template="qwen3", compute="float32"))
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        wanted = plain.model(ids).last_hidden_state
        found = scorer.model.base_model(input_ids=ids).last_hidden_state
    assert (found - wanted).abs().max() <= 1e-5
