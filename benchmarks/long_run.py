"""Do 16 bits stay with float32 over a long run? Distance moved (ratio, cosine) and nDCG@10 on held-out queries.

MiniLM learns to rerank judged passages of 2020, by the whole training loop with dropout, and reranks BM25's candidates
of 2019. 300 steps, three seeds, float32 / float16 / bfloat16 with gradients consumed as they arrive, and 1,000 steps of
float16 in which no step is skipped, beside a second float32 run that starts one unit of the last place away. All
formats start from the same weights: those that float16 and bfloat16 both hold.
Finished runs lie in out/long_run: an interrupted benchmark goes on with the next one.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from common import ROOT, arguments, finish, minilm, ranking_data
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.precision import Facts, choose, detect
from halfrank.train.config import Limits, TrainConfig
from halfrank.train.examples import from_groups
from halfrank.train.loop import train
from parity import Moved, compared
from poison import groups_of
from rerank_real import judgements, per_query, reranked

KEPT = ROOT / "out" / "long_run"
RATIO, COSINE, NDCG = 0.005, 0.998, 0.01
NUDGED = "float32 nudged"  # a second float32 run that starts one unit of the last place away: what chaos alone does


@dataclass(frozen=True)
class Setting:
    """One course of training; each scheme goes through it with the same batches."""

    schemes: tuple[str, ...]
    steps: int
    seed: int
    layers: int = 6
    groups: int = 2  # of a batch
    documents: int = 4  # of a group
    tokens: int = 32
    candidates: int = 30  # of each held-out query
    queries: int | None = None
    release: bool = True
    undisturbed: bool = False  # no step is skipped: a low first loss scale, no loss is called a spike


def settings_of(quick: bool, seed: int) -> list[Setting]:
    three = ("float32", "float16", "bfloat16")
    if quick:
        return [Setting(three, 40, seed, layers=3, tokens=32, candidates=20, queries=12)]
    long = Setting(("float32", "float16", NUDGED), 1000, seed, release=False, undisturbed=True)
    return [*(Setting(three, 300, seed + number) for number in range(3)), long]


def start(setting: Setting, scheme: str) -> Scorer:
    """MiniLM with weights that both 16-bit formats hold, stored by `scheme`."""
    torch.manual_seed(setting.seed)
    options = folder.LoadOptions(
        num_labels=1, dtype=torch.float32, max_length=setting.tokens, config={"num_hidden_layers": setting.layers}
    )
    scorer = folder.load(minilm(), options)
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.copy_(parameter.bfloat16().half().float() * (1 + 2**-23 if scheme == NUDGED else 1))
    facts = Facts(scorer.model.num_parameters(), torch.float32, detect("cpu"))
    scorer.adopt(choose(facts, scheme=scheme.removesuffix(" nudged"), compute="float32"))
    return scorer


def run(setting: Setting, scheme: str, lines: list[dict[str, Any]]) -> tuple[dict[str, Any], Moved]:
    """Train and rerank: what came out, and how far each weight went."""
    scorer = start(setting, scheme)
    before = {name: p.detach().float().clone() for name, p in scorer.model.named_parameters()}
    groups = groups_of(setting, setting.seed)  # type: ignore[arg-type]
    config = TrainConfig(
        batch_size=setting.groups, lr=5e-5, head_lr=1e-3, seed=setting.seed,
        release_gradients=setting.release and not scheme.startswith("float32"), watch_every=0,
        loss_scale=1024.0 if setting.undisturbed else 2.0**16,
        limits=Limits(spike=0.0) if setting.undisturbed else Limits(),
    )  # fmt: skip
    started = time.perf_counter()
    result = train(scorer, from_groups(groups, scorer.pairs), config)
    seconds = time.perf_counter() - started
    optimizer = result.optimizer
    assert isinstance(optimizer, AdamW)
    distance = {name: optimizer.exact(p) - before[name] for name, p in scorer.model.named_parameters()}
    values = per_query(reranked(scorer, lines), judgements(lines))
    tail = result.losses[-len(result.losses) // 4 :]
    row = {
        "scheme": scheme, "steps": result.steps, "seed": setting.seed, "skipped": result.skipped,
        "released": config.release_gradients, "ndcg": float(np.mean(list(values.values()))),
        "loss": sum(tail) / len(tail), "seconds": seconds,
        "finite": all(bool(p.isfinite().all()) for p in scorer.model.parameters()),
    }  # fmt: skip
    return row, distance


def kept_or_run(setting: Setting, scheme: str, lines: list[dict[str, Any]]) -> tuple[dict[str, Any], Moved]:
    """The run as it was kept, else done now and kept."""
    name = "-".join(str(value) for value in asdict(setting).values() if not isinstance(value, tuple))
    place = KEPT / f"{scheme.replace(' ', '-')}-{name}"
    row_file, distance_file = place.with_suffix(".json"), place.with_suffix(".safetensors")
    if not row_file.exists():
        row, distance = run(setting, scheme, lines)
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file(distance, distance_file)
        row_file.write_text(json.dumps(row), encoding="utf-8")  # last: whoever finds it finds the distance as well
    distance = {name: moved.double() for name, moved in load_file(distance_file).items()}
    return json.loads(row_file.read_text(encoding="utf-8")), distance


def outcome(setting: Setting) -> list[dict[str, Any]]:
    """Every scheme of a setting beside float32."""
    lines = ranking_data("dl19-bm25-top100.jsonl")[: setting.queries]
    lines = [{**line, "docs": line["docs"][: setting.candidates]} for line in lines]
    reference: Moved = {}
    rows: list[dict[str, Any]] = []
    for scheme in setting.schemes:
        row, distance = kept_or_run(setting, scheme, lines)
        if scheme == "float32":
            reference = distance
            row["distance"] = math.sqrt(sum(float(moved.square().sum()) for moved in distance.values()))
        else:
            row |= compared(distance, reference)
            row["ndcg_difference"] = row["ndcg"] - rows[0]["ndcg"]
        rows.append(row)
        print(shown(row), flush=True)
    return rows


def shown(row: dict[str, Any]) -> str:
    way = ", released" if row["released"] else ""
    beside = "   ".join(
        f"{kind} {row[kind]['ratio']:.4f} / {row[kind]['cosine']:.5f}"
        for kind in ("all", "matrices", "embeddings")
        if kind in row
    )
    return (
        f"{row['steps']:5d} steps, seed {row['seed']}, {row['scheme'] + way:19s} {beside or 'the reference':64s} "
        f"loss {row['loss']:.4f}  nDCG@10 {row['ndcg']:.4f}  {row['seconds']:.0f} s"
    )


def bars_of(rows: list[dict[str, Any]]) -> dict[str, bool]:
    bars = {}
    for row in rows:
        at = f"{row['scheme']}, {row['steps']} steps, seed {row['seed']}"
        bars[f"{at}: finite weights, fewer than 1 % of the steps skipped"] = (
            row["finite"] and row["skipped"] < 0.01 * row["steps"]
        )
        if "all" in row and row["scheme"] != NUDGED:
            near = abs(row["all"]["ratio"] - 1) <= RATIO and row["all"]["cosine"] >= COSINE
            bars[f"{at}: ratio within {RATIO:.1%}, cosine at least {COSINE}"] = near
            bars[f"{at}: nDCG@10 within {NDCG} of float32"] = abs(row["ndcg_difference"]) <= NDCG
    return bars


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("halfrank").setLevel(logging.ERROR)
    options = arguments(__doc__ or "")
    settings = settings_of(options.quick, options.seed)
    rows = [row for setting in settings for row in outcome(setting)]
    narrow = [row for row in rows if "all" in row and row["scheme"] != NUDGED]
    far = max(abs(row["all"]["ratio"] - 1) for row in narrow)
    worst = min(row["all"]["cosine"] for row in narrow)
    ranked = max(abs(row["ndcg_difference"]) for row in narrow)
    result = {"settings": [asdict(setting) for setting in settings], "rows": rows}
    figure = f"worst ratio off by {far:.4f}, worst cosine {worst:.5f}, largest difference of nDCG@10 {ranked:.4f}"
    finish("long_run", options.quick, result, bars_of(rows), figure)


if __name__ == "__main__":
    main()
