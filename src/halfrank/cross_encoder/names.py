"""Arguments of other people's scripts, in current and older spelling, to one `LoadOptions`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfrank.model.backends import format_named
from halfrank.model.folder import LoadOptions
from halfrank.model.scorer import log

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = ("quantization_config", "load_in_8bit", "load_in_4bit")
# Models that have no owner in their name on the hub, by their first word.
WITHOUT_OWNER = {
    "albert", "bert", "camembert", "ctrl", "distilbert", "distilgpt2", "distilroberta", "gpt2", "openai", "roberta",
    "t5", "transfo", "xlm", "xlnet",
}  # fmt: skip
EXPORTED = ("provider", "file_name", "export", "session_options")


def one_of(**spellings: Any) -> Any:
    """The one argument that was given under any of its names; raises TypeError when two were."""
    given = {name: value for name, value in spellings.items() if value is not None}
    if len(given) > 1:
        raise TypeError(f"{' and '.join(given)} are two names of one argument: give {next(iter(spellings))} only.")
    return next(iter(given.values()), None)


def with_owner(path: str | os.PathLike[str], owner: str | None) -> str:
    """A bare name such as "ms-marco-MiniLM-L6-v2" with its owner on the hub; paths and full names as they are."""
    name = os.fspath(path)
    bare = not os.path.exists(name) and "/" not in name and os.sep not in name and not name.startswith((".", "~"))
    return f"{owner}/{name}" if bare and owner and name.split("-")[0].lower() not in WITHOUT_OWNER else name


def parse_storage(value: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype given as object or string; None and "auto" mean as stored."""
    if value is None or value == "auto":
        return None
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if found not in DTYPES:
        raise ValueError(
            f"Weights are stored in float32, float16 or bfloat16, or as they come ('auto'); got {value!r}."
        )
    return found


def split_graph_kwargs(given: Mapping[str, Any] | None) -> str | None:
    """The file name of a graph; raises ValueError for anything else that a runtime might be told."""
    rest = {name: value for name, value in dict(given or {}).items() if value is not None}
    name = rest.pop("file_name", None)
    if rest.get("provider") == "CPUExecutionProvider":
        del rest["provider"]
    if rest.get("export") is False:
        del rest["export"]
    if rest:
        key = next(iter(rest))
        raise ValueError(
            f"model_kwargs[{key!r}] is not supported with a graph, which runs on the CPU as it was written: give "
            "file_name only, and make a graph with halfrank export --format."
        )
    return name


def split_model_kwargs(given: Mapping[str, Any] | None, device: Any) -> tuple[torch.dtype | None, Any, dict[str, Any]]:
    """Storage dtype, device, and what is left for transformers; raises ValueError for what halfrank cannot do."""
    rest = dict(given or {})
    unsupported = [name for name in (*QUANTIZED, *EXPORTED) if rest.get(name) is not None]
    if unsupported:
        raise ValueError(
            f"model_kwargs[{unsupported[0]!r}] is not supported: halfrank runs torch weights in 16 or 32 bits."
        )
    dtype = one_of(
        dtype=parse_storage(rest.pop("dtype", None)), torch_dtype=parse_storage(rest.pop("torch_dtype", None))
    )
    place = rest.pop("device_map", None)
    if isinstance(place, Mapping) or place in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"device_map={place!r} is not supported: a model lies on one device, for example device='cuda:0'."
        )
    attention = rest.pop("attn_implementation", None)
    if attention is not None:
        log.warning("attn_implementation=%r is ignored: halfrank attends over packed pairs by itself.", attention)
    return dtype, device if place is None else place, rest


def load_options(
    *,
    backend: str,
    num_labels: int | None,
    device: Any,
    cache_folder: str | None,
    trust_remote_code: bool,
    revision: str | None,
    local_files_only: bool,
    token: bool | str | None,
    model_kwargs: Mapping[str, Any] | None,
    processor_kwargs: Mapping[str, Any] | None,
    config_kwargs: Mapping[str, Any] | None,
    classifier_dropout: float | None,
    compute: str,
    islands: Sequence[str] | None,
) -> LoadOptions:
    """The arguments of the constructor as the model folder reads them."""
    file_name = None
    if backend != "torch":
        _refuse_for_graphs(backend, num_labels=num_labels, keep_in_fp32_modules=islands, device=device)
        file_name, model_kwargs = split_graph_kwargs(model_kwargs), None
    dtype, device, model = split_model_kwargs(model_kwargs, device)
    config = dict(config_kwargs or {})
    if classifier_dropout is not None:
        config["classifier_dropout"] = classifier_dropout
    return LoadOptions(
        num_labels=one_of(num_labels=num_labels, config_kwargs_num_labels=config.pop("num_labels", None)),
        dtype=dtype,
        compute=compute,
        device=None if device is None else str(device),
        revision=revision,
        token=token,
        cache_folder=cache_folder,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        islands=None if islands is None else tuple(islands),
        config=config,
        model=model,
        tokenizer=dict(processor_kwargs or {}),
        backend=backend,
        file_name=file_name,
    )


def refuse_unsupported(*, modules: object) -> None:
    """Raise ValueError for an argument that sentence-transformers has and halfrank cannot honour."""
    if modules is not None:
        raise ValueError("modules is not supported: give the path of a sequence-classification folder.")


def _refuse_for_graphs(backend: str, *, device: Any, **given: Any) -> None:
    format_named(backend, kind="backend", more=("torch",))
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} goes with backend='torch': a graph computes what was exported.")
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"backend={backend!r} runs on the CPU; got device={device!r}. Use backend='torch' on a GPU.")


def warn_unused(config: Any, options: LoadOptions) -> None:
    """Warn about configuration values that this model family does not know."""
    for name in options.config:
        if not hasattr(config, name):
            log.warning("%s is ignored: models of type %s have no such setting.", name, config.model_type)
