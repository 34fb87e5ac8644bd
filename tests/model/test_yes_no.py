"""Causal checkpoints as yes/no scorers: the peer's scores, transformers' logits, saved, trained, cut and told."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfrank import CrossEncoder, InputExample
from halfrank.cross_encoder import pool as workers
from halfrank.errors import ModelError
from halfrank.model import folder
from halfrank.model.modular import Modular
from halfrank.model.template import KINDS
from tiny import PAIRS, byte_tokenizer, make_causal_folder

IDENTITY = torch.nn.Identity()


def scores(model: Any, **others: Any) -> np.ndarray:
    return model.predict(PAIRS, activation_fn=IDENTITY, show_progress_bar=False, **others)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def peer(path: Path, **others: Any) -> Any:
    from sentence_transformers import CrossEncoder as Peer

    return Peer(str(path), device="cpu", **others)


def published(kind: str, family: str, place: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as sentence-transformers publishes such rerankers: a named template, LogitScore beside the weights."""
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

    chats = {"default": "{{ messages[0].content }}", "reranker": KINDS[kind].template}
    scaled = {"logits_scaling": 4.0} if family == "granite" else {}
    path = make_causal_folder(family, place / "plain", tied=tied, dtype=dtype, chat_template=chats, **scaled)
    transformer = Transformer(
        str(path), transformer_task="text-generation", model_kwargs={"dtype": dtype},
        processing_kwargs={"chat_template": {"chat_template": "reranker"}},
    )  # fmt: skip
    ids = [byte_tokenizer().convert_tokens_to_ids(word) for word in (KINDS[kind].yes, KINDS[kind].no) if word]
    Peer(modules=[transformer, LogitScore(*ids)], device="cpu").save_pretrained(str(place / "published"))
    return place / "published"


@pytest.mark.parametrize(
    ("kind", "family", "tied"),
    [
        ("qwen3", "qwen3", True), ("mxbai", "qwen2", True), ("bge", "gemma", True), ("qwen3", "llama", False),
        ("mxbai", "granite", True),  # no sequence-classification class of its own, and scaled logits
    ],
)  # fmt: skip
def test_published_folders_score_as_in_the_peer_and_travel_back(
    kind: str, family: str, tied: bool, tmp_path: Path
) -> None:
    path = published(kind, family, tmp_path, tied=tied)
    theirs, model = peer(path), CrossEncoder(str(path))
    wanted = scores(theirs)
    assert apart(scores(model), wanted) <= 1e-5
    assert apart(scores(model, prompt="Which text helps?"), scores(theirs, prompt="Which text helps?")) <= 1e-5
    assert apart(scores(model, prompt="Which text helps?"), wanted) > 1e-3
    assert model._scorer.packed
    model.save(tmp_path / "ours")
    assert apart(scores(CrossEncoder(tmp_path / "ours")), wanted) <= 1e-5
    assert apart(scores(peer(tmp_path / "ours")), wanted) <= 1e-5
    assert apart(scores(peer(tmp_path / "ours"), prompt="Help?"), scores(theirs, prompt="Help?")) <= 1e-5


@pytest.mark.parametrize("kind", list(KINDS))
def test_pairs_that_are_cut_keep_the_question(kind: str, tmp_path: Path) -> None:
    path = published(kind, "qwen3", tmp_path)
    whole = CrossEncoder(str(path))
    longest = max(whole._scorer.pairs.encode(PAIRS).lengths)
    for cut in (1, 9, 30):
        theirs, ours = peer(path, max_length=int(longest) - cut), CrossEncoder(str(path), max_length=int(longest) - cut)
        assert ours.predict(PAIRS, return_report=True)[1].truncated > 0
        assert apart(scores(ours), scores(theirs)) <= 1e-5
    tail = whole.tokenizer.decode(whole._scorer.pairs._tail("any", ""))
    assert tail.strip().endswith({"qwen3": "</think>", "mxbai": "assistant", "bge": "'No'."}[kind])


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("named", ["Qwen3-Reranker-tiny", "mxbai-rerank-tiny", "BGE-reranker-v2-gemma"])
def test_bare_folders_of_a_published_name_get_its_template(family: str, named: str, tmp_path: Path) -> None:
    path = make_causal_folder(family, tmp_path / named)
    model = CrossEncoder(str(path))
    kind = next(kind for kind in KINDS.values() if kind.called in named.lower())
    tokenizer, causal = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in (kind.yes, kind.no or kind.yes))
    for pair, score in zip(PAIRS, scores(model), strict=True):
        text = model._scorer.template.text(model.tokenizer, pair)
        assert all(part in text for part in pair)
        with torch.no_grad():
            logits = causal(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
        assert score == pytest.approx(float(logits[yes] - (logits[no] if kind.no else 0)), abs=1e-5)
    model.save(tmp_path / "ours")
    assert apart(scores(peer(tmp_path / "ours")), scores(model)) <= 1e-5


def test_without_any_template_pairs_are_read_as_the_peer_reads_them(tmp_path: Path) -> None:
    path = make_causal_folder("qwen3", tmp_path / "model", tied=False)
    model = CrossEncoder(str(path))
    assert "no chat template" in model._scorer.notes[0]
    assert apart(scores(model), scores(peer(path))) <= 1e-5


def test_the_vocabulary_head_is_never_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published("qwen3", "qwen3", tmp_path, tied=False)
    size, seen = len(byte_tokenizer()), []
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    model = CrossEncoder(str(path))
    scores(model)
    assert 1 in seen
    assert size not in seen
    assert size not in [len(p) for name, p in model.named_parameters() if "embed" not in name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_rows_are_subtracted_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    path = published("qwen3", "qwen3", tmp_path, dtype=dtype)
    model = CrossEncoder(str(path), compute="float32")
    assert model.dtype is dtype
    table = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).get_output_embeddings().weight
    yes, no = (model.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    row = model.model.score.weight
    assert row.dtype is torch.float32
    assert torch.equal(row[0], table[yes].float() - table[no].float())
    assert apart(scores(model), scores(peer(path, model_kwargs={"dtype": torch.float32}))) <= 1e-5
    model.save(tmp_path / "ours")
    exact = scores(peer(tmp_path / "ours", model_kwargs={"dtype": torch.float32}))
    assert apart(scores(CrossEncoder(tmp_path / "ours", compute="float32")), exact) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_it_trains_and_the_row_trains_alone(dtype: str, family: str, tmp_path: Path) -> None:
    path = published("qwen3", family, tmp_path)
    prompts = {"prompts": {"task": "Judge it."}, "default_prompt_name": "task"}
    model = CrossEncoder(str(path), model_kwargs={"dtype": dtype}, **prompts)
    head = next(p for name, p in model.named_parameters() if name.startswith(("score", "head")))
    before, table = head.detach().clone(), model.model.get_input_embeddings().weight.detach().clone()
    untold = scores(model, prompt="")
    examples = [InputExample(texts=list(pair), label=number % 2) for number, pair in enumerate(PAIRS)]
    model.fit(examples * 2, epochs=2, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    assert head.dtype is torch.float32
    assert not torch.equal(head, before)
    after = model.model.get_input_embeddings().weight
    assert not torch.equal(after, table), "the embeddings train"
    yes, no = (model.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    assert not torch.allclose(head[0], after[yes].float() - after[no].float(), atol=1e-4), "and the row apart from them"
    assert apart(scores(model, prompt=""), untold) > 1e-2
    labels = np.array([number % 2 for number in range(len(PAIRS))])
    told = scores(model)
    assert told[labels == 1].mean() > told[labels == 0].mean()
    model.save(tmp_path / "trained", dtype=torch.float32)
    again = CrossEncoder(str(tmp_path / "trained"))
    assert again.default_prompt_name == "task"
    assert apart(scores(again), told) <= {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    assert apart(scores(peer(tmp_path / "trained")), scores(again)) <= 1e-5


def test_num_labels_makes_a_classifier_with_a_new_head(tmp_path: Path) -> None:
    path = published("qwen3", "qwen3", tmp_path)
    model = CrossEncoder(str(path), num_labels=2)
    assert type(model.model).__name__ == "Qwen3ForSequenceClassification"
    assert model._scorer.untrained_head
    assert scores(model).shape == (len(PAIRS), 2)


def test_a_template_that_ends_with_the_pad_token_is_read_to_its_end(tmp_path: Path) -> None:
    ending = KINDS["qwen3"].template + "{{ '<|endoftext|>' }}"
    path = make_causal_folder("qwen3", tmp_path / "model", chat_template=ending)
    model = CrossEncoder(str(path))
    assert isinstance(model.model, Modular)
    assert apart(scores(model), scores(peer(path))) <= 1e-5
    model.save(tmp_path / "ours")
    assert apart(scores(peer(tmp_path / "ours")), scores(model)) <= 1e-5


def test_a_pool_scores_as_the_model_does(tmp_path: Path) -> None:
    model = CrossEncoder(str(published("mxbai", "granite", tmp_path)))
    given, found = queue.Queue(), queue.Queue()  # type: ignore[var-annotated]
    state = workers.portable(model._scorer)
    threading.Thread(target=workers._work, args=(state, "cpu", 1, given, found), daemon=True).start()
    pool = {"input": given, "output": found, "processes": [None]}
    assert apart(scores(model, pool=pool, prompt="Help?"), scores(model, prompt="Help?")) <= 1e-5


def test_what_cannot_be_a_yes_no_score_says_why(tmp_path: Path) -> None:
    capped = make_causal_folder("gemma2", tmp_path / "capped")
    with pytest.raises(ModelError, match="caps its logits"):
        CrossEncoder(str(capped))
    free = CrossEncoder(str(capped), config_kwargs={"final_logit_softcapping": None})
    with torch.no_grad():  # a padded call of the user's own, on either side
        for side in ("left", "right"):
            batch = free.tokenizer(*zip(*PAIRS, strict=True), padding=True, padding_side=side, return_tensors="pt")
            assert apart(free.model(**batch).logits[:, 0].numpy(), scores(free)) <= 1e-5
    chatty = make_causal_folder("qwen3", tmp_path / "chatty", chat_template="{{ messages[0].role }}")
    with pytest.raises(ModelError, match="cannot carry a query and a document"):
        CrossEncoder(str(chatty))
    assert np.isfinite(scores(CrossEncoder(str(chatty), template="bge"))).all()
    with pytest.raises(ValueError, match="template must be qwen3, mxbai, bge or plain"):
        folder.load(chatty, folder.LoadOptions(template="chatml"))
    tokenizer = byte_tokenizer()
    wordless = make_causal_folder("qwen3", tmp_path / "wordless")
    text = json.loads((wordless / "tokenizer.json").read_text())
    text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] not in ("yes", "no")]
    text["model"]["vocab"] = {k: v for k, v in text["model"]["vocab"].items() if k not in ("yes", "no")}
    (wordless / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ModelError, match="no token 'yes'"):
        CrossEncoder(str(wordless))
    assert "yes" in tokenizer.get_vocab()
