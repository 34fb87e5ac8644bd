"""Everything that needs a GPU, in one call: the tests marked gpu, then speed, memory and accuracy of every format.

Exit status: 0 all bars hold, 1 below a bar, 3 not measured because there is no CUDA device (nothing is written then).
Until it has run somewhere the README says "GPU: not measured".
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import ROOT, arguments, finish, interleaved, median_ratio, minilm, ranking_data
from halfrank.data.pairs import Pair
from halfrank.model import folder
from halfrank.predict import predict
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from train_speed import BATCH, in_order, passages

NOT_MEASURED = 3
FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALLOWED = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}  # of a score, beside float32
Timed = Callable[[], float]


def main() -> None:
    options = arguments(__doc__ or "")
    if not torch.cuda.is_available():
        print("GPU: not measured (torch sees no CUDA device)")
        sys.exit(NOT_MEASURED)
    warnings.filterwarnings("ignore")
    count, rounds, steps = (1000, 3, 20) if options.quick else (4300, 5, 100)
    tests = gpu_tests()
    print(f"tests: {tests['summary']}")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        torch.manual_seed(options.seed)
        folder.save(folder.load(minilm(), folder.LoadOptions(num_labels=1, device="cpu")), path)
        prediction = predictions(path, count, rounds)
        training = trainings(path, passages(options.seed)[: steps * BATCH], rounds)
    bars = {
        "every GPU test passes": tests["status"] == 0,
        **{
            f"{name}: scores within {ALLOWED[name]:g} of float32 on the CPU": error <= ALLOWED[name]
            for name, error in prediction["errors"].items()
        },
        "prediction in float16 at least as fast as the peer's in float16": prediction["ratios"]["float16"] >= 1,
        "training loaded in float16 at least as fast as the peer's with fp16": training["ratios"]["float16"] >= 1,
    }
    result = {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "tests": tests,
        "prediction": prediction,
        "training": training,
    }
    figure = (
        f"{result['device']}: prediction {prediction['ratios']['float16']:.2f} x, training "
        f"{training['ratios']['float16']:.2f} x sentence-transformers in float16"
    )
    finish("gpu", options.quick, result, bars, figure)


def gpu_tests() -> dict[str, Any]:
    """The tests marked gpu, in a process of their own; a device that they do not see counts as a failure."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-rs", "tests/gpu"]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=own)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1] if lines else done.stderr.strip()[-200:]
    skipped = any(line.startswith("SKIPPED") for line in lines)
    return {"status": done.returncode or int(skipped), "summary": summary, "output": lines[-30:]}


def predictions(path: Path, count: int, rounds: int) -> dict[str, Any]:
    """Pairs per second, peak bytes and largest error of each format, beside sentence-transformers in the same one."""
    from sentence_transformers import CrossEncoder

    pairs = [(line["query"], doc["text"]) for line in ranking_data("dl19-bm25-top100.jsonl") for doc in line["docs"]]
    pairs = pairs[:count]
    exact = predict(folder.load(path, folder.LoadOptions(compute="float32", device="cpu")), pairs[:200]).values[:, 0]
    runs: dict[str, Timed] = {}
    scores: dict[str, np.ndarray] = {}
    peaks: dict[str, int] = {}

    def run_of(name: str, score: Callable[[], Any]) -> Timed:
        def run() -> float:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            started = time.perf_counter()
            scores[name] = np.asarray(score()).reshape(-1)  # on the CPU, so everything has been computed
            seconds = time.perf_counter() - started
            peaks[name] = torch.cuda.max_memory_allocated()
            return seconds

        return run

    for name, dtype in FORMATS.items():
        ours = folder.load(path, folder.LoadOptions(dtype=dtype, compute=name, device="cuda"))
        theirs = CrossEncoder(str(path), device="cuda", model_kwargs={"dtype": dtype})
        runs[name] = run_of(name, lambda ours=ours: predict(ours, pairs).values[:, 0])
        runs[f"peer {name}"] = run_of(
            f"peer {name}",
            lambda theirs=theirs: theirs.predict(pairs, batch_size=128, show_progress_bar=False),
        )
    for run in runs.values():
        run()
    seconds = interleaved(runs, rounds)
    speed = {name: len(pairs) / statistics.median(times) for name, times in seconds.items()}
    errors = {name: float(np.abs(scores[name][:200] - exact).max()) for name in FORMATS}
    ratios = {name: median_ratio(seconds[f"peer {name}"], seconds[name]) for name in FORMATS}
    print(f"{'prediction':16s} pairs/s   peak MiB  largest error")
    for name in runs:
        error = f"{errors[name]:.1e}" if name in errors else ""
        print(f"{name:16s} {speed[name]:8.0f}  {peaks[name] / 2**20:8.0f}  {error}")
    return {
        "pairs": len(pairs), "seconds": seconds, "pairs_per_second": speed, "peak_bytes": peaks, "errors": errors,
        "ratios": ratios,
    }  # fmt: skip


def trainings(path: Path, pairs: list[Pair], rounds: int) -> dict[str, Any]:
    """Pairs per second and peak bytes of training, beside sentence-transformers with its own mixed precision."""
    batches = [list(range(start, min(start + BATCH, len(pairs)))) for start in range(0, len(pairs), BATCH)]
    peaks: dict[str, int] = {}

    def ours(name: str, dtype: torch.dtype) -> float:
        scorer = folder.load(path, folder.LoadOptions(dtype=dtype, compute=name, device="cuda"))
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        config = TrainConfig(batch_size=BATCH, warmup=0.1)
        train(scorer, from_pairs(pairs, scorer.pairs), config, plan=lambda epoch: batches)
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
        return time.perf_counter() - started

    runs = {name: lambda name=name, dtype=dtype: ours(name, dtype) for name, dtype in FORMATS.items()}
    runs |= {f"peer {name}": lambda name=name: peer(path, pairs, name, peaks) for name in FORMATS}
    for run in runs.values():
        run()
    seconds = interleaved(runs, rounds)
    speed = {name: len(pairs) / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median_ratio(seconds[f"peer {name}"], seconds[name]) for name in FORMATS}
    print(f"{'training':16s} pairs/s   peak MiB")
    for name in runs:
        print(f"{name:16s} {speed[name]:8.0f}  {peaks[name] / 2**20:8.0f}")
    return {
        "pairs": len(pairs), "seconds": seconds, "pairs_per_second": speed, "peak_bytes": peaks, "ratios": ratios
    }  # fmt: skip


def peer(path: Path, pairs: list[Pair], name: str, peaks: dict[str, int]) -> float:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    model = CrossEncoder(str(path), num_labels=1, device="cuda")
    columns = {
        "query": [pair.query for pair in pairs],
        "document": [pair.document for pair in pairs],
        "label": [pair.label for pair in pairs],
    }
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        settings = CrossEncoderTrainingArguments(
            output_dir=out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=2e-5, warmup_steps=0.1,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", batch_sampler=in_order,
            fp16=name == "float16", bf16=name == "bfloat16",
        )  # fmt: skip
        trainer = CrossEncoderTrainer(model=model, args=settings, train_dataset=Dataset.from_dict(columns))
        seconds = float(trainer.train().metrics["train_runtime"])
    peaks[f"peer {name}"] = torch.cuda.max_memory_allocated()
    return seconds


if __name__ == "__main__":
    main()
