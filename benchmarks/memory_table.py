"""Bytes per parameter of a Llama of 135 M random weights, by scheme and optimizer, and what each does to the weights.

Every row trains the same shape for a few steps in a process of its own. Counted are the bytes of all tensors that
model and optimizer hold, the most bytes of gradients that existed at one time, and the growth of the process. Quality
is that of `optimizer_only.py`: each optimizer in sentence-transformers' trainer, against that trainer in float32.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import ROOT, arguments, finish, minilm
from optimizer_only import compared, optimizers, small_model, trained
from peaks import Run, _warm_up, ending, model_folder, pairs_of

SHAPE = "llama-135m"
PAIRS, LENGTH, LR = 2, 32, 1e-4
HELD, WHOLE = 5.1, 7.1  # bytes per parameter: weights, residual and moments; the same with all gradients
BESIDE = 0.5  # bytes per parameter by which a process may grow beyond the tensors counted
OURS = "halfrank AdamW"
FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Row(NamedTuple):
    """An optimizer on weights of a format, with gradients kept or released."""

    optimizer: str
    weights: str
    released: bool = False

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.weights}{', released' if self.released else ''}"


def rows(quick: bool) -> Iterator[Row]:
    """The rows of the table; the quick form leaves out the second format and what differs little from another row."""
    yield Row("torch AdamW", "float32")
    for weights in ("float16",) if quick else ("float16", "bfloat16"):
        yield Row(OURS, weights)
        yield Row(OURS, weights, released=True)
        for name in optimizers(LR):
            if name != OURS and not (quick and name in ("torch AdamW fused", "FlashAdamW")):
                yield Row(name, weights)


def in_own_process(row: Row, *, folder: Path, quick: bool) -> dict[str, Any]:
    """The numbers of one row; {"failed": how it ended} where it did not end well."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    steps = 1 if quick and row.optimizer != OURS else 2
    command = [sys.executable, __file__, "--row", json.dumps(row), str(folder), str(steps)]
    alone = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # two rows at a time, a core each
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        return {"failed": ending(done)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(row: Row, folder: str, steps: int) -> dict[str, Any]:
    """Load, train, count; runs in a process of its own."""
    from halfrank.allocator import resident, steady_allocator

    _warm_up(Run(folder, row.weights))
    optimizers(LR)  # their packages are imported: part of the library and not of the model
    steady_allocator()
    base = _settled(resident)
    model, optimizer, step = (_ours if row.optimizer == OURS else _theirs)(row, folder, steps)
    flight = _Flight(model)
    for number in range(steps):
        step(number)
    optimizer.zero_grad(set_to_none=True)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model, optimizer)}
    count = sum(p.numel() for p in model.parameters())
    return {
        "parameters": count,
        "weights": sum(p.nbytes for p in model.parameters()) / count,
        "held": sum(held.values()) / count,
        "gradients": flight.most / count,
        "largest_gradient": max(p.nbytes for p in model.parameters()) / count,
        "resident": (_settled(resident) - base) / count,
        "finite": all(bool(p.detach().isfinite().all()) for p in model.parameters()),
    }


def _ours(row: Row, folder: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], object]]:
    from halfrank.data.pairs import Pair
    from halfrank.losses import LOSSES
    from halfrank.model import folder as folders
    from halfrank.numerics.scaling import LossScale
    from halfrank.train.config import TrainConfig
    from halfrank.train.examples import from_pairs, micro_batches
    from halfrank.train.loop import make_optimizer
    from halfrank.train.step import train_step

    options = folders.LoadOptions(max_length=LENGTH, dtype=FORMATS[row.weights], compute="float32")
    scorer = folders.load(folder, options)
    optimizer, scale = make_optimizer(scorer, TrainConfig(lr=LR)), LossScale(initial=2.0**10)
    pairs = [Pair(q, d, float(i % 2)) for i, (q, d) in enumerate(pairs_of(PAIRS * steps, LENGTH))]
    examples = from_pairs(pairs, scorer.pairs)
    scorer.model.train()

    def step(number: int) -> None:
        units = range(number * PAIRS, (number + 1) * PAIRS)
        parts = micro_batches(examples, units, max_tokens=16384, per_unit=False)
        function = LOSSES["bce"].function
        done = train_step(scorer, parts, function, optimizer, scale, clip=1.0, release=row.released)
        assert done.stored, "the step was skipped: its memory would prove nothing"

    return scorer.model, optimizer, step


def _theirs(row: Row, folder: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], object]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=FORMATS[row.weights]).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = optimizers(LR)[row.optimizer](list(model.named_parameters()))
    texts = pairs_of(PAIRS * steps, LENGTH)

    def step(number: int) -> None:
        taken = texts[number * PAIRS : (number + 1) * PAIRS]
        batch = tokenizer(
            [q for q, _ in taken], [d for _, d in taken], truncation=True, max_length=LENGTH, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits.float().squeeze(-1)
        nn.functional.binary_cross_entropy_with_logits(logits, torch.arange(PAIRS) % 2.0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


class _Flight:
    """The most bytes of gradients that parameters held at one time."""

    def __init__(self, model: nn.Module) -> None:
        self.most = 0
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: Tensor) -> None:
        self.most = max(self.most, sum(_bytes(p.grad) for p in self._parameters if p.grad is not None))


def _bytes(gradient: Tensor) -> int:
    return gradient._values().nbytes + gradient._indices().nbytes if gradient.is_sparse else gradient.nbytes


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    pending: list[Any] = list(optimizer.state.values())
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif hasattr(value, "__dict__"):
            pending += vars(value).values()


def _settled(resident: Callable[[], int]) -> int:
    gc.collect()
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    return resident()


def quality(quick: bool, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each format and optimizer: ratio and cosine of the weights' change, as `optimizer_only.py` measures them."""
    batch, steps, lr = (4, 15, 1e-4) if quick else (8, 40, 5e-5)
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        path = small_model(Path(root), seed) if quick else minilm()
        for name in dict.fromkeys(row.weights for row in rows(quick)):
            start = torch.float16 if name == "float32" else FORMATS[name]
            made = optimizers(lr)
            wanted = trained(path, start, torch.float32, made["torch AdamW"], batch, steps, seed)
            if name == "float32":
                found[name] = {"torch AdamW": compared(wanted, wanted)}
                continue
            names = dict.fromkeys(row.optimizer for row in rows(quick) if row.weights == name)
            found[name] = {
                label: compared(trained(path, start, FORMATS[name], made[label], batch, steps, seed), wanted)
                for label in names
            }
    return found


def main() -> None:
    if "--row" in sys.argv:
        name, weights, released = json.loads(sys.argv[2])
        print(json.dumps(measured(Row(name, weights, released), sys.argv[3], int(sys.argv[4]))))
        return
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    moved = quality(options.quick, options.seed)
    table: list[dict[str, Any]] = []
    bars: dict[str, bool] = {}
    heads = ("weights", "held", "gradients", "all", "resident")
    print(f"{'':42s} {' '.join(f'{head:>9s}' for head in heads)}   ratio  cosine  finite")
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(2) as pool:
        # One folder for all: a format is converted as it is read.
        folder, wanted = model_folder(SHAPE, Path(root), torch.float16), list(rows(options.quick))
        ended = pool.map(partial(in_own_process, folder=folder, quick=options.quick), wanted)
        for row, found in zip(wanted, ended, strict=True):
            how = moved[row.weights][row.optimizer]
            table.append({"row": str(row), **found, **how})
            if "failed" in found:
                print(f"{row!s:42s} {found['failed']}")
                bars[f"{row} ends"] = row.optimizer != OURS
                continue
            finite = found["finite"] and how["ratio"] == how["ratio"]
            print(_line(row, found, how, finite), flush=True)
            if row.optimizer == OURS:
                bars |= _bars(row, found, finite)
    ours = next(entry for entry in table if entry["row"] == str(Row(OURS, "float16", released=True)))
    figure = f"{ours['held']:.2f} bytes per parameter at rest, {ours['gradients']:.2f} of gradients in flight"
    finish("memory_table", options.quick, {"shape": SHAPE, "rows": table}, bars, figure)


def _line(row: Row, found: dict[str, Any], how: dict[str, float], finite: bool) -> str:
    sizes = (found["weights"], found["held"], found["gradients"], found["held"] + found["gradients"], found["resident"])
    moved = f"{how['ratio']:7.3f} {how['cosine']:7.4f}  {'yes' if finite else 'NO'}"
    return f"{row!s:42s} " + " ".join(f"{size:9.2f}" for size in sizes) + f" {moved}"


def _bars(row: Row, found: dict[str, Any], finite: bool) -> dict[str, bool]:
    bars = {
        f"{row}: weights, residual and moments at most {HELD} bytes": found["held"] <= HELD,
        f"{row}: the process grew by no more than {BESIDE} bytes beyond them": found["resident"]
        <= found["held"] + BESIDE,
        f"{row}: finite": finite,
    }
    if row.released:
        bars[f"{row}: one gradient at a time"] = found["gradients"] <= found["largest_gradient"] * 1.01
    else:
        bars[f"{row}: at most {WHOLE} bytes with all gradients"] = found["held"] + found["gradients"] <= WHOLE
    return bars


if __name__ == "__main__":
    main()
