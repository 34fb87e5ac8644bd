"""Folders travel: the same scores in halfrank, sentence-transformers and transformers, whoever saved the folder.

For each family a tiny random model, for MiniLM and (where it is cached) all-mpnet-base-v2 the real weights, with one
label and with three; then the other kinds of heads: causal checkpoints that answer yes or no, with the template of each
published kind, and modular folders. Where gemma-3-270m is cached, its score is that of its two logits. Scores are
logits; the bar is 1e-5 of the largest. 16-bit folders that halfrank saved are compared with the same weights computed
in float32 elsewhere.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from architectures import PAIRS, built, tokenizer_for
from common import ROOT, arguments, finish, minilm
from halfrank import CrossEncoder
from halfrank.model.template import KINDS

sys.path.insert(0, str(ROOT / "tests"))
from tiny import make_body_folder, make_causal_folder

BAR = 1e-5
FAMILIES = [
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "modernbert", "ernie", "eurobert",
    "nomic_bert", "gte", "mpnet", "deberta-v2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2",
    "gemma3_text",
]  # fmt: skip
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank"
MPNET, GEMMA = CACHE / "all-mpnet-base-v2", CACHE / "gemma-3-270m"
YES_NO = [
    ("qwen3", "qwen3", True), ("mxbai", "qwen2", True), ("bge", "gemma", True), ("qwen3", "qwen3", False),
    ("qwen3", "llama", False), ("mxbai", "mistral", False), ("bge", "gemma3_text", True), ("mxbai", "granite", True),
]  # fmt: skip
MODULAR = [
    ("modernbert", "cls", 1), ("bert", "mean", 1), ("mpnet", "mean", 1), ("modernbert", "mean", 3),
    ("roberta", "lasttoken", 1), ("xlm-roberta", "max", 1), ("bert", "weightedmean", 1), ("deberta-v2", "cls", 1),
    ("bert", "mean_sqrt_len_tokens", 3),
]  # fmt: skip


def in_halfrank(path: Path) -> np.ndarray:
    model = CrossEncoder(str(path), max_length=64, model_kwargs={"dtype": "float32"})
    return table(model.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False))


def in_peer(path: Path) -> np.ndarray:
    from sentence_transformers import CrossEncoder as Peer

    model = Peer(str(path), max_length=64, device="cpu", model_kwargs={"dtype": torch.float32})
    return table(model.predict(PAIRS, activation_fn=torch.nn.Identity(), batch_size=8, show_progress_bar=False))


def in_transformers(path: Path) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        rows = [model(**tokenizer(*pair, truncation=True, max_length=64, return_tensors="pt")).logits for pair in PAIRS]
    return torch.cat(rows).numpy()


def table(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores, dtype=np.float64).reshape(len(PAIRS), -1)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def travelled(path: Path, place: Path, *, foreign: bool) -> dict[str, float]:
    """Relative differences to what transformers computes from the same folder."""
    from sentence_transformers import CrossEncoder as Peer

    exact = in_transformers(path)
    errors = {"halfrank": apart(in_halfrank(path), exact)}
    if foreign:
        errors["peer"] = apart(in_peer(path), exact)
    CrossEncoder(str(path), max_length=64).save(str(place / "ours"))
    errors["ours in transformers"] = apart(in_transformers(place / "ours"), exact)
    errors["ours in peer"] = apart(in_peer(place / "ours"), exact)
    Peer(str(place / "ours"), max_length=64, device="cpu").save_pretrained(str(place / "theirs"))
    errors["theirs in halfrank"] = apart(in_halfrank(place / "theirs"), exact)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = place / str(dtype).removeprefix("torch.")
        model = CrossEncoder(str(path), max_length=64, model_kwargs={"dtype": dtype})
        model.save(str(narrow))
        ours = CrossEncoder(str(narrow), max_length=64, compute="float32")
        scores = table(ours.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False))
        errors[f"{narrow.name} folder"] = apart(scores, in_transformers(narrow))
    return errors


def yes_no_folder(kind: str, family: str, place: Path, *, tied: bool) -> Path:
    """A folder as sentence-transformers publishes such rerankers, built by it."""
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules.logit_score import LogitScore

    chats = {"default": "{{ messages[0].content }}", "reranker": KINDS[kind].template}
    scaled = {"logits_scaling": 4.0} if family == "granite" else {}
    make_causal_folder(family, place / "causal", tied=tied, chat_template=chats, **scaled)
    transformer = Transformer(
        str(place / "causal"),
        transformer_task="text-generation",
        processing_kwargs={"chat_template": {"chat_template": "reranker"}},
    )
    words = [word for word in (KINDS[kind].yes, KINDS[kind].no) if word]
    answers = LogitScore(*transformer.tokenizer.convert_tokens_to_ids(words))
    Peer(modules=[transformer, answers], device="cpu").save_pretrained(str(place / "published"))
    return place / "published"


def modular_folder(family: str, pooling: str, labels: int, place: Path) -> Path:
    """Body, pooling, dense layer, norm and the layer that writes the scores, as the ettin rerankers have them."""
    from sentence_transformers import CrossEncoder as Peer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    identity = torch.nn.Identity()
    steps = [
        Transformer(str(make_body_folder(family, place / "body"))),
        Pooling(32, pooling),
        Dense(32, 32, activation_function=torch.nn.GELU()),
        LayerNorm(32),
        Dense(32, labels, activation_function=identity, module_output_name="scores"),
    ]
    Peer(modules=steps, device="cpu").save_pretrained(str(place / "modular"))
    return place / "modular"


def travelled_by_modules(path: Path, place: Path) -> dict[str, float]:
    """Relative differences to what sentence-transformers computes: transformers alone does not know these folders."""
    from sentence_transformers import CrossEncoder as Peer

    exact, model = long_scores(Peer(str(path), device="cpu")), CrossEncoder(str(path))
    errors = {"halfrank": apart(long_scores(model), exact)}
    told = {"prompt": "Find what answers it: "}
    errors["told"] = apart(long_scores(model, **told), long_scores(Peer(str(path), device="cpu"), **told))
    model.save(str(place / "ours"))
    errors["ours again"] = apart(long_scores(CrossEncoder(str(place / "ours"))), exact)
    back = Peer(str(place / "ours"), device="cpu")
    errors["ours in peer"] = apart(long_scores(back), exact)
    back.save_pretrained(str(place / "theirs"))
    errors["theirs in halfrank"] = apart(long_scores(CrossEncoder(str(place / "theirs"))), exact)
    model.max_length = back.max_seq_length = int(model._scorer.pairs.encode(PAIRS).lengths.max()) - 5
    errors["cut"] = apart(long_scores(model), long_scores(back))
    for dtype in (torch.float16, torch.bfloat16):
        narrow = place / str(dtype).removeprefix("torch.")
        CrossEncoder(str(path), model_kwargs={"dtype": dtype}).save(str(narrow))
        theirs = Peer(str(narrow), device="cpu", model_kwargs={"dtype": torch.float32})
        errors[f"{narrow.name} folder"] = apart(
            long_scores(CrossEncoder(str(narrow), compute="float32")), long_scores(theirs)
        )
    return errors


def long_scores(model: Any, **others: str) -> np.ndarray:
    return table(model.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False, **others))


def real_yes_no(kind: str) -> dict[str, float]:
    """gemma-3-270m in float32: halfrank's score beside plain transformers' logits of the two answers."""
    model = CrossEncoder(str(GEMMA), template=kind)
    causal = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    tokenizer, template, answers = model.tokenizer, model._scorer.template, KINDS.get(kind)
    yes, no = (answers.yes, answers.no) if answers else ("yes", "no")
    wanted = []
    for pair in PAIRS:
        text = (
            tokenizer(*pair)
            if template is None
            else tokenizer(template.text(tokenizer, pair), add_special_tokens=False)
        )
        with torch.no_grad():
            logits = causal(input_ids=torch.tensor([text["input_ids"]])).logits[0, -1]
        wanted.append(float(logits[tokenizer.convert_tokens_to_ids(yes)]))
        if no is not None:
            wanted[-1] -= float(logits[tokenizer.convert_tokens_to_ids(no)])
    return {"halfrank": apart(long_scores(model), table(np.array(wanted)))}


def other_heads(quick: bool) -> dict[str, dict[str, float]]:
    """Rows of the table for heads that are not a classifier's own."""
    rows = {}
    for kind, family, tied in YES_NO[:3] if quick else YES_NO:
        with tempfile.TemporaryDirectory() as temporary:
            path = yes_no_folder(kind, family, Path(temporary), tied=tied)
            name = f"{kind} yes/no, {family}{'' if tied else ' untied'}"
            rows[name] = travelled_by_modules(path, Path(temporary))
    for family, pooling, labels in MODULAR[:3] if quick else MODULAR:
        with tempfile.TemporaryDirectory() as temporary:
            path = modular_folder(family, pooling, labels, Path(temporary))
            rows[f"modular {family} {pooling}, {labels}"] = travelled_by_modules(path, Path(temporary))
    if GEMMA.exists() and not quick:
        rows |= {f"gemma-3-270m {kind}": real_yes_no(kind) for kind in ("bge", "qwen3", "plain")}
    return rows


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("halfrank", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows: dict[str, dict[str, float]] = {}
    for name in FAMILIES[::2] if options.quick else FAMILIES:
        for labels in (1, 3):
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "model"
                model = built(name, labels)
                tokenizer = tokenizer_for("bert")
                types = getattr(model.config, "type_vocab_size", 2)
                if not isinstance(types, int) or types < 2:
                    tokenizer.model_input_names = ["input_ids", "attention_mask"]
                model.save_pretrained(path)
                tokenizer.save_pretrained(path)
                rows[f"{name}, {labels}"] = travelled(path, Path(temporary), foreign=True)
    for name, source in {"MiniLM": minilm(), "mpnet": MPNET}.items():
        if not source.exists() or (options.quick and name == "mpnet"):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            torch.manual_seed(options.seed)
            CrossEncoder(str(source), num_labels=1, max_length=64).save(f"{temporary}/model")
            rows[name] = travelled(Path(temporary) / "model", Path(temporary), foreign=True)
    rows |= other_heads(options.quick)
    for name, errors in rows.items():
        print(f"{name:18s} " + "  ".join(f"{kind} {error:.0e}" for kind, error in errors.items()))
    bars = {f"{name}: within {BAR:g}": max(errors.values()) <= BAR for name, errors in rows.items()}
    worst = max(max(errors.values()) for errors in rows.values())
    finish("interop", options.quick, {"rows": rows}, bars, f"largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
