"""Training speed against sentence-transformers' CrossEncoderTrainer: the same pairs, the same batches, in turns.

Beside the ratios stands the share of the machine's float32 matrix rate that training reaches: floating-point operations
of the full model's unpadded tokens over the time of the whole run (tokenizing and update included), against the rate of
plain products of the model's own shapes between its steps. With bfloat16 products, both sides compute in bfloat16.
"""

from __future__ import annotations

from halfrank.allocator import restart_without_thread_cache

if __name__ == "__main__":
    restart_without_thread_cache()  # as the command does, to the peer's advantage too; before torch is imported

import ast
import random
import statistics
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, SequentialSampler

from common import arguments, finish, interleaved, median_ratio, minilm, ranking_data, timed
from halfrank.data.pairs import Pair
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.precision import detect
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train

BATCH = 16
Factor = Callable[[int, int], float]


def passages(seed: int) -> list[Pair]:
    """Judged MS MARCO passages of 2020, shuffled."""
    pairs = [
        Pair(line["query"], doc["text"], float(doc["grade"] > 1))
        for line in ranking_data("dl20-judged.jsonl")
        for doc in line["docs"]
        if doc["grade"] is not None
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def documented_functions(seed: int, count: int) -> list[Pair]:
    """(first line of a docstring, the whole function) of the standard library, shuffled."""
    pairs: list[Pair] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text and len(text) > 20:
                pairs.append(Pair(text.splitlines()[0], ast.get_source_segment(source, node) or text, 1.0))
    random.Random(seed).shuffle(pairs)
    return pairs[:count]


def operations(lengths: list[int], config: Any) -> float:
    """Floating-point operations of forward and backward pass: products with weights, and attention's two."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * width**2 + 2 * width * inner)
    return 3 * 2 * sum(length * (weights + 2 * layers * length * width) for length in lengths)


def plain_products(tokens: int, config: Any) -> tuple[Callable[[], None], float]:
    """A layer's products over `tokens` tokens, forward and backward, as plain float32 mm, and their operations."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = [(width, width)] * 4 + [(width, inner), (inner, width)]
    operands = [(torch.randn(tokens, i), torch.randn(o, i), torch.randn(tokens, o)) for i, o in shapes]

    def layer() -> None:
        for x, weight, grad in operands:
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

    layer()
    return layer, 3 * 2 * tokens * sum(i * o for i, o in shapes)


def share_of_matrix_rate(pairs: list[Pair], rounds: int) -> dict[str, Any]:
    """What training reaches of the rate of plain products, which are timed before each of its steps: speeds drift
    within seconds, and what slows the one slows the other."""
    scorer = folder.load(minilm(), folder.LoadOptions(num_labels=1, compute="float32"))
    lengths = scorer.pairs.encode([(pair.query, pair.document) for pair in pairs]).lengths.tolist()
    work = operations(lengths, scorer.config)
    layer, products = plain_products(1440, scorer.config)
    rates, seconds = [], []
    for _ in range(rounds):
        between: list[float] = []

        def factor(step: int, total: int, between: list[float] = between) -> float:
            between.extend([timed(layer), timed(layer)])  # the first brings the operands into the cache
            return 1.0

        seconds.append(ours(pairs, torch.float32, 512, lr_factor=factor) - sum(between))
        counted = between[1::2]
        rates.append(products * len(counted) / sum(counted))
    shares = [work / spent / rate for spent, rate in zip(seconds, rates, strict=True)]
    return {"share": statistics.median(shares), "shares": shares, "seconds": seconds, "operations_per_second": rates}


def ours(
    pairs: list[Pair], dtype: torch.dtype, max_length: int, compute: str = "float32", lr_factor: Factor | None = None
) -> float:
    scorer = folder.load(
        minilm(), folder.LoadOptions(num_labels=1, dtype=dtype, compute=compute, max_length=max_length)
    )
    return train_ours(scorer, pairs, lr_factor=lr_factor)


def train_ours(
    scorer: Scorer, pairs: list[Pair], *, lr: float = 2e-5, seed: int = 0, lr_factor: Factor | None = None
) -> float:
    """Seconds of training over `pairs` in their order; `lr_factor` is called before each step."""
    config = TrainConfig(batch_size=BATCH, warmup=0.1, lr=lr, seed=seed)
    batches = [list(range(start, min(start + BATCH, len(pairs)))) for start in range(0, len(pairs), BATCH)]

    def run() -> None:  # tokenizing is part of the time, as it is in the peer's
        train(scorer, from_pairs(pairs, scorer.pairs), config, plan=lambda epoch: batches, lr_factor=lr_factor)

    return timed(run)


def peer(pairs: list[Pair], max_length: int, bf16: bool = False) -> float:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(minilm()), num_labels=1, max_length=max_length, device="cpu")
    return train_peer(model, pairs, bf16=bf16)


def train_peer(model: Any, pairs: list[Pair], *, lr: float = 2e-5, bf16: bool = False, seed: int = 0) -> float:
    """Seconds of sentence-transformers' trainer over `pairs` in their order."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    data = Dataset.from_dict(
        {
            "query": [pair.query for pair in pairs],
            "document": [pair.document for pair in pairs],
            "label": [pair.label for pair in pairs],
        }
    )
    with tempfile.TemporaryDirectory() as out:
        args = CrossEncoderTrainingArguments(
            output_dir=out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=lr, warmup_steps=0.1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
            batch_sampler=in_order, bf16=bf16, seed=seed,
        )  # fmt: skip
        trainer = CrossEncoderTrainer(model=model, args=args, train_dataset=data)
        return float(trainer.train().metrics["train_runtime"])


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def compare(pairs: list[Pair], max_length: int, rounds: int, formats: dict[str, torch.dtype]) -> dict[str, Any]:
    runs = {"peer": lambda: peer(pairs, max_length)}
    runs |= {name: lambda dtype=dtype: ours(pairs, dtype, max_length) for name, dtype in formats.items()}
    seconds = interleaved(runs, rounds)
    speed = {name: len(pairs) / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median_ratio(seconds["peer"], seconds[name]) for name in formats}
    for name in runs:
        print(f"  {name:10s} {speed[name]:7.1f} pairs/s" + (f"  {ratios[name]:.2f} x" if name in ratios else ""))
    return {"pairs": len(pairs), "seconds": seconds, "pairs_per_second": speed, "ratios": ratios}


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    steps, rounds, long_pairs, long_rounds = (6, 1, 16, 1) if options.quick else (40, 5, 160, 3)
    formats = {"float32": torch.float32, "float16": torch.float16}
    ours(passages(options.seed)[:BATCH], torch.float16, 128)  # numba compiles once
    # First: what other trainers leave in the process is no part of it. And not a few steps, which would show what only
    # the first one takes: memory that comes page by page, the optimizer's state.
    rate = share_of_matrix_rate(passages(options.seed)[: max(steps, 16) * BATCH], rounds)
    peak = statistics.median(rate["operations_per_second"])
    print(f"{rate['share']:.2f} of the float32 matrix rate, {peak / 1e9:.0f} GFLOP/s")
    print("MS MARCO passages")
    short_pairs = passages(options.seed)[: steps * BATCH]
    short = compare(short_pairs, 512, rounds, formats)
    print("documented functions, at most 512 tokens")
    long = compare(documented_functions(options.seed, long_pairs), 512, long_rounds, {"float32": torch.float32})
    bars = {
        "float32, MS MARCO: at least 2.3 times": short["ratios"]["float32"] >= 2.3,
        "loaded in float16, MS MARCO: at least 2.0 times the peer's float32": short["ratios"]["float16"] >= 2.0,
        "float32, docstrings at 512: at least 3 times": long["ratios"]["float32"] >= 3.0,
    }
    bars["float32, MS MARCO: at least 85 % of the float32 matrix rate"] = rate["share"] >= 0.85
    brain: dict[str, Any] = {}
    if detect("cpu").bfloat16_products:
        print("MS MARCO passages, bfloat16 products on both sides")
        turns = interleaved(
            {
                "peer": lambda: peer(short_pairs, 512, bf16=True),
                "ours": lambda: ours(short_pairs, torch.float32, 512, compute="bfloat16"),
            },
            rounds,
        )
        brain = {"seconds": turns, "ratio": median_ratio(turns["peer"], turns["ours"])}
        print(f"  {brain['ratio']:.2f} x")
        bars["bfloat16 products, MS MARCO: at least 2 times"] = brain["ratio"] >= 2.0
    figure = (
        f"train speed against sentence-transformers: float32 {short['ratios']['float32']:.2f}, "
        f"float16 {short['ratios']['float16']:.2f}, docstrings {long['ratios']['float32']:.2f}"
    )
    result = {"passages": short, "docstrings": long, "matrix_rate": rate, "bfloat16": brain}
    finish("train_speed", options.quick, result, bars, figure)


if __name__ == "__main__":
    main()
