"""Fine-tune MiniLM on judged passages of 2020, rerank BM25's top 100 of 2019: does 16 bits rank as float32 does?

Rows: BM25, the cosine of the untouched MiniLM, and three seeds each of float32, float16 and bfloat16. The bar is the
95 % interval of the per-query nDCG@10 difference to float32, seeds averaged, queries drawn with replacement.
"""

from __future__ import annotations

import warnings
from typing import Any

import ir_measures
import numpy as np
import torch
from ir_measures import nDCG

from common import DATA, arguments, finish, minilm, ranking_data
from halfrank.data.pairs import Group
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_groups
from halfrank.train.loop import train

Run = dict[str, dict[str, float]]  # query -> document -> score
METRIC = nDCG @ 10
GROUPS_PER_QUERY = 8  # a few queries have 60 relevant passages and would outweigh the others


def training_groups(seed: int) -> list[Group]:
    """Groups of one relevant passage (grade 2 or 3) and seven that are not (grade 0) for the same query."""
    draw = np.random.default_rng(seed)
    groups = []
    for line in ranking_data("dl20-judged.jsonl"):
        good = [doc["text"] for doc in line["docs"] if (doc["grade"] or 0) >= 2]
        bad = [doc["text"] for doc in line["docs"] if doc["grade"] == 0]
        for text in good[:GROUPS_PER_QUERY] if len(bad) >= 7 else []:
            others = [bad[i] for i in draw.choice(len(bad), 7, replace=False)]
            groups.append(Group(line["query"], (text, *others), (1.0, *[0.0] * 7), qid=line["qid"]))
    return groups


def per_query(run: Run, qrels: list[Any]) -> dict[str, float]:
    return {value.query_id: value.value for value in ir_measures.iter_calc([METRIC], qrels, run)}


def bm25(lines: list[dict[str, Any]]) -> Run:
    return {line["qid"]: {doc["docid"]: doc["bm25"] for doc in line["docs"]} for line in lines}


def cosine(lines: list[dict[str, Any]]) -> Run:
    """Mean-pooled embeddings of the untouched model, as it was trained to give them."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm()), device="cpu")
    run: Run = {}
    for line in lines:
        texts = [line["query"], *[doc["text"] for doc in line["docs"]]]
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        run[line["qid"]] = dict(
            zip([doc["docid"] for doc in line["docs"]], (vectors[1:] @ vectors[0]).tolist(), strict=True)
        )
    return run


def trained(dtype: torch.dtype, seed: int, lines: list[dict[str, Any]], limit: int | None) -> Run:
    torch.manual_seed(seed)
    options = folder.LoadOptions(num_labels=1, dtype=dtype, compute="float32", max_length=192)
    scorer = folder.load(minilm(), options)
    config = TrainConfig(batch_size=4, lr=5e-5, head_lr=1e-3, seed=seed, epochs=1, steps=limit)
    train(scorer, from_groups(training_groups(seed), scorer.pairs), config)
    return reranked(scorer, lines)


def reranked(scorer: Scorer, lines: list[dict[str, Any]]) -> Run:
    """The scores of all candidates of every query."""
    run: Run = {}
    for line in lines:
        scores = predict(scorer, [(line["query"], doc["text"]) for doc in line["docs"]]).values[:, 0]
        run[line["qid"]] = dict(zip([doc["docid"] for doc in line["docs"]], scores.tolist(), strict=True))
    return run


def judgements(lines: list[dict[str, Any]]) -> list[Any]:
    """What NIST's assessors said about the documents of these queries of 2019."""
    wanted = {line["qid"] for line in lines}
    return [q for q in ir_measures.read_trec_qrels(str(DATA / "dl19.qrels")) if q.query_id in wanted]


def interval(difference: np.ndarray) -> tuple[float, float]:
    draw = np.random.default_rng(0)
    means = difference[draw.integers(0, len(difference), (10_000, len(difference)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    lines = ranking_data("dl19-bm25-top100.jsonl")[: 6 if options.quick else None]
    qrels = judgements(lines)
    values = {"BM25": per_query(bm25(lines), qrels), "cosine of the untouched MiniLM": per_query(cosine(lines), qrels)}
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        runs = [per_query(trained(dtype, seed, lines, 10 if options.quick else None), qrels) for seed in seeds]
        for seed, run in zip(seeds, runs, strict=True):
            print(f"{name} seed {seed}: nDCG@10 {np.mean(list(run.values())):.4f}", flush=True)
        values[name] = {query: float(np.mean([run[query] for run in runs])) for query in runs[0]}
    queries = sorted(values["BM25"])
    bars, differences = {}, {}
    for name, row in values.items():
        print(f"{name:32s} nDCG@10 {np.mean([row[query] for query in queries]):.4f}")
    for name in ("float16", "bfloat16"):
        low, high = interval(np.array([values[name][query] - values["float32"][query] for query in queries]))
        differences[name] = {"low": low, "high": high}
        print(f"{name} - float32: 95 % interval [{low:+.4f}, {high:+.4f}]")
        bars[f"{name}: interval within 0.01"] = low >= -0.01 and high <= 0.01
    worst = max(abs(bound) for pair in differences.values() for bound in pair.values())
    result = {
        "per_query": values,
        "means": {n: float(np.mean(list(r.values()))) for n, r in values.items()},
        "intervals": differences,
    }
    finish("rerank_real", options.quick, result, bars, f"largest bound of the intervals {worst:.4f}")


if __name__ == "__main__":
    main()
