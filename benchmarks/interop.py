"""Folders travel: the same scores in halfrank, sentence-transformers and transformers, whoever saved the folder.

For each family a tiny random model, for MiniLM and (where it is cached) all-mpnet-base-v2 the real weights, with one
label and with three. Scores are logits; the bar is 1e-5 of the largest. 16-bit folders that halfrank saved are
compared with the same weights computed in float32 elsewhere.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from architectures import PAIRS, built, tokenizer_for
from common import arguments, finish, minilm
from halfrank import CrossEncoder

BAR = 1e-5
FAMILIES = [
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "modernbert", "ernie", "eurobert",
    "nomic_bert", "gte", "mpnet", "deberta-v2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2",
    "gemma3_text",
]  # fmt: skip
MPNET = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank" / "all-mpnet-base-v2"


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
    for name, errors in rows.items():
        print(f"{name:18s} " + "  ".join(f"{kind} {error:.0e}" for kind, error in errors.items()))
    bars = {f"{name}: within {BAR:g}": max(errors.values()) <= BAR for name, errors in rows.items()}
    worst = max(max(errors.values()) for errors in rows.values())
    finish("interop", options.quick, {"rows": rows}, bars, f"largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
