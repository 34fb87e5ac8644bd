"""What a run will need, before it starts: bytes by part for each scheme, from a config and the data's lengths alone.

Activations are not looked up: the model's own code runs on shapes (`model/shadow.py`). All sizes are bytes.
"""

from __future__ import annotations

import copy
import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from halfrank.allocator import listed_size, resident, size_of_process
from halfrank.data.packing import by_budget
from halfrank.data.tokens import PairTokenizer
from halfrank.errors import MemoryLimitError, ModelError
from halfrank.model import folder
from halfrank.model.families import Layout
from halfrank.model.headers import Header, format_of, headers_in, headers_on_hub, layer_notes, refuse_misfit
from halfrank.model.scorer import MISFITS
from halfrank.model.shadow import Sizes, Traced, empty_model, sizes_of, trace
from halfrank.model.storage import comes_as_rows
from halfrank.numerics.moments import BLOCK
from halfrank.numerics.rows import PART
from halfrank.numerics.widen import has_numba, update_compiled
from halfrank.precision import Compute, Facts, choose, usual_hardware

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Threads, compiled kernels, the products' own scratch space: what any run holds beside the tensors that are counted.
RUNTIME = 40 * 10**6
ROOMY = 3  # times its plan a run has to have before freed blocks are kept: 1.2 to 2.3 times were measured
COMPILED = 10**8  # bytes that products in 16 bits hold beside tensors where each batch has new lengths, measured
LENGTHS = 8  # that a pass on shapes tells apart: sixty take forty seconds, for the same bytes within 1 %
# What training imports and compiles beyond what a plan does, measured: a model's classes, and what two extras bring.
LOADING, NUMBA, KERNEL_CODE, PEFT = 10 * 10**6, 110 * 10**6, 20 * 10**6, 55 * 10**6
LORA_RANK = 16  # of adapters that nobody has chosen yet
# Float32 temporaries of the update: torch's of 16-bit weights goes through tensors in pieces and makes a dozen of each;
# numba's kernel makes them for a block at a time, and float32 weights need one unscaled portion of their gradients.
SCRATCH, COMPILED_SCRATCH = 32 * 10**6, 4 * 10**6
# One forward pass costs 1, its backward pass 2; a released step has two backward passes.
COST = {(False, False): 3.0, (True, False): 4.0, (False, True): 5.0, (True, True): 7.0}


@dataclass(frozen=True)
class Described:
    """A model that was not loaded: its config, its sizes, and the format its files hold."""

    source: str
    config: Any
    sizes: Sizes
    arrived: torch.dtype
    layout: Layout | None = None  # known once it is loaded; else the likeliest
    lora_rank: int = 0  # of adapters that it has already: then they are all that is trained
    notes: tuple[str, ...] = ()  # what the user should know of the files


@dataclass(frozen=True)
class Way:
    """A way to train: the storage scheme, and what saves memory at the price of time."""

    scheme: str
    checkpointing: bool = False
    released: bool = False
    lora_rank: int = 0

    @property
    def storage(self) -> torch.dtype:
        """What matrices rest in."""
        name = self.scheme.removeprefix("lora-")
        return torch.float32 if name.startswith("mixed-") else getattr(torch, name)

    @property
    def cost(self) -> float:
        """Time of a step in forward passes."""
        return COST[self.checkpointing, self.released]

    def __str__(self) -> str:
        extra = [f"rank {self.lora_rank}"] if self.lora_rank else []
        extra += [
            *(["released gradients"] if self.released else []),
            *(["checkpointing"] if self.checkpointing else []),
        ]
        return ", ".join([self.scheme, *extra])


@dataclass(frozen=True)
class Need:
    """Bytes by part. Gradients and activations are at their largest at different moments: `peak` is not the sum."""

    weights: int
    residual: int
    moments: int
    gradients: int  # all of them, or where they are released the largest one
    activations: int  # of the heaviest micro-batch, after its forward pass
    peak: int  # above what the imported library holds

    def as_json(self) -> dict[str, int]:
        """The parts as plain numbers."""
        return dict(vars(self))


class Row(NamedTuple):
    """One way, what it needs at `max_tokens` tokens a pass, and whether that fits."""

    way: Way
    need: Need
    max_tokens: int
    fits: bool
    compute: str  # the format of products


@dataclass(frozen=True)
class Plan:
    """All ways side by side; `chosen` is the fastest that fits, None where none does."""

    model: str
    parameters: int
    pairs: int  # of the heaviest batch
    tokens: int  # of the heaviest batch
    limit: int
    base: int  # held by the process before the model
    rows: tuple[Row, ...]
    chosen: Row | None

    @property
    def roomy(self) -> bool:
        """Whether there is memory enough to keep freed blocks for the next step, which is faster."""
        return self.chosen is not None and self.base + ROOMY * self.chosen.need.peak <= self.limit

    def as_json(self) -> dict[str, Any]:
        """What `halfrank plan --json` prints."""
        rows = [
            {"scheme": r.way.scheme, "checkpointing": r.way.checkpointing, "released": r.way.released,
             "compute": r.compute, "max_tokens": r.max_tokens, "fits": r.fits, **r.need.as_json()}
            for r in self.rows
        ]  # fmt: skip
        chosen = None if self.chosen is None else self.rows.index(self.chosen)
        return {"model": self.model, "parameters": self.parameters, "batch_pairs": self.pairs,
                "batch_tokens": self.tokens, "limit": self.limit, "base": self.base, "rows": rows,
                "chosen": chosen, "roomy": self.roomy}  # fmt: skip

    def __str__(self) -> str:
        names = ("weights", "residual", "moments", "gradients", "activations", "peak")
        ways = [str(r.way) + ("" if r.compute == "float32" else f", {r.compute} products") for r in self.rows]
        wide = max(map(len, ways))
        lines = [
            f"{self.model}: {self.parameters / 1e6:.1f} M parameters; the heaviest batch has {self.pairs} pairs, "
            f"{self.tokens} tokens; {_size(self.limit)} may be used, {_size(self.base)} of it are taken already.",
            " ".join([" " * (wide + 2), *(f"{name:>11s}" for name in names), " tokens a pass"]),
        ]
        for way, row in zip(ways, self.rows, strict=True):
            mark = "->" if row == self.chosen else "  "
            parts = [f"{_size(getattr(row.need, name)):>11s}" for name in names]
            allowed = f"{row.max_tokens:>14d}" if row.fits else "  does not fit"
            lines.append(" ".join([f"{mark}{way:{wide}s}", *parts, allowed]))
        if self.roomy:
            lines.append("There is room for three times that: freed memory is kept for the next step, for speed.")
        if self.chosen is None:
            least = min(row.need.peak for row in self.rows)
            lines.append(
                f"Nothing fits: the smallest needs {_size(self.base + least)} with what is taken already. Shorten "
                "pairs (--max-length), take a smaller model, or use more memory."
            )
        return "\n".join(lines)


def parse_size(text: str) -> int:
    """Bytes of '16GiB', '500 MB' or a plain number; raises ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if found is None or (size := int(float(found[1]) * UNITS[(found[2] or "").lower()])) <= 0:
        raise ValueError(f"A memory size is a number above 0 with a unit, such as 16GiB or 500MB; got {text!r}.")
    return size


def describe(source: str | os.PathLike[str], options: folder.LoadOptions = folder.LoadOptions()) -> Described:
    """Read a model's config and the headers of its files; no weight is read.

    Raises ModelError where the two do not fit together.
    """
    name = os.fspath(source)
    config = folder.read_config(name, options)
    model, added = empty_model(config), folder.adapters_of(name, options)
    base = name if added is None else added.base
    stored = _stored(base, options)
    refuse_misfit(model, stored, base)
    arrived, rank = format_of(stored, config), 0
    if added is not None:
        arrived, rank = added.storage or arrived, int(added.config.r)
    notes = tuple(layer_notes(model, stored, base))
    return Described(name, config, sizes_of(model), arrived, lora_rank=rank, notes=notes)


def need(
    model: Described,
    way: Way,
    lengths: Sequence[int],
    *,
    compute: str = "float32",
    parts: int = 1,
) -> Need:
    """Bytes of training `model` in one `way`; `lengths` are the tokens of each pair of the heaviest micro-batch.

    `parts`: micro-batches of a step; gradients of several cannot be released.
    """
    tracer = _Tracer(model, compute)
    traced = tracer.of(way, lengths, released=way.released and parts == 1)
    return _summed(model, way, traced, sum(lengths), parts, tracer.runtime(way, lengths))


def plan(
    model: Described,
    batches: Iterable[Sequence[int]],
    *,
    limit: int,
    base: int | None = None,
    schemes: Sequence[str] | None = None,
    ways: Sequence[Way] | None = None,
    compute: str = "float32",
    max_tokens: int = 16384,
    lora_rank: int = 0,
    splits: bool = True,
) -> Plan:
    """Compare ways of training on batches whose pairs have the given lengths, and choose the fastest that fits.

    `base` is what the process holds already, by default its resident memory now. `schemes` limits the choice;
    without `splits` a batch goes through in one pass, whatever it needs. Products are in `compute`; "auto": in what
    training in each scheme would choose.
    """
    heaviest = max(batches, key=_weight_of)
    base = resident() if base is None else base
    tracer = _Tracer(model, compute)
    rows = [
        _row(tracer, way, heaviest, max_tokens, limit - base - _to_import(way), splits=splits)
        for way in (usual_ways(model, lora_rank) if ways is None else ways)
    ]
    wanted = [row for row in rows if row.fits and (schemes is None or row.way.scheme in schemes)]
    chosen = min(wanted, key=lambda row: (row.way.cost, -row.max_tokens), default=None)
    return Plan(model.source, model.sizes.parameters, len(heaviest), sum(heaviest), limit, base, tuple(rows), chosen)


def base_of_training() -> int:
    """Bytes that this process would hold before a model it trains in float32."""
    return resident() + LOADING + (NUMBA if has_numba() else 0)


def _to_import(way: Way) -> int:
    """Bytes of what training in one way imports and compiles, and what is not there yet."""
    if way.lora_rank:
        return 0 if "peft" in sys.modules else PEFT
    return KERNEL_CODE if way.storage is not torch.float32 and has_numba() and not update_compiled() else 0


def all_gradients(model: Described, way: Way) -> int:
    """Bytes of the gradients of everything that one way trains, at one time."""
    narrow, wide = _trained(model.sizes, way)
    return narrow * way.storage.itemsize + wide * 4


def usual_ways(model: Described, lora_rank: int = 0) -> list[Way]:
    """The ways that a plan compares, the plainest first; of a model with adapters those that train them."""
    if model.lora_rank:
        return _adapter_ways(str(model.arrived).removeprefix("torch."), model.lora_rank)
    narrow = "bfloat16" if model.arrived is torch.bfloat16 else "float16"
    ways = [Way("float32"), Way(f"mixed-{narrow}"), Way(narrow)]
    ways += [Way(narrow, checkpointing=True), Way(narrow, released=True), Way(narrow, True, True)]
    return ways + _adapter_ways(narrow, lora_rank or LORA_RANK)


def _adapter_ways(storage: str, rank: int) -> list[Way]:
    return [Way(f"lora-{storage}", checkpointing=often, lora_rank=rank) for often in (False, True)]


def micro_batch(lengths: Sequence[int], max_tokens: int) -> tuple[list[int], int]:
    """The heaviest micro-batch of a batch within a token budget, and how many there are."""
    cuts = by_budget(np.asarray(lengths), max_tokens)
    heaviest = max(([lengths[row] for row in cut] for cut in cuts), key=_weight_of)
    return heaviest, len(cuts)


def batches_of(units: Sequence[Sequence[int]], batch_size: int, *, seed: int = 0) -> Iterator[list[int]]:
    """Lengths of the pairs of each batch of one shuffled epoch; a unit is a pair or a group."""
    order = np.random.default_rng([seed, 0]).permutation(len(units)).tolist()
    for start in range(0, len(order), batch_size):
        yield [length for unit in order[start : start + batch_size] for length in units[unit]]


def tokenizer_of(model: Described, options: folder.LoadOptions) -> PairTokenizer:
    """The tokenizer that training would use, from its files alone."""
    tokenizer, longest = folder.read_tokenizer(model.source, empty_model(copy.deepcopy(model.config)), options)
    return PairTokenizer(tokenizer, longest)


def limit_of_machine() -> int:
    """Bytes this process may hold: what the machine has free and what it holds itself, within its control group and
    the address space it may map (`ulimit -v`)."""
    free = listed_size(Path("/proc/meminfo"), "MemAvailable")
    allowed = (free if free is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) + resident()
    for most, used in _groups():
        allowed = min(allowed, most - used + resident())
    mapped, _ = resource.getrlimit(resource.RLIMIT_AS)
    if mapped != resource.RLIM_INFINITY:
        allowed = min(allowed, mapped - int(size_of_process("VmSize") or 0) + resident())
    return allowed


def room(limit: int | None = None) -> int:
    """Bytes that may still be taken, within `limit` for the whole process and within what the machine has."""
    machine = limit_of_machine()
    return (machine if limit is None else min(limit, machine)) - resident()


def require(needed: int, limit: int | None, what: str) -> None:
    """Raise MemoryLimitError where `needed` bytes are more than there is room for."""
    left = room(limit)
    if needed > left:
        raise MemoryLimitError(f"{what} needs {_size(needed)}, and {_size(max(left, 0))} are left.")


class _Tracer:
    """Passes on shapes, each distinct one once, and what no tensor is."""

    def __init__(self, model: Described, compute: str) -> None:
        self.model, self._compute = model, compute
        self._facts = Facts(model.sizes.parameters, model.arrived, usual_hardware())
        self._known: dict[tuple[Any, ...], Traced] = {}

    def compute(self, way: Way) -> Compute:
        """The format of products in one way."""
        return choose(self._facts, scheme=way.scheme, compute=self._compute).compute

    def of(self, way: Way, lengths: Sequence[int], *, released: bool) -> Traced:
        compute, lengths = self.compute(way), _alike(lengths)
        key = (way.storage, compute.name, way.checkpointing, way.lora_rank > 0, released, *lengths)
        if key not in self._known:
            try:
                self._known[key] = trace(
                    copy.deepcopy(self.model.config), lengths, dtype=way.storage, compute=compute,
                    checkpointing=way.checkpointing, released=released, frozen=way.lora_rank > 0,
                    layout=self.model.layout,
                )  # fmt: skip
            except MISFITS as error:
                raise ModelError(
                    f"'{self.model.source}' does not run on shapes alone ({type(error).__name__}: "
                    f"{str(error).strip()[:120]}), so nobody can say beforehand what it needs. Train it without a plan."
                ) from error
        return self._known[key]

    def runtime(self, way: Way, lengths: Sequence[int]) -> int:
        """Bytes beside the tensors; pairs of different lengths in the heaviest batch stand for different batches."""
        compiles = self.compute(way).arithmetic is not torch.float32 and len(set(lengths)) > 1
        return RUNTIME + (COMPILED if compiles else 0)


def _alike(lengths: Sequence[int]) -> list[int]:
    """As many pairs with about as many tokens, of few lengths: each length has operations of its own to be traced."""
    parts = np.array_split(np.sort(np.asarray(lengths)), min(LENGTHS, len(lengths)))
    few = [round(float(part.mean())) for part in parts for _ in part]
    return list(lengths) if len(set(lengths)) <= LENGTHS else few


def _row(tracer: _Tracer, way: Way, batch: Sequence[int], max_tokens: int, left: int, *, splits: bool) -> Row:
    """The largest budget, halved from `max_tokens` where a batch may be split, at which a way fits; else what it needs
    at the smallest."""
    part, parts = micro_batch(batch, max_tokens)
    full = tracer.of(way, part, released=way.released and parts == 1)
    runtime = tracer.runtime(way, batch)
    row = _row_at(tracer, way, full, sum(part), parts, max_tokens, left, runtime)
    if row.fits or not splits or way.released or max_tokens // 2 < max(batch):  # a released step is one micro-batch
        return row
    whole, short = sum(part), [max(batch)]
    least = tracer.of(way, short, released=False)
    while not row.fits and row.max_tokens // 2 >= max(batch):
        part, parts = micro_batch(batch, row.max_tokens // 2)
        share = (sum(part) - short[0]) / max(whole - short[0], 1)
        between = _between(least, full, share)
        row = _row_at(tracer, way, between, sum(part), parts, row.max_tokens // 2, left, runtime)
    return row


def _row_at(
    tracer: _Tracer, way: Way, traced: Traced, tokens: int, parts: int, max_tokens: int, left: int, runtime: int
) -> Row:
    found = _summed(tracer.model, way, traced, tokens, parts, runtime)
    fits = found.peak <= left and not (way.released and parts > 1)
    return Row(way, found, max_tokens, fits, tracer.compute(way).name)


def _between(least: Traced, full: Traced, share: float) -> Traced:
    """What packed rows hold grows with their tokens, and nothing else of it does."""
    small, large = (least.forward, least.peak, least.end), (full.forward, full.peak, full.end)
    return Traced(*(int(a + share * (b - a)) for a, b in zip(small, large, strict=True)))


def _summed(model: Described, way: Way, traced: Traced, tokens: int, parts: int, runtime: int) -> Need:
    sizes, width = model.sizes, way.storage.itemsize
    packed = way.storage is not torch.float32
    released = way.released and parts == 1
    trained_narrow, trained_wide = _trained(sizes, way)
    weights = sizes.narrow * width + (sizes.wide + way.lora_rank * sizes.sides) * 4
    residual = trained_narrow if packed else 0
    per_narrow = 2 + 4 / BLOCK if packed else 8.0
    moments = int(trained_narrow * per_narrow) + trained_wide * 8
    rows = 0 if way.lora_rank else min(tokens * sizes.width, sizes.largest_embedding)
    # Then gradients are the rows that were seen.
    few = comes_as_rows(sizes.largest_embedding, way.storage, torch.device("cpu"), narrow=released)
    tables = 0 if way.lora_rank else (rows if few else sizes.embeddings) * width
    gradients = max(sizes.largest * width, tables) if released else all_gradients(model, way)
    if few and not released and not way.lora_rank:
        gradients -= max(sizes.largest_embedding - rows * parts, 0) * width
    # Embeddings come last in a backward pass; the rows of a batch are summed in float32 first.
    at_end = traced.end + tables + rows * 4
    scratch = COMPILED_SCRATCH if has_numba() or not packed else SCRATCH
    scratch += 4 * PART + rows * 4 if few and not packed else 0  # a part's dense gradient, the rows unscaled
    most = max(traced.peak, at_end, (0 if released else gradients) + scratch)
    if parts > 1:  # the sums of the micro-batches before lie beside the activations of the next
        most = gradients + max(traced.forward + max(traced.peak - max(traced.forward, traced.end), 0), scratch)
    peak = weights + residual + moments + most + runtime
    return Need(weights, residual, moments, gradients, traced.forward, peak)


def _trained(sizes: Sizes, way: Way) -> tuple[int, int]:
    """Elements that are trained: those that rest in 16 bits where the scheme is one of these, and others."""
    return (0, sizes.head + way.lora_rank * sizes.sides) if way.lora_rank else (sizes.narrow, sizes.wide)


def _weight_of(lengths: Sequence[int]) -> tuple[int, int]:
    # Attention grows with the square of a length: of two batches with equal tokens the one with longer pairs.
    return sum(lengths), sum(length * length for length in lengths)


def _stored(source: str, options: folder.LoadOptions) -> dict[str, Header]:
    place = folder.file_of(source, "config.json", options=options)
    found = {} if place is None else headers_in(Path(place).parent)
    if not found and not options.local_files_only and not Path(source).exists():
        found = headers_on_hub(source, options.revision, options.token)
    return found


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, used) of the control groups that this process is in, version 2 and version 1."""
    named = Path("/proc/self/cgroup")
    inside = named.read_text().splitlines() if named.exists() else []
    for line in inside:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            place, most, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            place, most, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folders = [place.joinpath(*Path(path).parts[1:end]) for end in range(1, len(Path(path).parts) + 1)]
        for group in folders:
            limit, now = _number(group / most), _number(group / used)
            if limit is not None and now is not None:
                yield limit, now


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() and int(text) < 2**60 else None


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
