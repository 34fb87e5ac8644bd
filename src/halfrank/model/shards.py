"""The weights of a model as files: under the names of transformers, cut into shards, written a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from halfrank.errors import ModelError
from halfrank.model.pieces import Source, write_file

PATTERN, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"


def write_weights(
    model: PreTrainedModel, folder: Path, sources: Mapping[str, Source], *, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write what `save_pretrained` would, in files of at most `max_shard_size`; a larger tensor has one of its own."""
    named = _named(model, sources)
    split = split_state_dict_into_shards_factory(
        named, get_storage_size=lambda source: source.nbytes, filename_pattern=PATTERN, max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: named[name] for name in names}, metadata={"format": "pt"})
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[Path]:
    """The files with a folder's weights: those of its index, else the one file that there is; empty without any.

    Raises ModelError where the index cannot be read, is missing beside shards, or names one that is not there.
    """
    index, single = folder / INDEX, folder / PATTERN.format(suffix="")
    if single.exists():
        return [single]
    if not index.exists():
        if shards := sorted(folder.glob(PATTERN.format(suffix="-*-of-*"))):
            raise ModelError(f"'{folder}' holds '{shards[0].name}' but not {INDEX}, its index: copy the folder again.")
        return []
    try:
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{index}' is not an index of shards ({error}): copy the folder again.") from error
    if missing := [name for name in wanted if not (folder / name).exists()]:
        raise ModelError(f"'{index}' names {', '.join(missing)}, which the folder does not hold: copy it again.")
    return [folder / name for name in wanted]


def _named(model: PreTrainedModel, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Sources by the names of a folder: tied weights once, and what loading renamed under its old name."""
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = remove_tied_weights_from_state_dict(
        {name: source.tensor for name, source in sources.items() if name not in ignored}, model
    )
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in kept.items()}
    known = {id(shape): name for name, shape in shapes.items()}
    renamed: dict[str, Tensor] = revert_weight_conversion(model, shapes)
    if all(id(shape) in known for shape in renamed.values()):
        return {name: sources[known[id(shape)]] for name, shape in renamed.items()}
    # Some classes merge or cut tensors as they load, experts for example: undoing that takes the tensors themselves.
    whole = revert_weight_conversion(model, {name: sources[name].whole() for name in kept})
    return {name: Source(tensor, tensor.dtype) for name, tensor in whole.items()}
