"""Bar 6: 300 steps in which one batch in 20 is poisoned end where the clean run ends, with every poisoned pair listed.

MiniLM learns to rerank judged passages of 2020 and is measured on those of 2019. Poison: labels that are NaN or
infinite, pairs of thousands of tokens, tokens whose embedding is infinite in the table or comes out so in the run.
The bar is the spread of the clean run over its seeds; clean and poisoned runs of a seed see the same batches. A third
run has never had the pairs that were poisoned: what differs from it is recovery's doing, what does not is their loss.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import arguments, finish, minilm, ranking_data
from halfrank.data.pairs import Group
from halfrank.data.tokens import PairTokenizer
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, from_groups
from halfrank.train.loop import train
from rerank_real import judgements, per_query, reranked

ONE_IN = 20
CLEAN, POISONED, WITHOUT = "clean", "poisoned", "clean, without these pairs"
KINDS = ("NaN label", "infinite label", "thousands of tokens", "infinite embedding", "embedding infinite in the run")
STORED, PASSING = "[unused7]", "[unused8]"  # tokens that no text holds


@dataclass(frozen=True)
class Setting:
    """The size of one form of the benchmark."""

    layers: int
    steps: int
    groups: int  # of a batch
    documents: int  # of a group
    tokens: int
    queries: int | None
    clean: int  # seeds of the clean run, whose spread is the bar
    seeds: int  # seeds that are poisoned as well
    formats: tuple[str, ...]


QUICK = Setting(2, 300, 2, 3, 40, 20, 2, 1, ("emulated-float16",))
FULL = Setting(3, 300, 4, 4, 96, None, 5, 3, ("emulated-float16", "emulated-bfloat16"))


def groups_of(setting: Setting, seed: int) -> list[Group]:
    """A passage of grade 2 or 3 and others of grade 0 for the same query, as many groups as the run takes."""
    draw = np.random.default_rng([seed, 1])
    lines = []
    for line in ranking_data("dl20-judged.jsonl"):
        good = [doc["text"] for doc in line["docs"] if (doc["grade"] or 0) >= 2]
        bad = [doc["text"] for doc in line["docs"] if doc["grade"] == 0]
        if good and len(bad) >= setting.documents - 1:
            lines.append((line["query"], good, bad))
    groups = []
    for number in range(setting.steps * setting.groups):
        query, good, bad = lines[int(draw.integers(len(lines)))]
        others = [bad[i] for i in draw.choice(len(bad), setting.documents - 1, replace=False)]
        documents = (good[int(draw.integers(len(good)))], *others)
        groups.append(Group(query, documents, (1.0, *[0.0] * len(others)), f"dl20 group {number}"))
    return groups


def poisoned(groups: list[Group], setting: Setting, seed: int) -> tuple[list[Group], dict[int, str]]:
    """The same groups with one batch in 20 spoilt, and what was done to each pair (its row)."""
    draw = np.random.default_rng([seed, 2])
    size = setting.documents
    spoilt: dict[int, str] = {}
    result = list(groups)
    for number, batch in enumerate(range(0, setting.steps, ONE_IN)):
        # Any batch of this stretch of 20, and from one of its pairs to all of them.
        chosen = batch + int(draw.integers(min(ONE_IN, setting.steps - batch)))
        rows = np.arange(chosen * setting.groups * size, (chosen + 1) * setting.groups * size)
        for row in draw.choice(rows, int(draw.integers(1, len(rows) + 1)), replace=False).tolist():
            kind = KINDS[number % len(KINDS)]
            spoilt[row] = kind
            group, place = result[row // size], row % size
            documents, grades = list(group.documents), list(group.grades)
            if kind == "thousands of tokens":
                documents[place] = f"{documents[place]} " * 100
            elif kind.startswith(("infinite embedding", "embedding")):
                documents[place] = f"{STORED if kind.startswith('infinite') else PASSING} {documents[place]}"
            else:
                grades[place] = float("nan") if kind == "NaN label" else float("inf")
            result[row // size] = replace(group, documents=tuple(documents), grades=tuple(grades))
    return result, spoilt


def examples_of(groups: list[Group], scorer: Scorer, spoilt: dict[int, str]) -> Examples:
    """Tokens of all groups; those that are to be too long are not cut."""
    whole = PairTokenizer(scorer.tokenizer, 100_000)
    texts = [text for group in groups for text in group.texts]
    cut = scorer.pairs.encode(texts)
    long = {row for row, kind in spoilt.items() if kind == "thousands of tokens"}
    examples = from_groups(groups, scorer.pairs)
    if not long:
        return examples
    ids, types, lengths = [], [], []
    for row in range(len(cut)):
        one = whole.encode([texts[row]]) if row in long else None
        source, part = (one, slice(None)) if one is not None else (cut, slice(cut.offsets[row], cut.offsets[row + 1]))
        ids.append(source.input_ids[part])
        types.append(source.token_type_ids[part] if source.token_type_ids is not None else np.zeros(0, np.int8))
        lengths.append(len(ids[-1]))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = replace(cut, input_ids=np.concatenate(ids), token_type_ids=np.concatenate(types), offsets=offsets)
    return replace(examples, tokens=tokens)


@contextmanager
def broken_memory(scorer: Scorer) -> Iterator[None]:
    """One token's row is infinite in the table, another one's comes out infinite whenever it is read."""
    table = scorer.model.get_input_embeddings()
    stored, passing = (scorer.tokenizer.convert_tokens_to_ids(token) for token in (STORED, PASSING))
    with torch.no_grad():
        table.weight[stored] = torch.inf

    def spoil(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((args[0] == passing)[..., None], torch.inf, output)

    handle = table.register_forward_hook(spoil)
    yield
    handle.remove()


def trained_bits(scorer: Scorer) -> str:
    """A hash of all weights but the token table, which is frozen here and holds the poison."""
    found = hashlib.sha256()
    table = scorer.model.get_input_embeddings().weight
    for name, parameter in scorer.model.named_parameters():
        if parameter is not table:
            found.update(name.encode())
            found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def outcome(
    setting: Setting, compute: str, seed: int, lines: list[dict[str, Any]], qrels: list[Any], *, form: str
) -> dict[str, Any]:
    """Train on clean groups, on poisoned ones or on those without what the poison would spoil, and rerank."""
    torch.manual_seed(seed)
    dtype = torch.float32 if compute == "float32" else getattr(torch, compute.removeprefix("emulated-"))
    options = folder.LoadOptions(
        num_labels=1, dtype=dtype, compute=compute, max_length=setting.tokens,
        # Without dropout the two runs of a seed differ by the poison alone, and seeds by their groups and heads.
        config={
            "num_hidden_layers": setting.layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
    )  # fmt: skip
    scorer = folder.load(minilm(), options)
    scorer.tokenizer.add_special_tokens({"additional_special_tokens": [STORED, PASSING]})  # as words of their own
    scorer.max_length = setting.tokens
    groups = groups_of(setting, seed)
    dirty, spoilt = poisoned(groups, setting, seed)
    config = TrainConfig(
        batch_size=setting.groups, lr=1e-4, head_lr=1e-3, seed=seed, freeze_embeddings=True, max_tokens=16384
    )
    plan = [[*range(n, n + setting.groups)] for n in range(0, len(groups), setting.groups)]
    examples = examples_of(dirty, scorer, spoilt) if form == POISONED else from_groups(groups, scorer.pairs)
    examples = examples.without(spoilt) if form == WITHOUT else examples
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, broken_memory(scorer) if form == POISONED else nullcontext():
        result = train(scorer, examples, config, plan=lambda epoch: plan, out=Path(place) / "out")
    seconds = time.perf_counter() - started
    run = reranked(scorer, lines)
    listed = {record["row"] for record in result.recovery.quarantined}
    spoilt = spoilt if form == POISONED else {}
    return {
        "seed": seed, "compute": compute, "form": form, "seconds": seconds, "steps": result.steps,
        "ndcg": float(np.mean(list(per_query(run, qrels).values()))), "bits": trained_bits(scorer),
        "poisoned": len(spoilt), "listed": len(listed),
        "missed": sorted(spoilt.keys() - listed), "wrongly": sorted(listed - spoilt.keys()),
        "finite": all(bool(p.isfinite().all()) for p in scorer.model.parameters()),
        "recovery": str(result.recovery), "counts": result.recovery.as_json(),
    }  # fmt: skip


def said(key: tuple[str, int, str], row: dict[str, Any]) -> dict[str, Any]:
    """Print a finished run and pass it on."""
    compute, seed, form = key
    print(
        f"{compute} seed {seed} {form}: nDCG@10 {row['ndcg']:.4f}, {row['seconds']:.0f} s, weights {row['bits']}, "
        f"{row['listed']} of {row['poisoned']} poisoned pairs listed. {row['recovery']}",
        flush=True,
    )
    return row


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("halfrank").setLevel(logging.ERROR)
    options = arguments(__doc__ or "")
    setting = QUICK if options.quick else FULL
    lines = ranking_data("dl19-bm25-top100.jsonl")[: setting.queries]
    qrels = judgements(lines)
    seeds = range(options.seed, options.seed + setting.clean)
    poisoned_seeds = seeds[: setting.seeds]
    asked = [(compute, seed, CLEAN) for compute in setting.formats for seed in seeds]
    asked += [(compute, seed, POISONED) for compute in setting.formats for seed in poisoned_seeds]
    asked += [(setting.formats[0], seed, WITHOUT) for seed in poisoned_seeds]
    torch.set_num_threads(1)  # a run a core
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        jobs = {key: pool.submit(outcome, setting, key[0], key[1], lines, qrels, form=key[2]) for key in asked}
        rows = {key: said(key, job.result()) for key, job in jobs.items()}
    bars: dict[str, bool] = {}
    for compute in setting.formats:
        clean = {seed: rows[compute, seed, CLEAN]["ndcg"] for seed in seeds}
        done = [row for (name, _, form), row in rows.items() if name == compute and form == POISONED]
        spread = max(clean.values()) - min(clean.values())
        worst = max(abs(row["ndcg"] - clean[row["seed"]]) for row in done)
        listed = not any(row["missed"] or row["wrongly"] for row in done)
        bars |= {
            f"{compute}: nDCG@10 within the seeds' spread ({worst:.4f} of {spread:.4f})": worst <= spread,
            f"{compute}: every poisoned pair is listed, and no other": listed,
            f"{compute}: {setting.steps} steps, finite weights": all(
                r["finite"] and r["steps"] == setting.steps for r in done
            ),
        }
    pairs = [(rows[name, seed, POISONED], row) for (name, seed, form), row in rows.items() if form == WITHOUT]
    bars["the same bits as a clean run that never had these pairs"] = all(a["bits"] == b["bits"] for a, b in pairs)
    found = list(rows.values())
    figure = f"{sum(r['listed'] for r in found)} of {sum(r['poisoned'] for r in found)} poisoned pairs listed"
    finish("poison", options.quick, {"rows": found, "seed": options.seed}, bars, figure)


if __name__ == "__main__":
    main()
