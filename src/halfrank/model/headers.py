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
    """Raise ModelError where the files of `source` hold a weight of `model` in another shape, or lack one of a row.

    Names that only one side knows are passed over: transformers renames some weights as it reads them.
    """
    prefix = f"{model.base_model_prefix}."
    here = {name.removeprefix(prefix): header.shape for name, header in stored.items()}
    wanted = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    head = {name.removeprefix(prefix) for name in head_modules(model)}
    for name, shape in wanted.items():
        if here.get(name, shape) != shape:
            if within(name, head) and here[name][1:] == shape[1:]:
                raise ModelError(
                    f"The score head of '{source}' has another shape: {here[name][0]} labels, not {shape[0]}. Leave "
                    "num_labels out to keep its head, or pass model_kwargs={'ignore_mismatched_sizes': True} for a new "
                    "one."
                )
            raise ModelError(
                f"The config.json of '{source}' does not fit its weights: '{name}' has another shape, {here[name]} in "
                f"the file and {shape} by the config. Copy both from the same model."
            )
    rows = {_row(name) for name in here}
    lacking = [name for name in wanted if name not in here and re.search(r"\d", name) and _row(name) in rows]
    if lacking:
        raise ModelError(
            f"The config.json of '{source}' does not fit its weights: the files lack {len(lacking)} of the model's "
            f"weights, '{lacking[0]}' for example. Copy both from the same model."
        )


def _row(name: str) -> str:
    """What the weights of all layers at one place have in common."""
    return re.sub(r"\d+", "#", name)
