"""A cross-encoder of 1.24 billion parameters, fine-tuned whole in 16 bits: how much memory does it take?

Elements that move are counted at a learning rate of 1e-4, over three steps from new moments: at 2e-5 a step is less
than the grid of a bfloat16 residual for the larger weights, which then move in some of the steps and not in others.

`--without-peer` leaves sentence-transformers' float32 trainer out, which takes up to 20 GiB and may fail.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, finish
from peaks import Run, ending, measured, model_folder, pairs_of, reset_peak

LIMIT = 20 * 2**30
ALLOWED = 8.5e9  # bytes above the imported library
LR = 1e-4


def peer(folder: str, pairs: int, length: int) -> dict[str, Any]:
    """sentence-transformers' own trainer in float32 on the same model, within 20 GiB; runs in this process."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    from halfrank import allocator

    reset_peak()
    base = allocator.resident()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    model = CrossEncoder(folder, num_labels=1, max_length=length, model_kwargs={"dtype": "float32"}, device="cpu")
    texts = pairs_of(3 * pairs, length)
    columns = {
        "a": [q for q, _ in texts],
        "b": [d for _, d in texts],
        "label": [float(i % 2) for i in range(len(texts))],
    }
    with tempfile.TemporaryDirectory() as out:
        arguments = CrossEncoderTrainingArguments(
            output_dir=out,
            per_device_train_batch_size=pairs,
            max_steps=3,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        CrossEncoderTrainer(model, arguments, Dataset.from_dict(columns), loss=BinaryCrossEntropyLoss(model)).train()
    return {"peak": allocator.peak_resident() - base}


def peer_measured(folder: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, __file__, "--peer", folder],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if done.returncode:
        return {"failed": ending(done)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if "--peer" in sys.argv:
        print(json.dumps(peer(sys.argv[sys.argv.index("--peer") + 1], 4, 128)))
        return
    rows: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as root:
        path = str(model_folder("llama-1b", Path(root)))
        for scheme in ("float16", "bfloat16"):
            rows[scheme] = row = measured(
                Run(path, scheme, released=True, checkpointing=True, pairs=4, length=128, steps=3, lr=LR, count=True)
            )
            if "failed" in row:
                print(f"{scheme}: {row['failed']}")
                bars[f"{scheme} trains"] = False
                continue
            print(
                f"{scheme:10s} peak {row['peak'] / 1e9:.2f} GB, loading {row['loading'] / 1e9:.2f}, kept "
                f"{row['kept'] / row['parameters']:.2f} bytes per parameter, {row['train_seconds']:.0f} s, "
                f"moved {row['moved_share']:.4%} of the elements with a gradient, {row['moved_above_eps']:.4%} of "
                "those with one above Adam's eps",
                flush=True,
            )
            bars[f"{scheme}: peak at most 8.5 GB above the library's own"] = row["peak"] <= ALLOWED
            bars[f"{scheme}: every tensor moved"] = not row["still"]
            bars[f"{scheme}: 99.9 % of the elements with a gradient moved"] = row["moved_share"] >= 0.999
            bars[f"{scheme}: all finite"] = row["finite"]
        if "--without-peer" not in sys.argv:
            rows["sentence-transformers float32"] = other = peer_measured(path)
            print(f"sentence-transformers, float32, within 20 GiB: {other}")
    worst = max((row.get("peak", 0) for name, row in rows.items() if name in ("float16", "bfloat16")), default=0)
    finish("memory_1b", False, {"rows": rows}, bars, f"1.24 B parameters fine-tuned within {worst / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
