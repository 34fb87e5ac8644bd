"""LoRA: trained, saved, read by halfrank, peft and sentence-transformers, merged and not: one score for all.

Beside it what sentence-transformers' own way gives back (their issues 3384 and 3916): a score head that is not among
the saved adapters is drawn anew when they are read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoTokenizer

from common import ROOT, arguments, finish, minilm, ranking_data
from halfrank.data.pairs import Pair
from halfrank.export import export
from halfrank.model import adapters, folder
from halfrank.predict import predict
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train

sys.path.insert(0, str(ROOT / "tests"))
from tiny import make_folder

BAR, RANK, LENGTH = 1e-5, 8, 64
LOGITS = torch.nn.Identity()
Texts = list[tuple[str, str]]


def ours(place: Path, texts: Texts) -> np.ndarray:
    options = folder.LoadOptions(compute="float32", max_length=LENGTH)
    return predict(folder.load(place, options), texts, activation=LOGITS).values[:, 0]


def in_peft(place: Path, texts: Texts) -> np.ndarray:
    model = AutoPeftModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    with torch.no_grad():
        rows = [
            model(**tokenizer(*pair, truncation="longest_first", max_length=LENGTH, return_tensors="pt")).logits
            for pair in texts
        ]
    return torch.cat(rows).numpy()[:, 0]


def in_peer(place: Path, texts: Texts) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(str(place), device="cpu", max_length=LENGTH, model_kwargs={"dtype": torch.float32})
    return peer.predict(texts, activation_fn=LOGITS, show_progress_bar=False)


def tuned(base: Path, pairs: list[Pair], steps: int, *, lora: bool, dtype: torch.dtype, out: Path) -> list[float]:
    """Losses of a run, of adapters or of all weights."""
    torch.manual_seed(0)
    options = folder.LoadOptions(compute="float32", dtype=dtype, num_labels=1, max_length=LENGTH)
    scorer = folder.load(base, options)
    if lora:
        adapters.add(scorer, adapters.settings(scorer.model, RANK))
    config = TrainConfig(steps=steps, batch_size=16, lr=5e-4 if lora else 5e-5, head_lr=5e-3)
    return train(scorer, from_pairs(pairs, scorer.pairs), config, out=out).losses


def peers_way(base: Path, texts: Texts, place: Path) -> float:
    """How far sentence-transformers' scores are from its own after it saved and read a model with adapters."""
    from sentence_transformers import CrossEncoder

    torch.manual_seed(1)
    model = CrossEncoder(str(base), num_labels=1, device="cpu", max_length=LENGTH, model_kwargs={"dtype": "float32"})
    model.add_adapter(LoraConfig(r=RANK, target_modules="all-linear", task_type="SEQ_CLS"))
    before = model.predict(texts, activation_fn=LOGITS, show_progress_bar=False)
    model.save_pretrained(str(place))
    torch.manual_seed(2)
    return float(np.abs(in_peer(place, texts) - before).max())


def main() -> None:
    options = arguments(__doc__ or "")
    lines = ranking_data("dl20-judged.jsonl")[: 4 if options.quick else 16]
    pairs = [Pair(g["query"], doc["text"], float(doc["grade"] >= 2)) for g in lines for doc in g["docs"][:16]]
    texts = [(pair.query, pair.document) for pair in pairs[:: max(len(pairs) // 24, 1)]]
    steps = 24 if options.quick else 120
    rows: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        models = {"MiniLM": minilm()} | {
            name: make_folder(name, place / name) for name in ("bert", "deberta-v2", "mpnet", "llama")
        }
        for name, base in models.items():
            for dtype in (torch.float16, torch.float32) if name == "MiniLM" else (torch.float16,):
                title = f"{name} {str(dtype).removeprefix('torch.')}"
                source = base
                if dtype is torch.float16:  # others read the base as it is stored: 16 bits for all
                    source = place / f"{name}-float16"
                    scorer = folder.load(base, folder.LoadOptions(num_labels=1))
                    scorer.untrained_head = False
                    folder.save(scorer, source, dtype=torch.float16)
                saved, merged = place / f"{title} adapters", place / f"{title} merged"
                losses = tuned(source, pairs, steps, lora=True, dtype=dtype, out=saved)
                export(saved, merged, dtype="float32")
                wanted = ours(saved, texts)
                found = {
                    "merged": ours(merged, texts), "peft": in_peft(saved, texts),
                    "sentence-transformers, merged": in_peer(merged, texts),
                }  # fmt: skip
                if name != "llama":  # its base has no pad token, which sentence-transformers asks of the base
                    found["sentence-transformers"] = in_peer(saved, texts)
                apart = {reader: float(np.abs(scores - wanted).max()) for reader, scores in found.items()}
                rows[title] = {"apart": apart, "losses": losses, "spread": float(np.ptp(wanted))}
                bars[f"{title}: all readers within {BAR:g}: {max(apart.values()):.1e}"] = max(apart.values()) <= BAR
                print(f"{title:20s} " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()), flush=True)
        full = tuned(minilm(), pairs, steps, lora=False, dtype=torch.float16, out=place / "full")
        ends = {"LoRA": np.mean(rows["MiniLM float16"]["losses"][-8:]), "all weights": np.mean(full[-8:])}
        start = float(np.mean(full[:4]))
        print(f"MiniLM, loss at first {start:.3f}, last of {steps} steps: LoRA {ends['LoRA']:.3f}, all weights "
              f"{ends['all weights']:.3f}")  # fmt: skip
        bars["LoRA learns: its loss falls at least half as far as that of all weights"] = bool(
            start - ends["LoRA"] >= 0.5 * (start - ends["all weights"]) > 0
        )
        theirs = peers_way(minilm(), texts, place / "theirs")
        print(f"sentence-transformers' own adapters of MiniLM, saved and read: {theirs:.2e} from its own scores")
    rows["sentence-transformers' own way"] = theirs
    worst = max(max(row["apart"].values()) for row in rows.values() if isinstance(row, dict))
    finish(
        "lora", options.quick, {"rows": rows}, bars, f"adapters of {len(models)} models: largest difference {worst:.1e}"
    )


if __name__ == "__main__":
    main()
