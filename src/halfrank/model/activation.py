"""The activation that a folder means: a torch module by its dotted path, wherever a version of the peer wrote it.

sentence-transformers 6 writes `activation_fn` into config_sentence_transformers.json, 4 and 5 into config.json under
`sentence_transformers`, 2 and 3 into config.json as `sbert_ce_default_activation_function`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from halfrank.errors import ModelError

OLD_NAME = "sbert_ce_default_activation_function"


def activation_named(path: str) -> nn.Module:
    """The torch module of a dotted path as folders store it; raises ModelError outside `torch.nn`."""
    module, _, name = path.rpartition(".")
    if not path.startswith("torch.nn."):
        raise ModelError(
            f"The activation {path!r} is not one of torch.nn: halfrank runs no foreign code from a folder."
        )
    try:
        made = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"The activation {path!r} cannot be made: {error}.") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"The activation {path!r} is not a module of torch.nn.")
    return made


def stored_activation(config: Any, settings: Mapping[str, Any]) -> str | None:
    """The path that a folder stores, in its newest place; None where it stores none."""
    entry = getattr(config, "sentence_transformers", None)
    places = (
        settings.get("activation_fn"),
        entry.get("activation_fn") if isinstance(entry, Mapping) else None,
        getattr(config, OLD_NAME, None),
    )
    return next((str(path) for path in places if path is not None), None)
