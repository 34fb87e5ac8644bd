"""What a training run is asked to do; everything else is derived and printed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

FIRST_LOSSES = 20  # steps after which a loss can be called unusual
LARGEST_SCALE = 2.0**64  # half of float32's range: above it the search for one that fits takes longer than a run
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Limits:
    """How far recovery goes before a run stops. A spike is a finite loss far outside of what the run has seen."""

    strict: bool = False  # stop at the first fault; the loss scale's own search is none
    skips_in_a_row: int = 30  # a loss scale falls from 2^16 to 2^-14 in as many halvings: beyond it no scale helps
    widenings: int = 16  # times that modules become islands
    quarantined: float = 0.1  # largest share of the pairs that may be left out
    rollbacks: int = 3
    rate_factor: float = 0.5  # what a rollback multiplies the learning rate with
    good_every: int = 100  # steps between two good states
    spike: float = 12.0  # robust z-score of the loss from which on it is a spike; 0: never
    spike_window: int = 64  # steps that a loss is compared with
    spikes_in_a_row: int = 3  # from which on the weights are suspected, and not the batch

    def __post_init__(self) -> None:
        for name in ("skips_in_a_row", "widenings", "rollbacks"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("good_every", "spikes_in_a_row"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(0 <= self.quarantined <= 1, "quarantined", "a share from 0 to 1", self.quarantined)
        _require(0 < self.rate_factor <= 1, "rate_factor", "above 0 and at most 1", self.rate_factor)
        _require(self.spike >= 0, "spike", "0 or more", self.spike)
        _require(self.spike_window >= FIRST_LOSSES, "spike_window", f"at least {FIRST_LOSSES}", self.spike_window)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. A batch is counted in pairs, or in groups where the data are grouped."""

    loss: str | None = None  # None: the usual loss for the labels
    epochs: int = 1
    steps: int | None = None  # overrides epochs
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 2e-5
    head_lr: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.1  # below 1 a share of all steps, else a number of steps
    schedule: str = "linear"
    clip: float = 1.0  # largest global gradient norm; 0 turns clipping off
    seed: int = 0
    eval_every: int = 0  # steps; 0: once at the end of each epoch
    patience: int = 0  # evaluations without a better score before the run stops; 0: never
    checkpoint_every: int = 0  # steps; 0: with each evaluation
    length_buckets: bool = False  # batches of pairs of like lengths, in random order
    max_tokens: int = 16384  # tokens of one forward and backward pass
    freeze_embeddings: bool = False
    release_gradients: bool = False  # consume them as they arrive: 5 bytes a 16-bit weight instead of 7, more time
    checkpointing: bool = False  # keep the inputs of layers alone, compute them again for their gradients
    loss_scale: float = 2.0**16  # that a run with 16-bit gradients begins with; it finds its own way from there
    watch_every: int = 10  # steps; 0: never
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.steps is None or self.steps >= 1, "steps", "at least 1", self.steps)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.accumulate >= 1, "accumulate", "at least 1", self.accumulate)
        _require(0 < self.lr < 1, "lr", "above 0 and below 1", self.lr)
        _require(self.head_lr is None or 0 < self.head_lr < 1, "head_lr", "above 0 and below 1", self.head_lr)
        _require(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more, and finite", self.weight_decay)
        _require(self.warmup >= 0, "warmup", "0 or more", self.warmup)
        _require(
            0 < self.loss_scale <= LARGEST_SCALE,
            "loss_scale",
            f"above 0 and at most {LARGEST_SCALE:g}",
            self.loss_scale,
        )
        _require(self.clip >= 0, "clip", "0 or more", self.clip)
        _require(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", self.seed)
        for name in ("eval_every", "patience", "checkpoint_every", "watch_every"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))

    def as_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self) | {"betas": list(self.betas)}


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}; got {value!r}.")
