"""Runtimes that compute a padded batch from a graph: ONNX Runtime and OpenVINO, on the CPU.

A batch arrives longest pair first; it is cut into pieces of few tokens, whose pairs are nearly as long as each other,
and the pieces run side by side, one thread each: nobody waits for the others after every layer.
Shapes: P pairs, B pairs of a piece, M tokens of its longest, L labels.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfrank.data.packing import Batch
from halfrank.errors import MissingExtraError, ModelError
from halfrank.precision import detect

PIECE_TOKENS = 1024  # padded tokens of one piece: what a layer makes of them stays in a core's cache
CALL_TOKENS = 32768  # tokens of one call: enough pieces that no thread waits long for the last one
MAX_WORKERS = 16
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # may be called by several threads at once


class Format(NamedTuple):
    """Where a graph lies in a folder, as sentence-transformers and others look for it, and what it needs."""

    name: str  # also the name of the extra
    file: str
    packages: tuple[str, ...]  # that writing one needs


FORMATS = {
    "onnx": Format("onnx", "onnx/model.onnx", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format("openvino", "openvino/openvino_model.xml", ("openvino", "nncf")),
}


def format_named(name: str, *, kind: str = "format", more: tuple[str, ...] = ()) -> Format:
    """One of `FORMATS`; raises ValueError for another name, calling it a `kind` that may also be one of `more`."""
    if name not in FORMATS:
        raise ValueError(f"{kind} must be one of {', '.join((*more, *FORMATS))}; got {name!r}.")
    return FORMATS[name]


def needed(package: str, extra: str) -> ModuleType:
    """An optional package; raises MissingExtraError with the line that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"This needs the package {package} ({error}). Install it: pip install 'halfrank[{extra}]'"
        ) from error


class Opened(NamedTuple):
    """A graph that a runtime has compiled."""

    run: Run
    inputs: tuple[str, ...]
    labels: int | None  # None: the graph does not say


class Engine:
    """A graph and the threads that run it."""

    def __init__(self, kind: str, path: Path, opened: Opened, *, compute: str, workers: int) -> None:
        self.kind, self.path, self.compute = kind, path, compute
        self.name = NAMES[kind]
        self._opened, self._workers = opened, workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="halfrank")

    @property
    def labels(self) -> int | None:
        """Scores per pair, where the graph says."""
        return self._opened.labels

    def logits(self, batch: Batch, filler: int) -> Tensor:
        """Float32 logits (P, L) in the batch's order, which is longest first; `filler` pads."""
        pieces = list(_pieces(batch.lengths, self._budget(batch.lengths)))
        ids, types = batch.input_ids.numpy(), None if batch.token_type_ids is None else batch.token_type_ids.numpy()
        starts = np.cumsum([0, *batch.lengths])

        def compute(piece: range) -> np.ndarray:
            return self._opened.run(_padded(ids, types, starts, piece, filler, self._opened.inputs))

        return torch.from_numpy(np.concatenate(list(self._threads.map(compute, pieces))).astype(np.float32, copy=False))

    def _budget(self, lengths: Sequence[int]) -> int:
        # Few pairs are shared out as well: one thread would otherwise compute all of them.
        return min(PIECE_TOKENS, -(-sum(lengths) // self._workers))


def opened(kind: str, path: Path, *, compute: str = "auto") -> Engine:
    """Compile the graph at `path`; raises ModelError for what cannot be read or is no cross-encoder's graph.

    `compute` is float32 (also for auto) or, for OpenVINO on a processor that has it, bfloat16.
    """
    found = format_named(kind)
    allowed = ("float32", "bfloat16") if kind == "openvino" else ("float32",)
    named = "float32" if compute == "auto" else compute
    if named not in allowed:
        raise ValueError(f"backend={kind!r} computes in {' or '.join(allowed)}; got compute={compute!r}.")
    if named == "bfloat16" and not detect().bfloat16_products:
        raise ValueError(f"compute='bfloat16' needs a processor that multiplies it; this is a {detect().why}.")
    runtime = needed("onnxruntime" if kind == "onnx" else "openvino", found.name)
    threads = torch.get_num_threads()
    workers = min(threads, MAX_WORKERS)
    start = _onnx_runtime if kind == "onnx" else _openvino
    try:
        graph = start(runtime, path, named, workers, max(threads // workers, 1))
    except Exception as error:  # each runtime has errors of its own, and none of them names the file
        raise ModelError(
            f"{NAMES[kind]} cannot read '{path}' ({type(error).__name__}: {' '.join(str(error).split())[:300]}). "
            f"Export it again: halfrank export MODEL --format {kind} --out FOLDER"
        ) from error
    unknown = [name for name in graph.inputs if name not in INPUTS]
    if unknown:
        raise ModelError(
            f"The graph '{path}' takes {', '.join(unknown)}; that of a cross-encoder takes {', '.join(INPUTS)}."
        )
    return Engine(kind, path, graph, compute=named, workers=workers)


def _onnx_runtime(runtime: Any, path: Path, compute: str, workers: int, threads: int) -> Opened:
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (output, *_) = session.get_outputs()
    return Opened(
        lambda inputs: session.run([output.name], inputs)[0],
        tuple(port.name for port in session.get_inputs()),
        output.shape[-1] if isinstance(output.shape[-1], int) else None,
    )


def _openvino(runtime: Any, path: Path, compute: str, workers: int, threads: int) -> Opened:
    core = runtime.Core()
    compiled = core.compile_model(
        path,
        "CPU",
        {
            # Left to itself it computes in bfloat16 wherever the processor can, whatever the weights are.
            "INFERENCE_PRECISION_HINT": "bf16" if compute == "bfloat16" else "f32",
            "NUM_STREAMS": workers,
            "INFERENCE_NUM_THREADS": workers * threads,
        },
    )
    own = threading.local()

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        own.request.infer(inputs, share_inputs=True)
        return own.request.get_output_tensor(0).data.copy()  # the next call writes into the same place

    shape = compiled.output(0).partial_shape
    return Opened(
        run,
        tuple(port.any_name for port in compiled.inputs),
        shape[1].get_length() if shape[1].is_static else None,
    )


def _pieces(lengths: Sequence[int], budget: int) -> Iterator[range]:
    """Neighbours whose count times their longest stays within the budget; a longer pair goes alone."""
    first = 0
    for row in range(1, len(lengths) + 1):
        if row == len(lengths) or (row + 1 - first) * lengths[first] > budget:
            yield range(first, row)
            first = row


def _padded(
    ids: np.ndarray, types: np.ndarray | None, starts: np.ndarray, piece: range, filler: int, wanted: Sequence[str]
) -> dict[str, np.ndarray]:
    """The inputs (B, M) that a graph takes for the pairs of one piece, padded on the right."""
    begins, ends = starts[piece.start : piece.stop], starts[piece.start + 1 : piece.stop + 1]
    there = np.arange((ends - begins).max()) < (ends - begins)[:, None]
    part = slice(begins[0], ends[-1])
    found = {"input_ids": np.full(there.shape, filler, np.int64), "attention_mask": there.astype(np.int64)}
    found["input_ids"][there] = ids[part]
    if "token_type_ids" in wanted:
        found["token_type_ids"] = np.zeros(there.shape, np.int64)
        if types is not None:
            found["token_type_ids"][there] = types[part]
    return {name: found[name] for name in wanted}
