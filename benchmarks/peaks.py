"""What memory scripts share: random models on disk, and a training run in a process of its own, with its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common import ROOT, minilm

SHAPES: dict[str, dict[str, Any]] = {
    "llama-135m": {
        "family": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "family": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "mpnet": {"family": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514, "pad_token_id": 1},
}  # fmt: skip
SAMPLED = 4
EPS = 1e-8  # of AdamW
REPEATED = "How a model rounds decides what it learns; the pairs of this text are long enough for any length. "


@dataclass(frozen=True)
class Run:
    """A training run to measure: a model, a way to train it, and batches of equal pairs of real text."""

    folder: str
    scheme: str = "float16"
    released: bool = False
    checkpointing: bool = False
    pairs: int = 8  # of a batch
    length: int = 128  # tokens of each pair
    steps: int = 3
    max_tokens: int = 16384
    lr: float = 2e-5
    count: bool = False  # elements that have a gradient, and those of them that moved, in the same run again


def model_folder(shape: str, root: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A model of one of the `SHAPES` with random weights and MiniLM's tokenizer, made once; MiniLM as it is."""
    if shape == "minilm":
        return minilm()
    target = root / f"{shape}-{str(dtype).removeprefix('torch.')}"
    if not (target / "config.json").exists():
        settings = dict(SHAPES[shape])
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        config = AutoConfig.for_model(settings.pop("family"), num_labels=1, **settings)
        config.pad_token_id = tokenizer.pad_token_id
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that no wider copy ever exists
        try:
            model = AutoModelForSequenceClassification.from_config(config)
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def measured(run: Run, *, limit_bytes: int | None = None) -> dict[str, Any]:
    """Do a run in a process of its own; its numbers, or {"failed": how it ended}."""
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(run)), str(limit_bytes or 0)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    return {"failed": ending(done)} if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])


def ending(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended that did not end well: its last error, or the signal that ended it."""
    said = [line.strip() for line in done.stderr.splitlines() if "Error" in line or "memory" in line.lower()]
    return f"exit code {done.returncode}: {said[-1][:300] if said else 'without a word'}"


def reset_peak() -> None:
    """Let the process's peak begin at what it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def pairs_of(count: int, length: int) -> list[tuple[str, str]]:
    """Pairs that are cut to `length` tokens."""
    return [(f"question {number}: what is lost in rounding?", REPEATED * (length // 10 + 2)) for number in range(count)]


def train_and_measure(run: Run) -> dict[str, Any]:
    """Bytes above the imported library: while loading, at the peak, and by part at the end."""
    from halfrank import allocator
    from halfrank.data.pairs import Pair
    from halfrank.errors import CertificateError
    from halfrank.model import folder
    from halfrank.precision import Facts, choose, detect
    from halfrank.train.budget import TokenBudget
    from halfrank.train.config import TrainConfig
    from halfrank.train.examples import from_pairs
    from halfrank.train.loop import make_optimizer, train

    _warm_up(run)
    reset_peak()
    base = allocator.resident()
    narrow = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    started = time.perf_counter()
    options = folder.LoadOptions(
        num_labels=1, max_length=run.length, dtype=narrow.get(run.scheme, torch.float32), compute="float32"
    )
    scorer = folder.load(run.folder, options)
    facts = Facts(scorer.model.num_parameters(), scorer.precision.storage, detect("cpu"))
    scorer.adopt(choose(facts, scheme=run.scheme, compute="float32"))
    loading, loaded = allocator.peak_resident() - base, time.perf_counter() - started
    texts = pairs_of(run.pairs * run.steps, run.length)
    examples = from_pairs([Pair(q, d, float(i % 2)) for i, (q, d) in enumerate(texts)], scorer.pairs)
    config = TrainConfig(
        batch_size=run.pairs, steps=run.steps, lr=run.lr, max_tokens=run.max_tokens, watch_every=0,
        release_gradients=run.released, checkpointing=run.checkpointing,
    )  # fmt: skip
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        before = {name: _mark(p) for name, p in scorer.model.named_parameters()}
        worked = time.process_time()
        optimizer, refused = make_optimizer(scorer, config), None
        try:
            budget = TokenBudget(run.max_tokens, roomy=False)  # as where memory is near its limit
            train(scorer, examples, config, out=Path(out) / "run", optimizer=optimizer, budget=budget)
        except CertificateError as error:  # random weights: the copy may be refused after the training that is measured
            refused = str(error)
        lines = [json.loads(line) for line in (Path(out) / "run" / "train.jsonl").read_text().splitlines()]
        worked = time.process_time() - worked
    peak, trained = allocator.peak_resident() - base, time.perf_counter() - started
    finite = all(bool(p.detach().isfinite().all()) for p in scorer.model.parameters())
    moved = _moved_share(run, scorer, examples, optimizer) if run.count else {}
    after = {name: _mark(p) for name, p in scorer.model.named_parameters()}
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    held = [*(p.detach() for p in scorer.model.parameters()), *(v for v in state if isinstance(v, torch.Tensor))]
    return {
        "peak": peak, "base": base, "loading": loading,
        "kept": sum(tensor.nbytes for tensor in held), "parameters": scorer.model.num_parameters(),
        "still": [name for name, mark in before.items() if mark == after[name]],
        "finite": finite, **moved,
        "losses": [line["loss"] for line in lines if isinstance(line.get("loss"), float)], "refused": refused,
        "load_seconds": loaded, "train_seconds": trained, "processor_seconds": worked,
    }  # fmt: skip


def _moved_share(run: Run, scorer: Any, examples: Any, optimizer: Any) -> dict[str, float]:
    """The same run again, from new moments: of the elements that had a gradient, the share whose bits changed.

    A residual's bits count. `moved_above_eps` is the share of those with a gradient above Adam's eps, below which Adam
    itself makes no step. Every `SAMPLED`th element is looked at: copies of all would not fit beside such a model.
    """
    from halfrank.losses import LOSSES
    from halfrank.numerics.scaling import LossScale
    from halfrank.train.examples import micro_batches
    from halfrank.train.step import train_step

    def kept(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual = optimizer.state[parameter].get("residual")
        held = (parameter.detach(),) if residual is None else (parameter.detach(), residual)
        return tuple(tensor.flatten()[::SAMPLED].clone() for tensor in held)

    optimizer.state.clear()
    scorer.residuals.clear()
    optimizer.allocate()
    members = [p for group in optimizer.param_groups for p in group["params"]]
    before = {parameter: kept(parameter) for parameter in members}
    alive, clear = ({p: torch.zeros(len(before[p][0]), dtype=torch.bool) for p in members} for _ in range(2))
    plain = optimizer.step_one

    def step_one(parameter: torch.Tensor, *, grad_divisor: float = 1.0) -> None:
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        seen = gradient.flatten()[::SAMPLED]
        alive[parameter] |= seen != 0
        clear[parameter] |= seen.float().abs() / grad_divisor > EPS
        plain(parameter, grad_divisor=grad_divisor)

    optimizer.step_one = step_one
    for group in optimizer.param_groups:
        group["lr"] = run.lr
    scorer.model.train()
    scorer.checkpointing = run.checkpointing
    scale = LossScale()
    for step in range(run.steps):
        units = range(step * run.pairs, (step + 1) * run.pairs)
        parts = micro_batches(examples, units, max_tokens=run.max_tokens, per_unit=False)
        # Gradients that overflow at the first scale store nothing: the step is tried again at half of it, as in a run.
        while not train_step(scorer, parts, LOSSES["bce"].function, optimizer, scale, clip=1.0, release=True).stored:
            if scale.value < 1.0:
                break
    changed = {
        p: torch.stack([old != now for old, now in zip(before[p], kept(p), strict=True)]).any(0) for p in members
    }
    return {
        name: sum(int((changed[p] & there[p]).sum()) for p in members)
        / max(sum(int(there[p].sum()) for p in members), 1)
        for name, there in (("moved_share", alive), ("moved_above_eps", clear))
    }


def _mark(parameter: torch.Tensor) -> int:
    """A number that changes with any bit of a tensor, computed without a copy of it."""
    return zlib.crc32(parameter.detach().view(torch.uint8).numpy().data)  # type: ignore[arg-type]


def _warm_up(run: Run) -> None:
    """Train a model of a few thousand weights: code that is imported on first use is the library's own."""
    from halfrank.data.pairs import Pair
    from halfrank.model import folder
    from halfrank.train.config import TrainConfig
    from halfrank.train.examples import from_pairs
    from halfrank.train.loop import train

    with tempfile.TemporaryDirectory() as root:
        family = AutoConfig.from_pretrained(run.folder).model_type
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        config = AutoConfig.for_model(
            family, vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_labels=1, pad_token_id=0, max_position_embeddings=66,
        )  # fmt: skip
        AutoModelForSequenceClassification.from_config(config).save_pretrained(root)
        tokenizer.save_pretrained(root)
        dtype = getattr(torch, run.scheme, torch.float32)
        scorer = folder.load(root, folder.LoadOptions(max_length=32, dtype=dtype, compute="float32"))
        examples = from_pairs([Pair(q, d, 1.0) for q, d in pairs_of(4, 16)], scorer.pairs)
        # At the usual first scale a random model's only step may overflow, and a run that stores nothing ends badly.
        train(scorer, examples, TrainConfig(batch_size=4, watch_every=0, loss_scale=2.0**7), out=Path(root) / "run")


if __name__ == "__main__":
    asked = int(sys.argv[2])
    if asked:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (asked, asked))
    print(json.dumps(train_and_measure(Run(**json.loads(sys.argv[1])))))
