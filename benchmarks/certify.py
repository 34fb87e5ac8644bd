"""Certificates: damaged copies refused with the right reason, sound ones passed, numbers of other tools, and the price.

Copies are damaged in the ways that files and conversions go wrong. Sound copies are made here, by transformers and by
sentence-transformers, of MiniLM, mpnet (where it is cached) and tiny families. nDCG@10, Kendall's tau and the overlap
are compared with ir-measures and scipy on scores predicted apart. The price is that of a whole `certify`, against
scoring the pairs once per format.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ir_measures
import numpy as np
import torch
import transformers
from ir_measures import nDCG
from safetensors.torch import load_file, save_file
from scipy import stats

from common import ROOT, arguments, finish, minilm, ranking_data
from halfrank import CrossEncoder
from halfrank.certify.compare import certify
from halfrank.data import probes
from halfrank.data.pairs import Group
from halfrank.export import export
from halfrank.model import folder

sys.path.insert(0, str(ROOT / "tests"))
from tiny import SIZES, make_folder

MPNET = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank" / "all-mpnet-base-v2"
GROUPS = probes.groups()
PRICE = 2.5
LAYER, WORDS = "bert.encoder.layer.1.", "bert.embeddings.word_embeddings.weight"


class Damage(NamedTuple):
    """A way to break a copy, what it is broken in, and the cause that the certificate has to name first."""

    name: str
    base: str
    cause: str
    apply: Callable[[Path], None]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"}
        )

    return apply


def settings(file: str, **values: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(content | values))

    return apply


def rounded_to(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def round_(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float()
        step = torch.exp2(torch.floor(torch.log2(wide.abs().clamp(min=2**-24))) - bits)
        return (torch.round(wide / step) * step).to(tensor.dtype)

    return round_


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: how(tensors[name].clone())}))


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change_one(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change_one


def swap(first: str, second: str) -> Callable[[Path], None]:
    return weights(lambda t: t.update({first: t[second], second: t[first]}))


def cut_vocabulary(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(list(vocabulary.items())[: len(vocabulary) - 40])
    (path / "tokenizer.json").write_text(json.dumps(content))


def keep_case(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text()) | {"normalizer": None}
    (path / "tokenizer.json").write_text(json.dumps(content))


def cut_file(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) * 3 // 4])


def forget_islands(path: Path) -> None:
    for name in ("config.json", "config_sentence_transformers.json"):
        settings(name, keep_in_fp32_modules=[])(path)


def other_labels(path: Path) -> None:
    labels = json.loads((path / "config.json").read_text())["id2label"]
    turned = {"0": labels["2"], "1": labels["1"], "2": labels["0"]}
    settings("config.json", id2label=turned, label2id={name: int(k) for k, name in turned.items()})(path)


TANH = "torch.nn.modules.activation.Tanh"
QUERY, DENSE = LAYER + "attention.self.query.weight", LAYER + "output.dense.weight"
DAMAGES = [
    Damage("one weight beyond float16's range", "bert", "non-finite-weights", change(QUERY, put(float("inf")))),
    Damage("one NaN", "bert", "non-finite-weights", change(DENSE, put(float("nan")))),
    Damage("one flipped bit", "bert", "weights-differ", change(QUERY, put(12.0))),
    Damage("head rounded to 3 mantissa bits", "bert", "mantissa", change("classifier.weight", rounded_to(3))),
    Damage("one layer through bfloat16", "bert", "mantissa", change(DENSE, lambda t: t.bfloat16().half())),
    Damage("MiniLM's head rounded to 3 bits", "minilm", "mantissa", change("classifier.weight", rounded_to(3))),
    Damage("head's sign turned", "bert", "weights-differ", change("classifier.weight", lambda t: -t)),
    Damage("a bias forgotten", "bert", "weights-differ", change(LAYER + "output.dense.bias", torch.zeros_like)),
    Damage("norm weights reset", "bert", "weights-differ", change(LAYER + "output.LayerNorm.weight", torch.ones_like)),
    Damage("query and key swapped", "bert", "weights-differ", swap(QUERY, QUERY.replace("query", "key"))),
    Damage("rows of the head swapped", "three", "row-order", change("classifier.weight", lambda t: t[[1, 0, 2]])),
    Damage("embeddings shifted by one token", "bert", "row-order", change(WORDS, lambda t: t.roll(1, 0))),
    Damage("labels in another order", "three", "labels", other_labels),
    Damage("a tensor missing", "bert", "unreadable", weights(lambda t: t.pop(DENSE))),
    Damage("weights cut off", "bert", "unreadable", cut_file),
    Damage("wrong pad id", "roberta", "pad-token", settings("config.json", pad_token_id=7)),
    Damage("wrong activation", "bert", "activation", settings("config_sentence_transformers.json", activation_fn=TANH)),
    Damage("another hidden activation", "bert", "architecture", settings("config.json", hidden_act="relu")),
    Damage("another norm epsilon", "bert", "architecture", settings("config.json", layer_norm_eps=1e-3)),
    Damage("another number of heads", "bert", "architecture", settings("config.json", num_attention_heads=2)),
    Damage("vocabulary cut", "bert", "tokenizer", cut_vocabulary),
    Damage("tokenizer keeps capitals", "bert", "tokenizer", keep_case),
    Damage("pairs cut at 16 tokens", "bert", "max-length", settings("tokenizer_config.json", model_max_length=16)),
    Damage("island forgotten", "overflowing", "islands", forget_islands),
]  # fmt: skip


def references(place: Path) -> dict[str, Path]:
    """Float32 models by name; the one that overflows float16 has its islands recorded."""
    made = {family: make_folder(family, place / family) for family in SIZES}
    made["three"] = make_folder("bert", place / "three", num_labels=3)
    made["overflowing"] = shutil.copytree(made["bert"], place / "overflowing")
    factors = {"bert.encoder.layer.0.intermediate.dense.weight": 3000, "bert.encoder.layer.0.output.dense.weight": 300}
    weights(lambda t: [t[name].mul_(factor) for name, factor in factors.items()])(made["overflowing"])
    torch.manual_seed(0)
    CrossEncoder(str(minilm()), num_labels=1, max_length=128).save(place / "minilm")
    made["minilm"] = place / "minilm"
    if MPNET.exists():
        CrossEncoder(str(MPNET), num_labels=1, max_length=128).save(place / "mpnet-base")
        made["mpnet-base"] = place / "mpnet-base"
    return made


def with_islands(path: Path, place: Path) -> Path:
    """A float32 folder that names the islands its float16 copy needs, as --repair finds them."""
    scorer = folder.load(path)
    folder.save(scorer, place, dtype=torch.float16)
    _, repaired = certify(place, path, GROUPS, repair=True)
    assert repaired is not None
    scorer.widen(repaired.islands)
    shutil.rmtree(place)
    folder.save(scorer, place)
    return place


def refused(damage: Damage, reference: Path, place: Path) -> dict[str, Any]:
    export(reference, place, dtype="float16")
    damage.apply(place)
    found, _ = certify(place, reference, GROUPS)
    causes = [reason.cause for reason in found.reasons]
    right = bool(causes) and causes[0] == damage.cause
    return {"expected": damage.cause, "causes": causes, "right": right, "said": str(found.reasons[0]) if causes else ""}


def in_transformers(path: Path, place: Path, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(place)
    model.to(dtype).save_pretrained(place)


def in_peer(path: Path, place: Path, dtype: torch.dtype) -> None:
    from sentence_transformers import CrossEncoder as Peer

    Peer(str(path), device="cpu", model_kwargs={"dtype": dtype}).save_pretrained(str(place))


def trained(path: Path, place: Path) -> Path:
    """A model trained in bfloat16, saved narrow at `place`, and in float32 beside: its reference."""
    model = CrossEncoder(str(path), model_kwargs={"dtype": "bfloat16"})
    texts = [text for group in GROUPS for text in group.texts]
    examples = [_Example(list(text), float(n % 6 == 0)) for n, text in enumerate(texts)]
    model.fit([examples] * 2, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    model.save(place)
    model.save(place.with_name("joined"), dtype=torch.float32)
    return place.with_name("joined")


class _Example(NamedTuple):
    texts: list[str]
    label: float


def sound(made: dict[str, Path], place: Path, quick: bool) -> dict[str, list[str]]:
    """Causes by sound copy; none is right."""
    found: dict[str, list[str]] = {}

    def judge(name: str, copy: Path, reference: Path) -> None:
        certificate, _ = certify(copy, reference, GROUPS)
        found[name] = [str(reason) for reason in certificate.reasons]
        shutil.rmtree(copy)

    names = [*SIZES, "three", "overflowing", "minilm", *(["mpnet-base"] if "mpnet-base" in made and not quick else [])]
    for name in names:
        for dtype in ("float16", "bfloat16"):
            export(made[name], place, dtype=dtype)
            judge(f"{name}, {dtype}", place, made[name])
    for dtype in (torch.float16, torch.bfloat16):
        in_transformers(made["minilm"], place, dtype)
        judge(f"minilm by transformers, {dtype}", place, made["minilm"])
        in_peer(made["minilm"], place, dtype)
        judge(f"minilm by sentence-transformers, {dtype}", place, made["minilm"])
    export(made["minilm"], place, dtype="float16", max_shard_size="10MB")
    judge("minilm in shards", place, made["minilm"])
    reference = trained(made["bert"], place)
    judge("trained in bfloat16", place, reference)
    return found


def ranking(limit: int) -> list[Group]:
    return [
        Group(
            row["query"], tuple(d["text"] for d in row["docs"]), tuple(d["grade"] for d in row["docs"]), qid=row["qid"]
        )
        for row in ranking_data("dl19-bm25-top100.jsonl")[:limit]
    ]


def other_tools(reference: Path, copy: Path, groups: list[Group]) -> dict[str, float]:
    """nDCG@10 of both, mean tau and overlap from scores predicted apart, by ir-measures and scipy."""
    texts = [text for group in groups for text in group.texts]
    scores = [
        CrossEncoder(str(p), compute="float32").predict(texts, show_progress_bar=False) for p in (reference, copy)
    ]
    ends = np.cumsum([len(group.documents) for group in groups])[:-1]
    lists = [np.split(values, ends) for values in scores]
    qrels = [
        ir_measures.Qrel(str(q), str(d), int(grade or 0))
        for q, group in enumerate(groups)
        for d, grade in enumerate(group.grades)
    ]
    ndcg = [
        ir_measures.calc_aggregate(
            [nDCG @ 10],
            qrels,
            [
                ir_measures.ScoredDoc(str(q), str(d), float(s))
                for q, part in enumerate(parts)
                for d, s in enumerate(part)
            ],
        )[nDCG @ 10]
        for parts in lists
    ]
    taus = [stats.kendalltau(a, b).statistic for a, b in zip(*lists, strict=True)]
    tops = [
        len(set(np.argsort(-a)[:10].tolist()) & set(np.argsort(-b)[:10].tolist())) / 10
        for a, b in zip(*lists, strict=True)
    ]
    return {
        "ndcg_reference": ndcg[0], "ndcg_copy": ndcg[1], "kendall_tau": float(np.mean(taus)),
        "top10_overlap": float(np.mean(tops)),
    }  # fmt: skip


def price(reference: Path, copy: Path, groups: list[Group]) -> dict[str, Any]:
    """Seconds of a whole `certify` and of scoring the pairs once per format, in turns."""
    texts = [text for group in groups for text in group.texts]
    computes = ("float32", "emulated-bfloat16")
    rows = []
    for _ in range(2):
        scoring = {}
        for compute in computes:
            model = CrossEncoder(str(copy), compute=compute)
            started = time.perf_counter()
            model.predict(texts, show_progress_bar=False)
            scoring[compute] = time.perf_counter() - started
        started = time.perf_counter()
        certify(copy, reference, groups, computes=computes)
        rows.append({"scoring": scoring, "certify": time.perf_counter() - started})
    ratio = statistics.median(row["certify"] / sum(row["scoring"].values()) for row in rows)
    return {"pairs": len(texts), "runs": rows, "ratio": ratio}


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("halfrank", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        made = references(place)
        made["overflowing"] = with_islands(made["overflowing"], place / "with-islands")
        damaged = {}
        for damage in DAMAGES:
            damaged[damage.name] = refused(damage, made[damage.base], place / "damaged")
            shutil.rmtree(place / "damaged", ignore_errors=True)
            row = damaged[damage.name]
            print(f"{'right' if row['right'] else 'WRONG'}  {damage.name:42s} {', '.join(row['causes'])}")
        passed = sound(made, place / "sound", options.quick)
        for name, reasons in passed.items():
            print(f"{'passed ' if not reasons else 'REFUSED'}  {name} {' '.join(reasons)}")
        groups = ranking(3 if options.quick else 10)
        export(made["minilm"], place / "copy", dtype="bfloat16")
        certificate, _ = certify(place / "copy", made["minilm"], groups, computes=["float32"])
        ours, theirs = certificate.measured[0].values, other_tools(made["minilm"], place / "copy", groups)
        apart = {name: abs(float(ours[name]) - value) for name, value in theirs.items()}
        for name, value in theirs.items():
            print(f"{name:15s} certificate {ours[name]:.6f}, other tools {value:.6f}")
        cost = price(made["minilm"], place / "copy", groups)
    right = sum(row["right"] for row in damaged.values())
    bars = {
        f"{len(damaged)} damaged copies, at least 20, all refused": len(damaged) >= 20
        and all(row["causes"] for row in damaged.values()),
        "each with the right reason first": right == len(damaged),
        f"{len(passed)} sound copies, at least 10, all passed": len(passed) >= 10 and not any(passed.values()),
        "nDCG, tau and overlap are those of ir-measures and scipy within 1e-6": max(apart.values()) <= 1e-6,
        f"price at most {PRICE} times scoring once per format": cost["ratio"] <= PRICE,
    }
    finish(
        "certify",
        options.quick,
        {"damaged": damaged, "sound": passed, "apart": apart, "cost": cost},
        bars,
        f"{right} of {len(damaged)} damages named, {len(passed)} sound copies, {cost['ratio']:.2f} times scoring",
    )


if __name__ == "__main__":
    main()
