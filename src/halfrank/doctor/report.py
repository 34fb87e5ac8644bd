"""What the doctor found: facts, numbers by module, and checks, worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("fix", "warn", "note", "fine")


@dataclass(frozen=True)
class Check:
    """One thing looked at: how grave, what was found, and what to change."""

    topic: str
    level: str  # one of LEVELS; "fix" makes the exit code 1
    found: str
    change: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level


@dataclass(frozen=True)
class ModuleRow:
    """One module's numbers; headroom in bits, shares between 0 and 1."""

    name: str
    role: str
    layer: int | None
    kind: str
    largest: float
    headroom_float16: float
    headroom_bfloat16: float
    underflow_float16: float  # of what it writes
    gradient_largest: float | None  # without loss scale
    gradient_underflow: float | None  # in float16, without loss scale
    gradient_underflow_scaled: float | None  # at the recommended loss scale


@dataclass(frozen=True)
class Examination:
    """A model and its data before training."""

    model: str
    facts: Mapping[str, Any]
    modules: tuple[ModuleRow, ...]
    attention: tuple[Mapping[str, Any], ...]  # by layer: saturation of the softmax
    loss_scale: Mapping[str, float] | None
    updates: Mapping[str, Mapping[str, float]]
    data: Mapping[str, Any]
    memory: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def worst_first(self) -> list[Check]:
        """The checks in order of gravity."""
        return sorted(self.checks, key=lambda check: LEVELS.index(check.level))

    @property
    def sound(self) -> bool:
        """Whether nothing must be fixed."""
        return all(check.level != "fix" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are strings."""
        return plain({**asdict(self), "checks": [asdict(check) for check in self.worst_first], "sound": self.sound})


def plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
