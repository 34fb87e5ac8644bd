"""The state of a run on disk: everything that decides its next step, in safetensors and JSON."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from halfrank.errors import TrainingError
from halfrank.model.pieces import Source, TensorFile, write_file
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.whole import finish_interrupted, write_whole

STATE = "state.json"
TENSORS = "state.safetensors"
JOURNAL = "train.jsonl"
CHECKPOINT, GOOD, GOOD_BEFORE = "checkpoint", "good", "good-before"
HOST_BYTES = 512 * 2**20  # a larger state is kept on disk: host memory is what a 16-bit run was chosen for


@dataclass
class Progress:
    """Where a run stands: the plain numbers of a checkpoint."""

    step: int = 0  # updates tried, skipped ones included
    epoch: int = 0
    position: int = 0  # batches finished in this epoch
    skipped: int = 0
    skipped_in_a_row: int = 0
    lines: int = 0  # of train.jsonl
    good_step: int = 0  # where the last good state stands
    best_score: float | None = None
    best_step: int = 0
    without_better: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    loss_scale: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True)
class State:
    """All that decides the next step: tensors by name, read when they are asked for, and plain values for JSON."""

    tensors: Mapping[str, Tensor]
    content: dict[str, Any]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def state_of(scorer: Scorer, optimizer: torch.optim.Optimizer, progress: Progress, settings: dict[str, Any]) -> State:
    """The state of a run as it stands; tensors are the run's own, not copies."""
    state = optimizer.state_dict()
    tensors, numbers = _flatten(state["state"])
    tensors["random"] = torch.get_rng_state()
    if scorer.device.type == "cuda":
        tensors["random_cuda"] = torch.cuda.get_rng_state(scorer.device)
    tensors |= {f"weights.{name}": tensor for name, tensor in _weights(scorer).items()}
    content = {
        "settings": settings,
        "progress": asdict(progress),
        "islands": list(scorer.islands),
        "optimizer": {"numbers": numbers, "groups": state["param_groups"]},
    }
    return State(tensors, content)


def put_back(state: State, scorer: Scorer, optimizer: torch.optim.Optimizer) -> Progress:
    """Bring scorer, residuals, optimizer and random state back to the bit; islands stay and those stored join them."""
    load_weights(scorer, state.tensors, prefix="weights.")
    entries = _unflatten(state.tensors, state.content["optimizer"]["numbers"])
    # Ours copies one tensor after the other; other optimizers take plain dictionaries, all tensors at once.
    stored = entries if isinstance(optimizer, AdamW) else {index: dict(entry) for index, entry in entries.items()}
    optimizer.load_state_dict({"state": stored, "param_groups": state.content["optimizer"]["groups"]})
    scorer.residuals = residuals_of(scorer, optimizer)
    if set(state.content["islands"]) - set(scorer.islands):
        scorer.widen(state.content["islands"])
    torch.set_rng_state(state.tensors["random"])
    if "random_cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["random_cuda"], scorer.device)
    return Progress(**state.content["progress"])


def write_checkpoint(folder: Path, state: State) -> None:
    """Write a state; whole or not at all."""

    def write(stage: Path) -> None:
        content = state.content | {"checksum": _write_tensors(stage, state.tensors)}
        (stage / STATE).write_text(json.dumps(content, indent=1, default=_plain), encoding="utf-8")

    write_whole(folder, write)


def read_checkpoint(folder: Path, settings: dict[str, Any]) -> State:
    """Read a state back; raises TrainingError where there is none, a damaged one, or another run's."""
    finish_interrupted(folder)
    if not (folder / STATE).exists():
        raise TrainingError(f"'{folder}' holds no checkpoint: start without --resume.")
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        stored, expected = content["settings"], content["checksum"]
        tensors = TensorFile(folder / TENSORS)
    except (ValueError, KeyError, TypeError, FileNotFoundError, SafetensorError) as error:
        raise _damaged(folder, f"it cannot be read ({error})") from None
    _same_run(folder, stored, settings)
    if tensors.checksum() != expected:
        raise _damaged(folder, f"the bytes of '{TENSORS}' are not those that were written")
    return State(tensors, content)


def _damaged(folder: Path, why: str) -> TrainingError:
    good = folder.parent / GOOD
    other = folder.name == CHECKPOINT and (good / TENSORS).exists() and not (good / TENSORS).samefile(folder / TENSORS)
    step = _step_of(good) if other else None
    advice = (
        "start a new folder from the last saved model"
        if step is None
        else f"put '{good}', the state of step {step}, in its place to go on from there"
    )
    return TrainingError(f"The checkpoint in '{folder}' is damaged: {why}. Remove it, and {advice}.")


def never_saved(out: Path) -> bool:
    """Whether a run began in `out` and ended before its first checkpoint was there."""
    finish_interrupted(out / CHECKPOINT)
    return (out / JOURNAL).exists() and not (out / CHECKPOINT / STATE).exists()


class LastGood:
    """The last two states of a run that were known to be sound: beside its checkpoint, else on the host or in a scratch
    folder.

    Two, because weights may be lost before it shows. Beside a checkpoint each is a second name of the same files.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._held: list[tuple[int, State | Path]] = []  # step and state, where there is no output folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, state: State) -> None:
        """Remember `state`, which where there is an output folder has just been written as its checkpoint."""
        if self._out is not None:
            self._rotate(self._out)
            return
        step = int(state.content["progress"]["step"])
        if state.nbytes() <= HOST_BYTES:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.tensors.items()}
            held: State | Path = State(tensors, json.loads(json.dumps(state.content, default=_plain)))
        else:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="halfrank-")
            held = Path(self._scratch.name) / str(step)
            write_checkpoint(held, state)
        for _, dropped in self._held[:-1]:
            if isinstance(dropped, Path):
                shutil.rmtree(dropped)
        self._held = [*self._held[-1:], (step, held)]

    def get(self, settings: dict[str, Any], *, earlier: bool) -> State:
        """The state that was kept last, or where it is `earlier` and there is one, that before it."""
        if self._out is not None:
            before = self._out / GOOD_BEFORE
            return read_checkpoint(before if earlier and (before / STATE).exists() else self._out / GOOD, settings)
        held = self._held[0 if earlier else -1][1]
        if isinstance(held, Path):
            return read_checkpoint(held, settings)
        # Copies: an optimizer may go on with the very tensors that it loads.
        return State({name: tensor.clone() for name, tensor in held.tensors.items()}, held.content)

    def agree(self, progress: Progress) -> None:
        """Make the kept states those of a run that stands at `progress`, after a step back or a kill.

        Its checkpoint is a good state as well where it says so, and states from after it are no longer to be had.
        """
        self._held = [(step, state) for step, state in self._held if step <= progress.step]
        if self._out is None:
            return
        good, before = self._out / GOOD, self._out / GOOD_BEFORE
        for path in (good, before):
            if path.exists():
                finish_interrupted(path)
        stands_there = progress.good_step == progress.step
        if stands_there and _step_of(good) is not None and _step_of(good) > progress.step:  # type: ignore[operator]
            shutil.rmtree(good)
            shutil.rmtree(before, ignore_errors=True)
        if _step_of(good) is None or (stands_there and _step_of(good) != progress.step):
            self._rotate(self._out)

    def drop(self) -> None:
        """Forget the states and free their files."""
        self._held = []
        if self._scratch is not None:
            self._scratch.cleanup()
        if self._out is not None:
            shutil.rmtree(self._out / GOOD, ignore_errors=True)
            shutil.rmtree(self._out / GOOD_BEFORE, ignore_errors=True)

    def _rotate(self, out: Path) -> None:
        if (out / GOOD / STATE).exists():
            shutil.rmtree(out / GOOD_BEFORE, ignore_errors=True)
            os.replace(out / GOOD, out / GOOD_BEFORE)
        write_whole(out / GOOD, lambda stage: _link(out / CHECKPOINT, stage))


def _step_of(folder: Path) -> int | None:
    path = folder / STATE
    return int(json.loads(path.read_text(encoding="utf-8"))["progress"]["step"]) if path.exists() else None


def write_weights(folder: Path, scorer: Scorer, residuals: dict[str, Tensor]) -> None:
    """Keep the weights of a good moment, residuals included; whole or not at all."""
    tensors = _weights(scorer) | {f"residual.{name}": tensor for name, tensor in residuals.items()}

    def write(stage: Path) -> None:
        _write_tensors(stage, tensors)

    write_whole(folder, write)


def read_weights(folder: Path, scorer: Scorer) -> None:
    """Bring back what `write_weights` kept; residuals that the run holds are written over."""
    finish_interrupted(folder)
    tensors = TensorFile(folder / TENSORS)
    load_weights(scorer, tensors)
    stored = {name.removeprefix("residual.") for name in tensors if name.startswith("residual.")}
    for name in scorer.residuals.keys() - stored:
        del scorer.residuals[name]
    for name in sorted(stored):
        found = tensors[f"residual.{name}"]
        scorer.residuals[name] = scorer.residuals.get(name, torch.empty_like(found)).copy_(found)


def load_weights(scorer: Scorer, weights: Mapping[str, Tensor], *, prefix: str = "") -> None:
    """Copy stored bits into the model's own tensors."""
    with torch.no_grad():
        for name, parameter in _weights(scorer).items():
            parameter.copy_(weights[prefix + name])


def residuals_of(scorer: Scorer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Int8 residuals by parameter name, empty for optimizers that keep none."""
    if not isinstance(optimizer, AdamW):
        return {}
    named = scorer.model.named_parameters()
    return {name: optimizer.state[p]["residual"] for name, p in named if "residual" in optimizer.state.get(p, {})}


def _link(source: Path, stage: Path) -> None:
    for name in (STATE, TENSORS):
        try:
            os.link(source / name, stage / name)
        except OSError:  # a file system without second names
            shutil.copyfile(source / name, stage / name)


def _weights(scorer: Scorer) -> dict[str, Tensor]:
    # named_parameters names a tied weight once; buffers are derived from the configuration. Beside adapters the weights
    # are those of another folder, and are not written again.
    whole = scorer.adapters is None
    named = scorer.model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if whole or parameter.requires_grad}


def _same_run(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    asked = json.loads(json.dumps(asked, default=_plain))
    differing = sorted(key for key in stored.keys() | asked.keys() if stored.get(key) != asked.get(key))
    if differing:
        changes = "; ".join(f"{key}: {stored.get(key)!r} then, {asked.get(key)!r} now" for key in differing[:5])
        raise TrainingError(
            f"The checkpoint in '{folder}' belongs to a run with other settings ({changes}). "
            "Resume with the settings of that run, or start a new folder."
        )


def _flatten(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items() if isinstance(v, Tensor)}
    numbers = {
        f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items() if not isinstance(v, Tensor)
    }
    return tensors, numbers


class _Entry(Mapping[str, Any]):
    """An optimizer's state of one parameter: what each key stands for is read when it is asked for."""

    def __init__(self) -> None:
        self.readers: dict[str, Callable[[], Any]] = {}

    def __getitem__(self, key: str) -> Any:
        return self.readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def _unflatten(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[int, _Entry]:
    state: dict[int, _Entry] = {}
    for stored in (tensors, numbers):
        for name in stored:
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), _Entry()).readers[key] = partial(stored.__getitem__, name)
    return state


def _write_tensors(stage: Path, tensors: Mapping[str, Tensor]) -> int:
    return write_file(stage / TENSORS, {name: Source(tensor, tensor.dtype) for name, tensor in tensors.items()})


def _plain(value: object) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else str(value)
