"""Bar 5: a run killed (SIGKILL) at random moments and resumed each time ends with the bits of the run left alone.

MiniLM with two layers, computed in emulated float16, whose run is not a quiet one: modules become islands, pairs are
left out, it goes back once, and it keeps its best model. After each kill every folder must still be whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common import arguments, finish, minilm
from halfrank import whole
from halfrank.data.tokens import Tokens
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.train.config import Limits, TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import Evaluation, train
from train_speed import passages

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STEPS, BATCH, BURST = 40, 8, (22, 23)
CONFIG = TrainConfig(
    steps=STEPS, batch_size=BATCH, lr=1e-4, checkpoint_every=4, eval_every=12, freeze_embeddings=True,
    limits=Limits(good_every=10, quarantined=0.5, spike_window=20),
)  # fmt: skip


def scorer_of(dtype: torch.dtype, seed: int) -> Scorer:
    """Two layers of MiniLM, the first of which leaves float16's range."""
    torch.manual_seed(seed)
    options = folder.LoadOptions(
        num_labels=1, dtype=dtype, compute="emulated-float16", max_length=64, config={"num_hidden_layers": 2}
    )
    scorer = folder.load(minilm(), options)
    with torch.no_grad():
        wide = scorer.model.bert.encoder.layer[0].intermediate.dense
        for parameter in wide.parameters():
            parameter.mul_(2e4)
    return scorer


@contextlib.contextmanager
def poisoned(scorer: Scorer, tokens: Tokens) -> Iterator[None]:
    """The embedding of a token that a few pairs hold comes out infinite, as from broken memory."""
    owner = np.repeat(np.arange(len(tokens)), tokens.lengths)
    found, pairs = np.unique(np.unique(np.stack([tokens.input_ids, owner]), axis=1)[0], return_counts=True)
    token = int(found[(pairs >= 4) & (pairs <= 8)][0])

    def spoil(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((args[0] == token)[..., None], torch.inf, output)

    handle = scorer.model.get_input_embeddings().register_forward_hook(spoil)
    yield
    handle.remove()


def went_back(out: Path) -> bool:
    return any('"rung": "rollback"' in line for line in (out / "train.jsonl").read_text().splitlines())


def run(out: Path, dtype: torch.dtype, seed: int, *, resume: bool) -> None:
    """The whole run, or what is left of it."""
    scorer = scorer_of(dtype, seed)

    def evaluate(epoch: int, step: int) -> Evaluation:
        return Evaluation(-abs(step - 24.0), {})  # the best model is an earlier one

    def rate(step: int, total: int) -> float:
        return 1e5 if step in BURST and not went_back(out) else 1.0

    examples = from_pairs(passages(seed)[: STEPS * BATCH], scorer.pairs)
    with poisoned(scorer, examples.tokens):
        train(scorer, examples, replace(CONFIG, seed=seed), evaluate=evaluate, out=out, resume=resume, lr_factor=rate)


def started(out: Path, dtype: torch.dtype, seed: int, *, resume: bool) -> BaseProcess:
    """The run in a process of its own; forked, because this one has imported all it needs and has one thread."""

    def child() -> None:
        logging.getLogger("halfrank").setLevel(logging.ERROR)
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        run(out, dtype, seed, resume=resume)

    process = get_context("fork").Process(target=child)
    process.start()
    return process


def broken_folders(out: Path) -> list[str]:
    """What of `out` cannot be read, or holds numbers that are not finite."""
    problems = []
    if (out / "config.json").exists():
        try:
            folder.load(out)
        except Exception as error:  # whatever it is: it is what this benchmark looks for
            problems.append(f"model: {error}")
    for name in ("checkpoint", "good", "good-before", "best"):
        if not (out / name).exists():
            continue
        try:
            whole.finish_interrupted(out / name)
            with safe_open(out / name / "state.safetensors", framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - a safetensors file is no dict
                    tensor = stored.get_tensor(key)
                    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                        problems.append(f"{name}: {key} is not finite")
            if name != "best":
                json.loads((out / name / "state.json").read_text())
        except Exception as error:  # as above
            problems.append(f"{name}: {error}")
    return problems


def facts_of(out: Path) -> dict[str, Any]:
    """All that two equal runs have in common."""
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    content = json.loads((out / "checkpoint" / "state.json").read_text())["progress"]
    recovery = {key: value for key, value in content["recovery"].items() if "seconds" not in key}
    return {
        "model": (out / "model.safetensors").read_bytes(),
        "islands": json.loads((out / "config.json").read_text()).get("keep_in_fp32_modules"),
        "state": (out / "checkpoint" / "state.safetensors").read_bytes(),
        "progress": {**content, "recovery": recovery},
        "quarantine": (out / "quarantine.jsonl").read_bytes(),
        "journal": [(line.get("event"), line.get("rung"), line["step"], line.get("loss")) for line in lines],
    }


def main() -> None:
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import_module("halfrank.numerics.compiled")  # once for all lives
    wanted = 5 if options.quick else 20
    formats = ["float16"] if options.quick else list(FORMATS)
    draw = np.random.default_rng(options.seed)
    kills: list[dict[str, Any]] = []
    differing: list[str] = []
    events: dict[str, Any] = {}
    place = Path(tempfile.mkdtemp(prefix="halfrank-kill-"))
    try:
        for name in formats:
            alone = place / f"alone-{name}"
            begun = time.perf_counter()
            process = started(alone, FORMATS[name], options.seed, resume=False)
            process.join()
            seconds = time.perf_counter() - begun
            assert process.exitcode == 0, f"the undisturbed run of {name} failed"
            expected = facts_of(alone)
            recovery = expected["progress"]["recovery"]
            events[name] = {"islands": recovery["islands"], "left out": len(recovery["quarantined"]),
                            "went back": recovery["rollbacks"], "seconds": seconds}  # fmt: skip
            print(f"{name}: {events[name]}", flush=True)
            assert recovery["islands"], "the run has no islands"
            assert recovery["quarantined"], "no pair was left out"
            assert recovery["rollbacks"], "the run never went back"
            share = -(-wanted // len(formats))
            done = 0
            while done < share:
                out, resume = place / f"cut-{name}", False
                shutil.rmtree(out, ignore_errors=True)
                while True:
                    process = started(out, FORMATS[name], options.seed, resume=resume)
                    # A life is long enough to get on, and short enough that most lives are cut.
                    process.join(None if done >= share else float(draw.uniform(0.2, 1.1)) * seconds)
                    if process.exitcode is not None:
                        break
                    process.kill()
                    process.join()
                    done, resume = done + 1, out.exists() and any(out.iterdir())
                    problems = broken_folders(out)
                    state = out / "checkpoint" / "state.json"
                    step = json.loads(state.read_text())["progress"]["step"] if state.exists() else None
                    kills.append({"format": name, "checkpoint": step, "broken": problems})
                    print(
                        f"{name}: kill {done}, checkpoint of step {step}, broken: {problems or 'nothing'}", flush=True
                    )
                if process.exitcode != 0:
                    differing.append(f"{name}: the resumed run ended with exit code {process.exitcode}")
                    continue
                found = facts_of(out)
                differing += [f"{name}: {key}" for key in expected if found[key] != expected[key]]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    broken = [kill for kill in kills if kill["broken"]]
    bars = {
        f"{len(kills)} kills, {wanted} wanted": len(kills) >= wanted,
        f"the same bits as the run left alone ({', '.join(differing) or 'all'})": not differing,
        f"no folder was broken ({len(broken)} were)": not broken,
    }
    result = {"kills": kills, "events": events, "differing": differing, "seed": options.seed}
    finish("kill", options.quick, result, bars, f"{len(kills)} kills, {len(broken)} broken folders")


if __name__ == "__main__":
    main()
