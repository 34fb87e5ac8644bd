"""Adapters are trained, saved and merged: the frozen weights keep their bits, everybody reads the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from halfrank import CrossEncoder, InputExample, memory
from halfrank.certify import saving
from halfrank.certify.compare import certify
from halfrank.cli import app
from halfrank.data import probes
from halfrank.data.pairs import Pair
from halfrank.errors import ModelError, TrainingError
from halfrank.export import export
from halfrank.model import adapters, folder
from halfrank.model.scorer import Scorer
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from judges import peft_scores
from tiny import PAIRS, make_folder

MIDDLE = sorted(len(d) for _, d in PAIRS)[len(PAIRS) // 2]
LABELLED = [Pair(q, d, float(len(d) > MIDDLE)) for q, d in PAIRS]  # a length is easily learned
LOGITS = torch.nn.Identity()


def with_adapters(base: Path, **options: Any) -> Scorer:
    scorer = folder.load(base, folder.LoadOptions(compute="float32", **options))
    adapters.add(scorer, adapters.settings(scorer.model, 4))
    return scorer


def in_peer(place: Path) -> np.ndarray:
    from sentence_transformers import CrossEncoder as Peer

    peer = Peer(str(place), device="cpu", model_kwargs={"dtype": torch.float32})
    return peer.predict(PAIRS, activation_fn=LOGITS, show_progress_bar=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_only_adapters_and_head_are_trained_and_all_read_the_result(
    family: str, checkpointing: bool, tmp_path: Path
) -> None:
    base = make_folder(family, tmp_path / "base", dtype=torch.float16)
    torch.manual_seed(0)
    scorer = with_adapters(base)
    before = {name: p.detach().clone() for name, p in scorer.model.named_parameters()}
    config = TrainConfig(steps=80, batch_size=8, lr=1e-2, checkpointing=checkpointing)
    losses = train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=tmp_path / "run").losses
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    for name, parameter in scorer.model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    assert not (tmp_path / "run" / "model.safetensors").exists()
    mine = CrossEncoder(str(tmp_path / "run"), compute="float32")
    wanted = mine.predict(PAIRS, activation_fn=LOGITS)
    export(tmp_path / "run", tmp_path / "merged", dtype="float32")
    readers = {
        "peft": peft_scores(tmp_path / "run")[:, 0],
        "merged": CrossEncoder(tmp_path / "merged").predict(PAIRS, activation_fn=LOGITS),
        "sentence-transformers": in_peer(tmp_path / "run"),  # whose llama has no pad token of its own
        "sentence-transformers, merged": in_peer(tmp_path / "merged"),
    }
    for reader, scores in readers.items():
        assert np.abs(scores - wanted).max() <= 1e-5, reader


def test_an_interrupted_run_goes_on_to_the_same_bits_and_refuses_another_rank(tmp_path: Path) -> None:
    base = make_folder("bert", tmp_path / "base", dtype=torch.float16)
    ends = []
    for name, stops in (("whole", [6]), ("cut", [3, 6])):
        for stop in stops:
            torch.manual_seed(0 if stop == stops[0] else 1)  # what a resumed run draws is written over
            scorer = with_adapters(base)
            config = TrainConfig(steps=6, batch_size=4, lr=1e-2, checkpoint_every=1)
            examples = from_pairs(LABELLED, scorer.pairs)
            try:
                train(scorer, examples, config, out=tmp_path / name, resume=stops[0] != stop, lr_factor=_stopping(stop))
            except KeyboardInterrupt:
                assert stop == 3
        ends.append({n: p.detach().clone() for n, p in scorer.model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    stored = json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())
    assert stored["settings"]["adapters"]["rank"] == 4
    plain = folder.load(base, folder.LoadOptions(compute="float32"))
    with pytest.raises(TrainingError, match="adapters"):
        train(plain, from_pairs(LABELLED, plain.pairs), config, out=tmp_path / "cut", resume=True)


def _stopping(stop: int) -> Any:
    def rate(step: int, total: int) -> float:
        if step == stop:
            raise KeyboardInterrupt
        return max(1.0 - step / total, 0.0)

    return rate


def test_fit_trains_the_adapters_of_a_model(tmp_path: Path) -> None:
    model = CrossEncoder(str(make_folder("bert", tmp_path / "base")), model_kwargs={"torch_dtype": torch.float16})
    model.add_adapter(4)
    examples = [InputExample(texts=[p.query, p.document], label=p.label) for p in LABELLED]
    loader = torch.utils.data.DataLoader(examples, batch_size=8)  # type: ignore[arg-type]
    model.fit(loader, epochs=2, warmup_steps=0, optimizer_params={"lr": 1e-2}, output_path=str(tmp_path / "fit"))
    assert (tmp_path / "fit" / adapters.WEIGHTS).exists()
    wanted = model.predict(PAIRS)
    np.testing.assert_allclose(CrossEncoder(str(tmp_path / "fit")).predict(PAIRS), wanted, atol=1e-3)
    model.merge_adapters()
    model.save(tmp_path / "whole")
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "whole").predict(PAIRS), wanted, atol=1e-2
    )  # products of 16 bits


@pytest.mark.parametrize("rank", [2, 6])
def test_a_plan_for_adapters_trains_these_and_nothing_else(rank: int, tmp_path: Path) -> None:
    base = make_folder("bert", tmp_path / "base", dtype=torch.bfloat16)
    scorer = folder.load(base, folder.LoadOptions(compute="float32"))
    adapters.add(scorer, adapters.settings(scorer.model, rank))
    saving.save(scorer, tmp_path / "adapters")
    described = memory.describe(tmp_path / "adapters")
    found = memory.plan(described, [[12] * 4], limit=10**10, base=0)
    sizes = [(name, parameter.numel()) for name, parameter in scorer.model.named_parameters()]
    added = sum(size for name, size in sizes if adapters.is_adapter(name))
    held = sum(size for _, size in sizes) - added
    assert [str(row.way) for row in found.rows] == [
        f"lora-bfloat16, rank {rank}", f"lora-bfloat16, rank {rank}, checkpointing"
    ]  # fmt: skip
    for row in found.rows:
        wide = added + described.sizes.wide
        assert row.need.moments == 8 * sum(p.numel() for p in scorer.model.parameters() if p.requires_grad)
        assert row.need.weights == 4 * wide + 2 * (held - described.sizes.wide)


def test_the_verbs_train_score_and_merge_adapters(tmp_path: Path) -> None:
    base, data, run = make_folder("bert", tmp_path / "base"), tmp_path / "pairs.jsonl", CliRunner()
    data.write_text(
        "".join(json.dumps({"query": p.query, "document": p.document, "label": p.label}) + "\n" for p in LABELLED)
    )
    words = ["train", str(data), "--model", str(base), "--out", str(tmp_path / "tuned"), "--lora", "4"]
    done = run.invoke(app, [*words, "--precision", "float16", "--compute", "float32", "--steps", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "tuned" / adapters.CONFIG).exists()
    scored = []
    assert (
        run.invoke(
            app, ["export", str(tmp_path / "tuned"), "--dtype", "float32", "--out", str(tmp_path / "whole")]
        ).exit_code
        == 0
    )
    for model in ("tuned", "whole"):
        out = tmp_path / f"{model}.txt"
        words = ["score", str(data), "--model", str(tmp_path / model), "--out", str(out), "--format", "scores"]
        assert run.invoke(app, [*words, "--compute", "float32"]).exit_code == 0
        scored.append([float(line) for line in out.read_text().split()])
    np.testing.assert_allclose(scored[0], scored[1], atol=1e-5)


def test_a_merged_copy_is_certified_beside_its_adapters_and_adapters_are_no_copy(tmp_path: Path) -> None:
    base = make_folder("bert", tmp_path / "base", dtype=torch.float16)
    scorer = with_adapters(base)
    train(scorer, from_pairs(LABELLED, scorer.pairs), TrainConfig(steps=4, lr=1e-2), out=tmp_path / "run")
    export(tmp_path / "run", tmp_path / "merged", dtype="float16")
    found, _ = certify(tmp_path / "merged", tmp_path / "run", probes.groups())
    assert found.passed, found.reasons
    assert max(m.values["max_score_error"] for m in found.measured) < 0.01
    apart, _ = certify(base, tmp_path / "run", probes.groups())
    assert "weights-differ" in {reason.cause for reason in apart.reasons}
    with pytest.raises(ModelError, match="are no copy of a model. Merge them"):
        certify(tmp_path / "run", base, probes.groups())
