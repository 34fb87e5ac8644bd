"""Packed equals padded, in float32, for each packed family: scores, gradients, and a user's own padded call.

And for every architecture that transformers registers for sequence classification: packed right, padded right or
refused (`architectures.py`); the table goes to docs/families.md.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from architectures import page, survey
from common import ROOT, arguments, finish, minilm, ranking_data

sys.path.insert(0, str(ROOT / "tests"))
from halfrank.data.packing import pack
from halfrank.model import folder
from tiny import PAIRS, make_folder

FAMILIES = ["bert", "roberta", "xlm-roberta", "llama"]
BAR = 1e-5
LEAST_RIGHT = 85


def gradient(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    logits.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(path: Path, pairs: list[tuple[str, str]]) -> dict[str, float]:
    scorer = folder.load(path, folder.LoadOptions(num_labels=1, max_length=64))
    if not scorer.packed:
        raise SystemExit(f"{path.name} is not packed")
    batch = pack(scorer.pairs.encode(pairs), range(len(pairs)))
    queries, documents = zip(*(pairs[row] for row in batch.rows), strict=True)
    inputs = scorer.tokenizer(
        list(queries), list(documents), padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    packed = scorer.logits(batch)
    ours = gradient(scorer.model, packed)
    padded = scorer.model(**inputs).logits
    theirs = gradient(scorer.model, padded)
    with torch.no_grad():
        scorer.model.set_attn_implementation("eager")
        reference = scorer.model(**inputs).logits
    return {
        "scores": float((packed - padded).abs().max() / padded.abs().max()),
        "gradients": float((ours - theirs).abs().max() / theirs.abs().max()),
        "own_padded_call": float((padded - reference).abs().max() / reference.abs().max()),
    }


def main() -> None:
    options = arguments(__doc__ or "")
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        for family in FAMILIES:
            rows[family] = compare(make_folder(family, Path(temporary) / family), PAIRS)
    lines = ranking_data("dl20-judged.jsonl")[:4]
    rows["MiniLM"] = compare(minilm(), [(line["query"], doc["text"]) for line in lines for doc in line["docs"][:6]])
    for name, errors in rows.items():
        print(f"{name:12s}" + "".join(f"  {key} {value:.1e}" for key, value in errors.items()))
    worst = max(max(errors.values()) for errors in rows.values())
    bars = {f"{name}: largest relative difference at most {BAR:g}": max(e.values()) <= BAR for name, e in rows.items()}
    architectures = survey()
    right, wrong = (sum(getattr(row, kind) for row in architectures) for kind in ("right", "wrong"))
    (ROOT / "docs" / "families.md").write_text(page(architectures), encoding="utf-8")
    for row in architectures:
        if not row.right:
            print(f"{row.name:20s} {row.path:10s} {row.scores:.1e} {row.gradients:.1e} {row.reason}")
    bars |= {f"architectures right: {right}, at least {LEAST_RIGHT}": right >= LEAST_RIGHT}
    bars |= {f"architectures wrong: {wrong}, at most 0": wrong == 0}
    result = {"rows": rows, "architectures": [vars(row) | {"right": row.right} for row in architectures]}
    finish(
        "packing",
        options.quick,
        result,
        bars,
        f"worst relative difference {worst:.2e}; {right} architectures right, {wrong} wrong",
    )


if __name__ == "__main__":
    main()
