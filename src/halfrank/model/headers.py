"""What the files of a model say of its weights, names, formats and shapes, before one of them is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfrank.errors import ModelError
from halfrank.model import shards
from halfrank.model.families import head_modules
from halfrank.model.storage import within

FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Header(NamedTuple):
    """The format of one stored tensor, as safetensors calls it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def headers_in(folder: Path) -> dict[str, Header]:
    """Of each tensor of a folder's weights; raises ModelError for a file that is cut or corrupt, or missing."""
    found: dict[str, Header] = {}
    for file in shards.files_of(folder):
        try:
            with safe_open(file, framework="pt") as stored:  # reads the header, and checks it against the file's length
                for name in stored.keys():  # noqa: SIM118, it is no mapping
                    part = stored.get_slice(name)
                    found[name] = Header(part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ModelError(f"'{file}' is corrupt or truncated ({error}): copy the folder again.") from error
    return found


def headers_on_hub(name: str, revision: str | None, token: str | bool | None) -> dict[str, Header]:
    """Of each tensor of a repository; only the beginnings of its files are fetched."""
    metadata = get_safetensors_metadata(name, revision=revision, token=token if isinstance(token, str) else None)
    return {
        tensor: Header(one.dtype, tuple(one.shape))
        for described in metadata.files_metadata.values()
        for tensor, one in described.tensors.items()
    }


def format_of(stored: Mapping[str, Header], config: Any) -> torch.dtype:
    """The format that most elements have; without files what the config names, or float32."""
    counts: Counter[str] = Counter()
    for header in stored.values():
        counts[header.dtype] += torch.Size(header.shape).numel()
    if counts:
        return FORMATS.get(counts.most_common(1)[0][0], torch.float32)
    named = getattr(config, "dtype", None)
    return next((dtype for dtype in FORMATS.values() if dtype == named), torch.float32)


def refuse_misfit(model: PreTrainedModel, stored: Mapping[str, Header], source: str) -> None:
    """Raise ModelError where the files of `source` hold a weight of `model` in another shape, or lack one of its body.

    A pooler may be missing, and a score head: loading makes new ones. Without files there is nothing to compare.
    """
    refuse_integers(model, stored, source)
    here, merged = _as_read(model, stored)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if here.get(name, shape) != shape:
            if within(name, head_modules(model)) and here[name][1:] == shape[1:]:
                raise ModelError(
                    f"The score head of '{source}' has another shape: {here[name][0]} labels, not {shape[0]}. Leave "
                    "num_labels out to keep its head, or pass model_kwargs={'ignore_mismatched_sizes': True} for a new "
                    "one."
                )
            raise ModelError(
                f"The config.json of '{source}' does not fit its weights: '{_inner(model, name)}' has another shape, "
                f"{here[name]} in the file and {shape} by the config. Copy both from the same model."
            )
    lacking = [] if merged or not stored else _lacking(model, here)
    if lacking:
        raise ModelError(
            f"The config.json of '{source}' does not fit its weights: the files lack {len(lacking)} of the model's "
            f"weights, '{_inner(model, lacking[0])}' for example. Copy both from the same model."
        )


def refuse_integers(model: PreTrainedModel, stored: Mapping[str, Header], source: str) -> None:
    """Raise ModelError where a weight of `model` is stored in integers, which reading would take for its values."""
    weights = {_inner(model, name) for name, _ in model.named_parameters()}
    for name, header in stored.items():
        if header.dtype.startswith(("I", "U", "BOOL")) and _inner(model, name) in weights:
            raise ModelError(
                f"'{name}' in '{source}' is stored as {header.dtype}: quantized models are not read. Load another copy "
                "of the model, in float32, float16 or bfloat16."
            )


def layer_notes(model: PreTrainedModel, stored: Mapping[str, Header], source: str) -> list[str]:
    """A note where there are layers that the files of `source` hold and its config leaves out."""
    here, _ = _as_read(model, stored)
    own = model.state_dict()
    rows = {_row(name) for name in own}
    left = [name for name in here if name not in own and re.search(r"\d", name) and _row(name) in rows]
    if not left:
        return []
    return [
        f"'{source}' holds {len(left)} weights of layers that its config leaves out, '{left[0]}' for example: they are "
        "not read. Correct num_hidden_layers in config.json unless the model is meant to be that short."
    ]


def _as_read(model: PreTrainedModel, stored: Mapping[str, Header]) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Stored shapes under the names that transformers gives them, and whether it also merges or cuts some tensors."""
    changes = get_model_conversion_mapping(model)
    renamed = [change for change in changes if isinstance(change, WeightRenaming)]
    converted = [change for change in changes if isinstance(change, WeightConverter)]
    own = model.state_dict()
    found, merged = {}, False
    for name, header in stored.items():
        read, pattern = rename_source_key(name, renamed, converted, model.base_model_prefix, own)
        if pattern is None:
            found[name if read not in own and name in own else read] = header.shape
        merged = merged or pattern is not None
    return found, merged


def _lacking(model: PreTrainedModel, here: Mapping[str, Any]) -> list[str]:
    """Parameters of the body that no file holds under any of their names: tied ones have several."""
    optional = (*head_modules(model), *(name for name, _ in model.named_modules() if name.endswith("pooler")))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied[0] for tied in names.values() if not any(name in here or within(name, optional) for name in tied)]


def _inner(model: PreTrainedModel, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def _row(name: str) -> str:
    """What the weights of all layers at one place have in common."""
    return re.sub(r"\d+", "#", name)
