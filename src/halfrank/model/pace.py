"""How many tokens a forward pass takes at its fastest: measured once for a machine and a model's shape, and kept.

Short rows leave a processor's cores idle, long ones fall out of its cache. The number decides nothing but speed and
the rounding of float32 sums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from halfrank.data.packing import pack
from halfrank.data.tokens import NONE, Tokens, starts
from halfrank.errors import is_refusal
from halfrank.model.backends import CALL_TOKENS
from halfrank.model.scorer import PROBES, Scorer

log = logging.getLogger("halfrank")
FIXED = "HALFRANK_MAX_TOKENS"  # a number here is taken as it is: nothing is measured, read or kept
SIZES = (1024, 2048)  # none above the usual one: a long job takes no more memory than a short one
GPU_SIZES = (4096, 8192, 16384, 32768, 65536)
USUAL, GPU_USUAL = 2048, 16384
ROUNDS = 2
GAIN = 1.03  # a size that is not faster by this much than the usual one is not taken: it may be noise
WORTH = 20  # a job is measured for when it has this many times the tokens that measuring takes
SPREAD = (24, 256)  # tokens of the pairs that are measured with
_known: dict[str, int] = {}


def tokens_a_pass(scorer: Scorer, expected: int) -> int:
    """The tokens of one forward pass for a job of `expected` tokens in all.

    Measured where the job is long enough to pay for it, and kept in the user's cache folder; a cache that cannot be
    read or written costs the measurement, nothing else. Raises ValueError for a HALFRANK_MAX_TOKENS that is no number.
    """
    if scorer.engine is not None:
        return CALL_TOKENS  # it cuts pieces of its own, and shares out more of them at a time
    if fixed := os.environ.get(FIXED):
        return _fixed(fixed)
    usual, sizes = _sizes(scorer)
    key = _key(scorer)
    if key not in _known:
        kept = _read(_place()).get(key)
        kept = kept if kept in sizes else None
        if kept is None and not (scorer.packed and expected >= WORTH * ROUNDS * sum(sizes)):
            return usual
        _known[key] = kept if kept is not None else _measured_and_kept(scorer, key)
    return _known[key]


def measured(scorer: Scorer, sizes: tuple[int, ...]) -> dict[int, float]:
    """Seconds a token at each of `sizes`, the best of some rounds in turns; sizes that memory refuses are left out."""
    tokens = _sample(scorer, max(sizes))
    seconds: dict[int, float] = {}
    for size in (min(sizes), *sizes * ROUNDS):  # the first one warms up
        batch = pack(tokens, range(int(np.searchsorted(tokens.offsets, size, side="right")) - 1))
        started = time.perf_counter()
        try:
            scorer.logits(batch).sum().item()  # a GPU is waited for
        except (MemoryError, RuntimeError) as error:
            if not is_refusal(error):
                raise
            break
        a_token = (time.perf_counter() - started) / sum(batch.lengths)
        seconds[size] = min(seconds.get(size, a_token), a_token)
    return seconds


def fastest(seconds: dict[int, float], usual: int) -> int:
    """The size that takes least, if it is clearly better than the usual one."""
    if usual not in seconds:
        return min(seconds, default=usual)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * GAIN <= seconds[usual] else usual


def _measured_and_kept(scorer: Scorer, key: str) -> int:
    usual, sizes = _sizes(scorer)
    training = scorer.model.training
    scorer.model.eval()
    try:
        with torch.no_grad():
            found = fastest(measured(scorer, sizes), usual)
    finally:
        scorer.model.train(training)
    log.info("Forward passes of %d tokens are the fastest here.", found)
    _write(_place(), key, found)
    return found


def _sizes(scorer: Scorer) -> tuple[int, tuple[int, ...]]:
    return (USUAL, SIZES) if scorer.device.type == "cpu" else (GPU_USUAL, GPU_SIZES)


def _sample(scorer: Scorer, count: int) -> Tokens:
    """Pairs of all lengths with at least `count` tokens in all."""
    known = scorer.pairs.encode(PROBES).input_ids
    low, high = (min(length, scorer.max_length) for length in SPREAD)
    lengths = np.random.default_rng(0).integers(low, high + 1, count // low + 1)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), count)) + 1]
    return Tokens(np.resize(known, int(lengths.sum())), None, starts(lengths), NONE)


def _fixed(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise ValueError(f"{FIXED} is the number of tokens of a forward pass, such as {USUAL}; got {value!r}.")
    return int(value)


def _key(scorer: Scorer) -> str:
    """A name for all that the speed depends on: machine, versions, threads, format, every parameter's shape."""
    device = scorer.device
    machine = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    shapes = [(tuple(p.shape), str(p.dtype)) for p in scorer.model.parameters()]
    facts = [machine, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.__version__]
    facts += [type(scorer.model).__name__, scorer.active_compute.name, shapes]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _place() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "halfrank" / "pace.json"


def _read(path: Path) -> dict[str, int]:
    """What is kept; nothing where the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {str(key): value for key, value in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        log.debug("No measured pace in '%s': %s", path, error)
        return {}
    return {key: value for key, value in kept.items() if type(value) is int and value in {*SIZES, *GPU_SIZES}}


def _write(path: Path, key: str, found: int) -> None:
    """Keep `found` beside what is kept already, whole or not at all; of two writers one is heard."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as handle:
            json.dump({**_read(path), key: found}, handle, indent=1)
        try:
            os.replace(handle.name, path)
        finally:
            Path(handle.name).unlink(missing_ok=True)
    except OSError as error:
        log.debug("The measured pace is not kept: %s", error)
