"""The one inference path: equal pairs are scored once, a beginning that pairs share is computed once, order is kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfrank.data.branches import branched
from halfrank.data.tokens import NONE, Tokens, starts
from halfrank.errors import DataError, NonFiniteScoreError
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from tiny import PAIRS, SENTENCES, make_causal_folder, make_folder

IDENTITY = torch.nn.Identity()
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {}, "llama": {}, "gemma": {}, "granite": {"logits_scaling": 4.0},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
ASKED = [(SENTENCES[0], document) for document in SENTENCES] + [(SENTENCES[5], d) for d in SENTENCES[2:7]] + PAIRS[:4]


def causal(family: str, place: Path, *, template: str = "qwen3", compute: str = "float32") -> Scorer:
    path = make_causal_folder(family, place / f"{family}-{template}", **FAMILIES[family])
    return folder.load(path, folder.LoadOptions(template=template, compute=compute))


def logits(scorer: Scorer, pairs: Sequence[tuple[str, str]], **others: Any) -> np.ndarray:
    return predict(scorer, pairs, activation=IDENTITY, **others).values


def watched(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that the scorer is asked for from now on."""
    seen: list[Any] = []
    plain = scorer.logits

    def noted(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return plain(batch)

    monkeypatch.setattr(scorer, "logits", noted)
    return seen


@pytest.mark.parametrize("max_tokens", [8192, 700])
@pytest.mark.parametrize("template", ["qwen3", "mxbai", "bge", "plain"])
def test_shared_beginnings_score_as_alone(
    template: str, max_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = causal("qwen3", tmp_path, template=template)
    alone = np.concatenate([logits(scorer, [pair], instruction="Judge.") for pair in ASKED])
    lengths = scorer.pairs.encode(ASKED, instruction="Judge.").lengths
    assert scorer.branches
    seen = watched(scorer, monkeypatch)
    found = logits(scorer, ASKED, instruction="Judge.", max_tokens=max_tokens)
    assert np.abs(found - alone).max() <= 1e-5
    computed = [len(batch.input_ids) for batch in seen]
    assert sum(computed) < (0.75 if max_tokens == 8192 else 0.85) * lengths.sum()
    assert all(size <= max(max_tokens, lengths.max()) for size in computed)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_families_share_beginnings(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = causal(family, tmp_path)
    assert scorer.branches
    alone = np.concatenate([logits(scorer, [pair]) for pair in ASKED])
    seen = watched(scorer, monkeypatch)
    assert np.abs(logits(scorer, ASKED) - alone).max() <= 1e-5
    assert any(family.beginning for batch in seen for family in batch.families)


def test_emulated_float16_shares_beginnings_too(tmp_path: Path) -> None:
    scorer = causal("llama", tmp_path, compute="emulated-float16")
    alone = np.concatenate([logits(scorer, [pair]) for pair in ASKED])
    assert np.abs(logits(scorer, ASKED) - alone).max() <= 2e-3 * np.abs(alone).max()


def test_bidirectional_models_do_not_share(tmp_path: Path) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))
    assert not scorer.branches
    alone = np.concatenate([logits(scorer, [pair]) for pair in ASKED])
    assert np.abs(logits(scorer, ASKED) - alone).max() <= 1e-5


def test_a_model_that_reads_ahead_fails_the_proof(tmp_path: Path) -> None:
    scorer = causal("llama", tmp_path)
    for layer in scorer.model.base_model.layers:
        layer.self_attn.is_causal = False
    assert not scorer.branches
    alone = np.concatenate([logits(scorer, [pair]) for pair in ASKED])
    assert np.abs(logits(scorer, ASKED) - alone).max() <= 1e-5


def test_branches_hold_every_pair_whole() -> None:
    random = np.random.default_rng(0)
    heads = [random.integers(1, 99, 30), random.integers(1, 99, 9), random.integers(1, 99, 3)]
    pairs = [np.concatenate([heads[n % 3], random.integers(1, 99, 1 + n % 7)]) for n in range(40)]
    pairs[4] = np.concatenate([heads[1], [0, 0]])  # nothing of its own but padding
    tokens = Tokens(np.concatenate(pairs).astype(np.int32), None, starts([len(pair) for pair in pairs]), NONE)
    found = []
    for row in branched(tokens, [range(k, 40, 3) for k in range(3)], 90, pad=0):
        assert len(row.input_ids) == len(row.positions) == sum(family.tokens for family in row.families) <= 90
        whole = row.select(range(len(row.rows)))
        for place, ids, number in zip(row.last, whole.input_ids.split(whole.lengths), whole.rows, strict=True):
            assert (ids.numpy() == pairs[number]).all()
            assert row.input_ids[place] == pairs[number][pairs[number] != 0][-1] or number == 4
            assert row.positions[place] == len(pairs[number]) - 1 or number == 4
        found += row.rows
    assert sorted(found) == list(range(40))


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_equal_pairs_are_scored_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = folder.load(make_folder(family, tmp_path / family), folder.LoadOptions(compute="float32", max_length=24))
    pairs = [PAIRS[i] for i in (3, 1, 3, 3, 0, 1, 7, 3)]
    once = predict(scorer, list(dict.fromkeys(pairs)))
    places = [list(dict.fromkeys(pairs)).index(pair) for pair in pairs]
    finished: list[int] = []
    seen = watched(scorer, monkeypatch)
    found = predict(scorer, pairs, progress=finished.append)
    assert (found.values == once.values[places]).all()
    assert sum(len(batch.rows) for batch in seen) == 4
    assert sum(finished) == 8
    assert found.truncated == scorer.pairs.encode(pairs).truncated > once.truncated > 0


def test_every_copy_of_a_rescued_pair_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = causal("llama", tmp_path)
    pairs = [ASKED[i] for i in (0, 1, 0, 2, 1)]
    wanted = logits(scorer, pairs)
    plain = scorer.logits

    def breaking(batch: Any) -> torch.Tensor:
        values = plain(batch)
        return (
            values.index_fill(0, torch.tensor([batch.rows.index(1)]), torch.nan) if hasattr(batch, "last") else values
        )

    monkeypatch.setattr(scorer, "logits", breaking)
    found = predict(scorer, pairs, activation=IDENTITY)
    assert found.rescued == (1, 4)
    assert np.abs(found.values - wanted).max() <= 1e-5


def test_the_first_copy_is_named(tmp_path: Path) -> None:
    scorer = causal("llama", tmp_path)
    pairs = [ASKED[0], ASKED[0], ASKED[1], ASKED[1]]
    with torch.no_grad():
        scorer.model.score.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteScoreError, match=r"2 pairs .* the first is pair [02] "):
        predict(scorer, pairs)
    with pytest.raises(DataError, match=r"pair 3 \(counted from 0\) holds what is not valid text"):
        predict(scorer, [*pairs[:3], ("a", "\ud800")])


def test_windows_give_the_same_scores_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))
    pairs = [(query, f"{document} {number}") for number in range(3) for query, document in PAIRS[:11]]
    wanted = logits(scorer, pairs)
    monkeypatch.setattr("halfrank.data.tokens.CHUNK", 4)
    monkeypatch.setattr("halfrank.predict.WINDOW", 9)
    seen = watched(scorer, monkeypatch)
    assert np.abs(logits(scorer, pairs) - wanted).max() <= 1e-6
    assert [len(batch.rows) for batch in seen] == [4, 12, 12, 5]


def test_tokens_are_made_beside_the_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))
    workers = set()
    plain = scorer.pairs._encode

    def noted(chunk: Any) -> Any:
        workers.add(threading.current_thread())
        return plain(chunk)

    monkeypatch.setattr(scorer.pairs, "_encode", noted)
    predict(scorer, PAIRS)
    assert workers
    assert threading.main_thread() not in workers
    assert not any(worker.is_alive() for worker in workers)


def test_an_interrupted_forward_pass_ends_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))

    def interrupted(batch: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(scorer, "logits", interrupted)
    scorer.model.train()
    with pytest.raises(KeyboardInterrupt):
        predict(scorer, PAIRS, max_tokens=64)
    assert scorer.model.training
    assert not [thread for thread in threading.enumerate() if thread.name == "halfrank-ahead"]
