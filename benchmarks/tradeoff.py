"""Speed, nDCG@10 and peak memory side by side: MiniLM trained and judged by each library in each format.

All start from one folder, whose head is fitted to grades, and see the same batches of judged passages of 2020; then
they rerank BM25's candidates of 2019, each in a process of its own. The time is that of training, tokenizing included:
the processor's, which other work on the machine does not lengthen much, and the clock's. The memory is the largest
resident set of the whole process. `benchmarks/plot.py` draws the result.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import arguments, finish, finished, ranking_data
from predict_speed import fitted
from train_speed import BATCH, passages, train_ours, train_peer

FASTER, NEAR = 1.5, 0.02  # times the peer's float32; nDCG@10 from it
LR = 5e-5
SPEED = "train_pairs_per_processor_second"
Timed = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """One training and its judgement."""

    model: str
    seed: int
    steps: int = 300
    tokens: int = 192  # of a pair
    queries: int = 43
    candidates: int = 100  # of each query


def ways() -> list[tuple[str, str, str]]:
    """(library, weights, products); 16-bit products where the processor has them."""
    from halfrank.precision import detect

    found = [("sentence-transformers", "float32", "float32")]
    found += [("halfrank", weights, "float32") for weights in ("float32", "float16", "bfloat16")]
    if detect("cpu").bfloat16_products:
        found += [("sentence-transformers", "float32", "bfloat16"), ("halfrank", "bfloat16", "bfloat16")]
    return found


def name_of(library: str, weights: str, products: str) -> str:
    return f"{library} {weights}" + (f", products in {products}" if products != "float32" else "")


def halfrank(setting: Setting, weights: str, products: str) -> tuple[Timed, Any]:
    """Seconds of training, by the clock and of the processor, and what scores pairs afterwards."""
    from halfrank.model import folder
    from halfrank.predict import predict

    options = folder.LoadOptions(dtype=getattr(torch, weights), compute=products, max_length=setting.tokens)
    scorer = folder.load(setting.model, options)
    pairs = passages(setting.seed)[: setting.steps * BATCH]
    worked = time.process_time()
    seconds = train_ours(scorer, pairs, lr=LR, seed=setting.seed)
    return (seconds, time.process_time() - worked), lambda pairs: predict(scorer, pairs).values[:, 0]


def sentence_transformers(setting: Setting, weights: str, products: str) -> tuple[Timed, Any]:
    """The same by sentence-transformers, whose 16-bit products come with float32 weights."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(setting.model, max_length=setting.tokens, device="cpu")
    assert weights == str(next(model.parameters()).dtype).removeprefix("torch.")
    pairs = passages(setting.seed)[: setting.steps * BATCH]
    worked = time.process_time()
    seconds = train_peer(model, pairs, lr=LR, bf16=products == "bfloat16", seed=setting.seed)
    worked = time.process_time() - worked

    def scores(texts: list[tuple[str, str]]) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16, enabled=products == "bfloat16"):
            return np.asarray(model.predict(texts, batch_size=32, show_progress_bar=False))

    return (seconds, worked), scores


def judged(setting: Setting, scores: Callable[[list[tuple[str, str]]], Any]) -> tuple[float, float]:
    """nDCG@10 over BM25's candidates of 2019, and pairs scored a second."""
    from rerank_real import judgements, per_query

    lines = ranking_data("dl19-bm25-top100.jsonl")[: setting.queries]
    lines = [{**line, "docs": line["docs"][: setting.candidates]} for line in lines]
    pairs = [(line["query"], doc["text"]) for line in lines for doc in line["docs"]]
    started = time.perf_counter()
    found = iter(scores(pairs).tolist())
    seconds = time.perf_counter() - started
    ranking = {line["qid"]: {doc["docid"]: next(found) for doc in line["docs"]} for line in lines}
    return float(np.mean(list(per_query(ranking, judgements(lines)).values()))), len(pairs) / seconds


def one(setting: Setting, library: str, weights: str, products: str) -> dict[str, float]:
    """Train and judge in this process."""
    run = halfrank if library == "halfrank" else sentence_transformers
    run(replace(setting, steps=1), weights, products)  # imports what it needs, and compiles
    torch.manual_seed(setting.seed)
    (seconds, worked), scores = run(setting, weights, products)
    ndcg, scored = judged(setting, scores)
    return {
        "train_pairs_per_second": setting.steps * BATCH / seconds,
        "train_pairs_per_processor_second": setting.steps * BATCH / worked,
        "score_pairs_per_second": scored,
        "ndcg": ndcg,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--one"]:
        asked = json.loads(sys.argv[2])
        print(json.dumps(one(Setting(**asked["setting"]), *asked["way"])))
        return
    options = arguments(__doc__ or "")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        model = str(fitted(Path(temporary) / "model", options.seed, 150 if options.quick else 300))
        setting = Setting(model, options.seed)
        if options.quick:
            setting = Setting(model, options.seed, steps=5, queries=6, candidates=20)
        for way in ways():
            asked = json.dumps({"setting": asdict(setting), "way": way})
            done = finished([sys.executable, __file__, "--one", asked])
            row = json.loads(done.said.splitlines()[-1]) | {"peak_mib": done.peak_mib}
            rows[name_of(*way)] = row
            print(
                f"{name_of(*way):58s} trains {row[SPEED]:6.1f} pairs a processor second, scores "
                f"{row['score_pairs_per_second']:6.1f}, nDCG@10 {row['ndcg']:.4f}, {row['peak_mib']:6.0f} MiB",
                flush=True,
            )
    peer = rows["sentence-transformers float32"]
    bars: dict[str, bool] = {}
    for name in (name for name in rows if name.startswith("halfrank")):
        row = rows[name]
        faster = row[SPEED] / peer[SPEED]
        bars[f"{name}: trains at least {FASTER:g} times as fast ({faster:.2f})"] = faster >= FASTER
        away = row["ndcg"] - peer["ndcg"]
        bars[f"{name}: nDCG@10 at most {NEAR:g} below ({away:+.4f})"] = away >= -NEAR
        less = row["peak_mib"] / peer["peak_mib"]
        bars[f"{name}: no more memory ({less:.2f})"] = less <= 1
    figure = "; ".join(f"{name} {row[SPEED]:.1f} pairs a processor second" for name, row in rows.items())
    facts = {"steps": setting.steps, "tokens": setting.tokens, "queries": setting.queries}
    finish("tradeoff", options.quick, facts | {"candidates": setting.candidates, "rows": rows}, bars, figure)


if __name__ == "__main__":
    main()
