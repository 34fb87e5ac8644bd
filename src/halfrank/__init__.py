"""halfrank: cross-encoders that train, rank and stay finite in 16 bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_WHERE = {
    "CrossEncoder": "halfrank.cross_encoder",
    "InputExample": "halfrank.data.pairs",
    "AdamW": "halfrank.numerics.adamw",
    "diagnose": "halfrank.diagnosis.replay",
    "Finding": "halfrank.diagnosis.finding",
}
__all__ = ["AdamW", "CrossEncoder", "Finding", "InputExample", "__version__", "diagnose"]


def __getattr__(name: str) -> Any:
    # Importing halfrank stays free of torch, so that `halfrank --help` answers at once.
    if name not in _WHERE:
        raise AttributeError(f"module 'halfrank' has no attribute {name!r}")
    from halfrank.allocator import collecting_late

    with collecting_late():
        found = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return found
