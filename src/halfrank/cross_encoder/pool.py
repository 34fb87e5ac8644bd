"""Prediction by several processes: a scorer that travels, workers that score, chunks that come back in order."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import load, save

from halfrank.cross_encoder.pairs import Readout
from halfrank.errors import HalfrankError
from halfrank.model import adapters, attention
from halfrank.model.modular import blueprint, built
from halfrank.model.scorer import Scorer
from halfrank.predict import Scores, merged, predict

Pool = dict[str, Any]  # "input" and "output" queues, "processes"
_calls = itertools.count()


def portable(scorer: Scorer) -> dict[str, Any]:
    """A scorer as values that pickle, weights to the bit."""
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in scorer.model.state_dict().items()}
    return {
        "model": blueprint(scorer.model),
        "weights": save(weights),
        "tokenizer": scorer.tokenizer,
        "precision": scorer.precision,
        "max_length": scorer.max_length,
        "template": scorer.template,
        "instruction": scorer.instruction,
        "activation": scorer.activation,
        "untrained_head": scorer.untrained_head,
        "islands": scorer.islands,
        "adapters": scorer.adapters,
        "origin": scorer.origin,
        "residuals": save({name: tensor.cpu().clone() for name, tensor in scorer.residuals.items()}),
    }


def from_portable(state: dict[str, Any], device: str | torch.device = "cpu") -> Scorer:
    """The scorer that `portable` took apart, on `device`."""
    attention.register()  # the configuration names it
    model, trained = built(state["model"]), state["adapters"]
    if trained is not None:
        adapters.inject(model, trained.config, trained.saved)
    model.load_state_dict(load(state["weights"]), assign=True)
    model.tie_weights()
    model.to(device).eval()
    scorer = Scorer(
        model, state["tokenizer"], state["precision"],
        max_length=state["max_length"], template=state["template"], instruction=state["instruction"],
    )  # fmt: skip
    scorer.adapters, scorer.origin = trained, state["origin"]
    scorer.activation, scorer.untrained_head = state["activation"], state["untrained_head"]
    scorer.widen(state["islands"])
    scorer.residuals.update({name: residual.to(device) for name, residual in load(state["residuals"]).items()})
    return scorer


def start(scorer: Scorer, devices: list[str] | None) -> Pool:
    """Start one worker for each device: all GPUs, or up to four CPU processes, when none are named."""
    if devices is None:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        devices = gpus or ["cpu"] * min(4, os.cpu_count() or 1)
    if not devices:
        raise ValueError("target_devices is empty: name at least one device, for example ['cpu', 'cpu'].")
    context = mp.get_context("spawn")  # a forked process inherits locked threads of torch
    inputs, outputs = context.Queue(), context.Queue()
    threads = max(1, torch.get_num_threads() // len(devices))
    state = portable(scorer)
    processes = [
        context.Process(target=_work, args=(state, str(device), threads, inputs, outputs), daemon=True)
        for device in devices
    ]
    for process in processes:
        process.start()
    return {"input": inputs, "output": outputs, "processes": processes}


@contextmanager
def temporary(scorer: Scorer, devices: Sequence[str | torch.device]) -> Iterator[Pool]:
    """A pool for one call."""
    pool = start(scorer, [str(device) for device in devices])
    try:
        yield pool
    finally:
        stop(pool)


def stop(pool: Pool) -> None:
    """End the workers and close the queues."""
    for process in pool["processes"]:
        process.terminate()
    for process in pool["processes"]:
        process.join()
        process.close()
    pool["input"].cancel_join_thread()
    pool["input"].close()
    pool["output"].close()


def scores(
    pool: Pool,
    pairs: list[tuple[str, str]],
    readout: Readout,
    *,
    instruction: str,
    max_tokens: int,
    chunk_size: int | None,
) -> Scores:
    """What `predict` returns for `pairs`, computed by the pool; a worker's error is raised here."""
    _check_travels(readout)
    if chunk_size is None:
        chunk_size = max(1, min(math.ceil(len(pairs) / len(pool["processes"]) / 10), 5000))
    if chunk_size <= 0:
        raise ValueError(f"chunk_size must be 1 or more; got {chunk_size}.")
    starts = range(0, len(pairs), chunk_size)
    call = next(_calls)
    for begin in starts:
        pool["input"].put(((call, begin), pairs[begin : begin + chunk_size], readout, instruction, max_tokens))
    parts: dict[int, Scores] = {}
    while len(parts) < len(starts):
        (answers, begin), result = _next(pool)
        if answers != call:
            continue  # a chunk of an earlier call that ended with an error
        if isinstance(result, Exception):
            raise result
        parts[begin] = result
    return merged([parts[begin] for begin in starts])


def _work(state: dict[str, Any], device: str, threads: int, inputs: Any, outputs: Any) -> None:
    torch.set_num_threads(threads)
    scorer = from_portable(state, device)
    while True:
        chunk, pairs, readout, instruction, max_tokens = inputs.get()
        try:
            result: Any = predict(scorer, pairs, activation=readout, instruction=instruction, max_tokens=max_tokens)
        except HalfrankError as error:
            result = error
        except Exception as error:  # anything else may not pickle: its text travels
            result = RuntimeError(f"A worker on {device} failed: {type(error).__name__}: {error}")
        outputs.put((chunk, result))


def _next(pool: Pool) -> tuple[tuple[int, int], Any]:
    while True:
        try:
            return pool["output"].get(timeout=1.0)
        except queue.Empty:
            dead = [process for process in pool["processes"] if not process.is_alive()]
            if dead:
                raise RuntimeError(
                    f"{len(dead)} of {len(pool['processes'])} workers ended with exit code {dead[0].exitcode}. "
                    "Start a pool under `if __name__ == '__main__':`, and with fewer processes where memory is short."
                ) from None


def _check_travels(readout: Readout) -> None:
    try:
        pickle.dumps(readout)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        text = f"activation_fn must pickle to reach the workers of a pool ({error}): use a torch module."
        raise ValueError(text) from error
