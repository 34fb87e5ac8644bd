"""The public face against sentence-transformers' own, name by name, parameter by parameter, shape by shape.

Every public name that sentence_transformers defines for CrossEncoder or that scripts in the field use, every
parameter of each method, current and older, and every return shape has a row; where it can be called, both classes
are called in this process with the same tiny folders and must agree. `--quick` leaves out
worker processes and the older training loop. The table of the full form goes to docs/compat.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import sentence_transformers as peer
import torch
import transformers
from torch import Tensor, nn

from common import ROOT, arguments, finish

sys.path.insert(0, str(ROOT / "tests"))
import surface
from halfrank import CrossEncoder, InputExample

LEAST = 0.95
TOLERANCE = 2e-6
EXCLUDED = "PeftAdapterMixin"  # adapters of peft, beside what torch.nn.Module brings
REASONS = {
    "merge(base_model)": "averages need no base; methods over differences are mergekit's",
    "merge(batch_options)": "mergekit's own packing of tensors",
    "compile": "torch.compile folds float32 -> float16 -> float32 away, which deletes what 16-bit training keeps",
    "clear_placement_cache": "there are no placement hooks: a model lies on one device",
    "fit(save_best_model)": "without a best model the last one is written; the peer writes none",
    "old_fit(save_best_model)": "without a best model the last one is written; the peer writes none",
    "named_parameters": "names are those of the transformers model, without '0.model.'",
    "state_dict": "names are those of the transformers model, without '0.model.'",
    "__init__(modules)": "modules of the peer's kind are read from folders, not from objects",
    "__init__(backend='onnx')": "a graph is made by halfrank export and never on loading",
    "old_fit(use_amp)": "the peer's older loop computes in bfloat16 on any CPU, ours where that is faster, and says so",
    "predict(processing_kwargs)": "set max_length on the model instead",
    "predict(positions: batch size in fourth place)": "the order of 2.x to 5.x is kept: batch_size is second",
    "save(safe_serialization=False)": "halfrank writes no pickles",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One name, parameter or return shape; `how` says what was compared."""

    what: str
    kind: str
    equal: bool
    how: str
    note: str = ""


# Comparing


def alike(ours: Any, theirs: Any) -> bool:
    """Same types, shapes and numbers all the way down; errors of related kinds."""
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        return isinstance(theirs, Exception) and isinstance(ours, Exception)
    if isinstance(theirs, surface.Trained):
        return _moved_alike(ours, theirs)
    if isinstance(theirs, (np.ndarray, np.generic, Tensor)):
        # The peer's empty array is float64; ours joins other scores unchanged.
        same_dtype = ours.dtype == theirs.dtype or theirs.shape == (0,)
        near = same_dtype and ours.shape == theirs.shape and type(ours) is type(theirs)
        return bool(near and np.allclose(_plain(ours), _plain(theirs), atol=TOLERANCE, rtol=1e-5))
    if isinstance(theirs, float):
        return isinstance(ours, float) and abs(ours - theirs) <= TOLERANCE
    if isinstance(theirs, Mapping):
        return (
            type(ours) is type(theirs) and list(ours) == list(theirs) and all(alike(ours[k], theirs[k]) for k in ours)
        )
    if isinstance(theirs, (list, tuple)):
        return (
            type(ours) is type(theirs)
            and len(ours) == len(theirs)
            and all(alike(a, b) for a, b in zip(ours, theirs, strict=True))
        )
    return bool(ours == theirs)


def _plain(values: Any) -> np.ndarray:
    return np.asarray(values.detach().float() if isinstance(values, Tensor) else values)


def _moved_alike(ours: surface.Trained, theirs: surface.Trained) -> bool:
    moved = abs(theirs.after - theirs.before).max()
    return bool(abs(ours.after - theirs.after).max() <= max(0.01 * moved, TOLERANCE))


def outcome(probe: surface.Probe, kind: Any, at: surface.Places) -> Any:
    torch.manual_seed(0)
    try:
        return probe(kind, at)
    except Exception as error:
        return error


def compared(what: str, kind: str, probe: surface.Probe, at: surface.Places) -> Row:
    ours, theirs = (outcome(probe, one, at) for one in (CrossEncoder, peer.CrossEncoder))
    equal = alike(ours, theirs)
    return Row(
        what, kind, equal, "both called", "" if equal else REASONS.get(what, f"UNEXPLAINED: {_told(ours, theirs)}")
    )


def _told(ours: Any, theirs: Any) -> str:
    return f"ours {ours!r:.160}, theirs {theirs!r:.160}".replace("\n", " ").replace("|", "/")


# Rows


def public_names(model: Any) -> list[str]:
    """What the peer's own classes define and what their instances carry, and what the facts page lists."""
    found = {name for name in vars(model) if not name.startswith("_")}
    for kind in type(model).__mro__:
        if kind.__module__.startswith("sentence_transformers") and kind.__name__ != EXCLUDED:
            found |= {name for name in vars(kind) if not name.startswith("_")}
    return sorted(found | set(surface.FACTS))


def name_rows(at: surface.Places) -> Iterator[Row]:
    mine, other = CrossEncoder(at.one), peer.CrossEncoder(at.one)
    for name in public_names(other):
        if not hasattr(mine, name):
            yield Row(name, "name", False, "absent", REASONS.get(name, "UNEXPLAINED: absent"))
        elif name in surface.NAMES:
            yield compared(name, "name", surface.NAMES[name], at)
        else:
            same = callable(getattr(mine, name)) == callable(getattr(other, name)) and name in surface.METHODS
            yield Row(name, "name", same, "both there", "" if same else "UNEXPLAINED: no probe")


def signature(kind: Any, method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(inspect.unwrap(getattr(kind, method))).parameters


def parameters_of(method: str) -> list[str]:
    """The peer's parameters of a method without `self`, then the older names."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [name for name, one in signature(peer.CrossEncoder, method).items() if one.kind not in variadic]
    return [name for name in own if name != "self"] + surface.OLDER.get(method, [])


def parameter_rows(at: surface.Places, whole: bool) -> Iterator[Row]:
    for method in ["__init__", *public_names(peer.CrossEncoder(at.one))]:
        member = inspect.getattr_static(peer.CrossEncoder, method, None)
        if not inspect.isroutine(member) and not isinstance(member, (classmethod, staticmethod)):
            continue
        if method in surface.FACTS or getattr(member, "__module__", "").startswith("torch"):
            continue
        for name in parameters_of(method):
            what = f"{method}({name})"
            if not hasattr(CrossEncoder, method):
                yield Row(what, "parameter", False, "absent", f"as `{method}`")
                continue
            probes = surface.METHODS.get(method, {})
            probe = (surface.POOLED.get((method, name)) if whole else None) or probes.get(name)
            if method == "old_fit" and not whole:
                probe = None
            known = name in signature(CrossEncoder, method)
            if not known or not _same_default(method, name):
                yield Row(
                    what, "parameter", False, "signature", REASONS.get(what, "UNEXPLAINED: absent or other default")
                )
            elif probe is None:
                unseen = (method, name) in surface.POOLED or method in (*surface.NOT_CALLED, "old_fit")
                yield Row(what, "parameter", unseen, "signature", "" if unseen else "UNEXPLAINED: no probe")
            else:
                yield compared(what, "parameter", probe, at)
    for name in surface.SCHEDULERS:
        probe = surface.fitted("fit", {"scheduler": name, "warmup_steps": 1})
        yield compared(f"fit(scheduler={name!r})", "parameter", probe, at)
    for name, probe in surface.INVOKED.items():
        yield compared(f"__init__({name})", "parameter", probe, at)
    for name, probe in surface.PLACES_OF_PREDICT.items():
        yield compared(f"predict({name})", "parameter", probe, at)


def _same_default(method: str, name: str) -> bool:
    theirs = signature(peer.CrossEncoder, method).get(name)
    if theirs is None:
        return True  # an older name: the peer takes it in a decorator
    ours = signature(CrossEncoder, method)[name].default
    if name == "optimizer_class":  # the same formula, for 16-bit weights too
        return issubclass(ours, torch.optim.Optimizer) and ours.__name__ == theirs.default.__name__
    if name == "optimizer_params":  # a mutable default: filled in when called
        return ours is None and theirs.default == {"lr": 2e-5}
    if isinstance(theirs.default, nn.Module):
        return type(ours) is type(theirs.default)
    needed = theirs.default is inspect.Parameter.empty  # where the peer needs it, ours may take an older name instead
    return needed or bool(ours == theirs.default)


def return_rows(at: surface.Places) -> Iterator[Row]:
    for name, probe in {**surface.RETURNS, **surface.WITHOUT_PICKLES}.items():
        yield compared(name, "return", probe, at)


def example_rows(at: surface.Places) -> Iterator[Row]:
    for field in ("guid", "texts", "label"):
        ours, theirs = (getattr(kind("one", ["a", "b"], 0.5), field) for kind in (InputExample, peer.InputExample))
        yield Row(f"InputExample({field})", "parameter", alike(ours, theirs), "both called")


# The page


def page(rows: list[Row]) -> str:
    different = [row for row in rows if not row.equal]
    lines = [
        "# Compatibility",
        "",
        f"`halfrank.CrossEncoder` against that of sentence-transformers {peer.__version__}: every public name,",
        "parameter and return shape, both classes called in one process with the same tiny folders. Members that come",
        "from torch and peft are left out, except those that scripts use. Written by `benchmarks/compat.py`; do not",
        "edit.",
        "",
        f"{len(rows) - len(different)} of {len(rows)} are equal. The others:",
        "",
        "| what | kind | why |",
        "|---|---|---|",
        *(f"| `{row.what}` | {row.kind} | {row.note} |" for row in different),
        "",
        "Equal, by kind, and how it was found:",
        "",
    ]
    for kind in ("name", "parameter", "return"):
        lines += [f"## {kind.capitalize()}s", "", "| what | how |", "|---|---|"]
        lines += [f"| `{row.what}` | {row.how} |" for row in rows if row.equal and row.kind == kind]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def quietly(run: Callable[[], list[Row]]) -> list[Row]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return run()
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as temporary:
        at = surface.places(Path(temporary))
        rows = quietly(
            lambda: [*name_rows(at), *parameter_rows(at, whole=not options.quick), *example_rows(at), *return_rows(at)]
        )
    for row in rows:
        if not row.equal:
            print(f"{row.what}: {row.note}")
    if not options.quick:
        (ROOT / "docs" / "compat.md").write_text(page(rows), encoding="utf-8")
    equal = sum(row.equal for row in rows)
    unexplained = [row.what for row in rows if "UNEXPLAINED" in row.note]
    bars = {
        f"{equal} of {len(rows)} rows equal, at least {LEAST:.0%}": equal >= LEAST * len(rows),
        "every other row has its reason": not unexplained,
    }
    result = {"rows": [dataclasses.asdict(row) for row in rows]}
    finish("compat", options.quick, result, bars, f"{equal} of {len(rows)} equal ({equal / len(rows):.1%})")


if __name__ == "__main__":
    main()
