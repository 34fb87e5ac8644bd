"""The state of a run on disk: everything that decides its next step, in safetensors and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfrank.errors import TrainingError
from halfrank.model.folder import finish_interrupted, write_whole
from halfrank.model.scorer import Scorer

STATE = "state.json"
TENSORS = "state.safetensors"


@dataclass
class Progress:
    """Where a run stands: the plain numbers of a checkpoint."""

    step: int = 0  # updates tried, skipped ones included
    epoch: int = 0
    position: int = 0  # batches finished in this epoch
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_score: float | None = None
    best_step: int = 0
    without_better: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    loss_scale: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def write_checkpoint(
    folder: Path, scorer: Scorer, optimizer: torch.optim.Optimizer, progress: Progress, settings: dict[str, Any]
) -> None:
    """Write weights as they are stored, optimizer state, random state and progress; whole or not at all."""
    state = optimizer.state_dict()
    tensors, numbers = _flatten(state["state"])
    tensors["random"] = torch.get_rng_state()
    tensors |= {f"weights.{name}": tensor for name, tensor in _weights(scorer).items()}
    content = {
        "settings": settings,
        "progress": vars(progress),
        "optimizer": {"numbers": numbers, "groups": state["param_groups"]},
    }

    def write(stage: Path) -> None:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, stage / TENSORS)
        (stage / STATE).write_text(json.dumps(content, indent=1, default=_plain), encoding="utf-8")

    write_whole(folder, write)


def read_checkpoint(
    folder: Path, scorer: Scorer, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Progress:
    """Bring scorer, optimizer and random state back to the bit; raises TrainingError for another run's checkpoint."""
    finish_interrupted(folder)
    if not (folder / STATE).exists():
        raise TrainingError(f"'{folder}' holds no checkpoint: start without --resume.")
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _same_run(folder, content["settings"], settings)
    tensors: dict[str, Tensor] = {}
    with safe_open(folder / TENSORS, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a safetensors file is no dict
    load_weights(scorer, {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")})
    state = _unflatten(tensors, content["optimizer"]["numbers"])
    optimizer.load_state_dict({"state": state, "param_groups": content["optimizer"]["groups"]})
    torch.set_rng_state(tensors["random"])
    return Progress(**content["progress"])


def write_weights(folder: Path, scorer: Scorer, residuals: dict[str, Tensor]) -> None:
    """Keep the weights of a good moment, residuals included; whole or not at all."""
    tensors = _weights(scorer) | {f"residual.{name}": tensor for name, tensor in residuals.items()}

    def write(stage: Path) -> None:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, stage / TENSORS)

    write_whole(folder, write)


def read_weights(folder: Path, scorer: Scorer) -> None:
    """Bring back what `write_weights` kept."""
    finish_interrupted(folder)
    with safe_open(folder / TENSORS, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a safetensors file is no dict
    scorer.residuals = {k.removeprefix("residual."): t for k, t in tensors.items() if k.startswith("residual.")}
    load_weights(scorer, {name: tensor for name, tensor in tensors.items() if not name.startswith("residual.")})


def load_weights(scorer: Scorer, weights: dict[str, Tensor]) -> None:
    """Copy stored bits into the model's own tensors."""
    with torch.no_grad():
        for name, parameter in scorer.model.named_parameters():
            parameter.copy_(weights[name])


def _weights(scorer: Scorer) -> dict[str, Tensor]:
    # named_parameters names a tied weight once; buffers are derived from the configuration.
    return {name: parameter.detach() for name, parameter in scorer.model.named_parameters()}


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


def _unflatten(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *numbers.items()]:
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    return state


def _plain(value: object) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else str(value)
