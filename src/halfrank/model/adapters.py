"""Adapters (LoRA, through peft): low-rank updates beside frozen weights, trained, saved and read without them.

The frozen weights rest in 16 bits and take storage's widened products, because a layer of peft calls the plain Linear
that it wraps. Adapters, the score head and whatever else is new are float32 and trained. Within the model the head is
no part of the adapters; in a folder it lies among them, as peft expects of `modules_to_save`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfrank.errors import MissingExtraError, ModelError, NonFiniteWeightError
from halfrank.model import storage
from halfrank.model.families import head_modules
from halfrank.model.modular import Model, Modular
from halfrank.model.parts import FileOf
from halfrank.numerics.formats import dtype_name
from halfrank.precision import LORA

if TYPE_CHECKING:
    from halfrank.model.scorer import Scorer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = ("adapter_config.json", "adapter_model*", "[0-9]_*/model.safetensors")
NOTES = "halfrank"  # what our facts are called in the sentence-transformers file, which peers pass over
PREFIX = "base_model.model."  # peft's name for the model within its wrapper
NAME = "default"
SAMPLE = 64  # elements of a weight that tell one model from another
HEADS = ("classifier", "score", "out_proj", "logits_proj")  # last layers of score heads, whose rows are labels
# Kinds of LoRA whose layers compute with the frozen weight itself, or train more than two matrices beside it.
OTHERS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config", "arrow_config",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model come from, and a few elements of each, to see whether they are still those."""

    source: str
    revision: str | None
    samples: Mapping[str, Tensor]
    new: tuple[str, ...] = ()  # modules of the body that no file held, such as a pooler


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model: peft's settings, and the frozen model that they belong to."""

    config: Any
    base: str
    revision: str | None
    storage: torch.dtype  # of the frozen weights that they were trained beside
    fingerprint: str | None  # of these weights; None for adapters from elsewhere
    saved: tuple[str, ...]  # modules that are trained and saved whole

    @property
    def rank(self) -> int:
        """Rows of each A and columns of each B."""
        return int(self.config.r)

    def as_json(self) -> dict[str, Any]:
        """What a run has to share with the one that it resumes."""
        return {
            "rank": self.rank, "alpha": self.config.lora_alpha, "dropout": self.config.lora_dropout,
            "storage": dtype_name(self.storage), "fingerprint": self.fingerprint,
        }  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Adapters as a folder holds them, before the model that they belong to is read."""

    config: Any
    base: str
    revision: str | None
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]  # our own facts; empty for adapters from elsewhere

    @property
    def storage(self) -> torch.dtype | None:
        """The format of the frozen weights in training; None where nobody says."""
        name = self.notes.get("storage")
        return None if name is None else getattr(torch, name)

    @property
    def num_labels(self) -> int | None:
        """Labels of the head among the adapters; None without one."""
        if (labels := self.notes.get("num_labels")) is not None:
            return int(labels)
        rows = [
            tensor.shape[0]
            for name, tensor in self.tensors.items()
            if tensor.ndim == 2 and ".lora_" not in name and name.split(".")[-2] in HEADS
        ]
        return rows[-1] if rows else None


def settings(model: Model, rank: int, *, alpha: float | None = None, dropout: float = 0.0) -> Any:
    """peft's settings for adapters of `rank` beside every Linear of the body; `alpha` is twice the rank by default."""
    full = max((min(m.weight.shape) for m in model.modules() if type(m) is nn.Linear), default=1)
    if not 1 <= rank <= full:
        raise ValueError(
            f"The rank of adapters must lie between 1 and {full}, the full rank of the model's matrices; got {rank}."
        )
    if alpha is not None and not alpha > 0:
        raise ValueError(f"lora_alpha must be above 0; got {alpha!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"The dropout of adapters must be at least 0 and below 1; got {dropout!r}.")
    return require_peft().LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout)


def add(scorer: Scorer, config: Any) -> None:
    """Put fresh adapters into the body of `scorer` and freeze all else of it; scores stay as they are.

    `config` is a LoraConfig of peft; without `target_modules` every plain Linear of the body is a target. Raises
    ModelError, with the model as it was, where the body is not what its folder holds, because adapters are saved
    without it, and for settings that the model or halfrank does not take.
    """
    if scorer.adapters is not None:
        raise ModelError(
            f"The model has adapters already (rank {scorer.adapters.rank}): train these, or merge them first."
        )
    if not isinstance(config, require_peft().PeftConfig):
        raise ModelError(f"Adapters are asked for by a rank, or by a LoraConfig of peft; got {config!r:.80}.")
    if (other := _other_kind(config)) is not None:
        raise ModelError(f"halfrank trains plain LoRA, and these settings ask for {other}: leave it out.")
    origin, model = scorer.origin, scorer.model
    if origin is None:
        raise ModelError("Adapters belong to a model folder: save this model, load it from there, then add adapters.")
    changed = _changed(model, origin)
    if changed is not None:
        raise ModelError(
            f"'{changed}' is not what '{origin.source}' holds any more, and adapters are saved without it. Save the "
            "model, load it from there, then add adapters."
        )
    saved = (*_with_parameters(model, head_modules(model)), *origin.new)
    aimed = _aimed(model, config, saved)
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        inject(model, aimed, saved)
    except (ValueError, TypeError, RuntimeError) as error:
        _remove(model)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(kept[name])  # what is trained had become float32
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ModelError(f"These adapters cannot be put into the model, which is as it was: {reason}.") from error
    # What is frozen is then in every detail the folder read in that format, norms and biases included.
    _round_frozen(model, scorer.precision.storage, saved)
    found = fingerprint(model, scorer.precision.storage, saved)
    scorer.adapters = Adapters(
        _config_of(model), origin.source, origin.revision, scorer.precision.storage, found, saved
    )
    scorer.adopt(replace(scorer.precision, scheme=LORA + dtype_name(scorer.precision.storage)))


def inject(model: Model, config: Any, saved: Collection[str]) -> None:
    """Wrap the Linear modules that `config` names, freeze the rest but `saved`; what is trained becomes float32."""
    training = model.training
    model.requires_grad_(False)
    require_peft().inject_adapter_in_model(config, _host(model), NAME)
    for name, layer in _layers(model):
        if type(layer) is not _lora_linear() or type(layer.base_layer) is not nn.Linear:
            raise ModelError(f"'{name}' is no plain Linear, and halfrank puts adapters beside those alone.")
        for part in (layer.lora_A, layer.lora_B):
            part.float()
        # Drawn again in float32: a seed gives the same adapters whatever the frozen weights rest in.
        layer.reset_lora_parameters(NAME, config.init_lora_weights)
    for module in _trained(model, saved):
        setattr(module, storage.TRAINED, True)
        module.float().requires_grad_(True)
    model.train(training)


def load(model: Model, stored: Stored, missing: Collection[str], source: str) -> tuple[Adapters, list[str]]:
    """Put the adapters of a folder into their model; returns them, and the names in `missing` that they do not fill.

    Raises ModelError where the model is not the one that they were trained beside.
    """
    known = dict(model.named_modules())
    whole = stored.config.modules_to_save or ()
    named = [name for name in known if any(name == one or name.endswith(f".{one}") for one in whole)]
    saved = tuple(dict.fromkeys((*_with_parameters(model, head_modules(model)), *named)))
    expected = stored.notes.get("fingerprint")
    if stored.storage is not None and expected != fingerprint(model, stored.storage, saved):
        raise ModelError(
            f"'{stored.base}' is not the model that the adapters in '{source}' were trained beside: its weights have "
            f"changed since. Put the former one back, or write where it is into {CONFIG} (base_model_name_or_path)."
        )
    inject(model, _without(stored.config, saved), saved)
    wanted = _tensors(model, saved)
    unknown = sorted(stored.tensors.keys() - wanted.keys())
    absent = sorted(name for name in wanted.keys() - stored.tensors.keys() if ".lora_" in name)
    inside = [_plain(name) for name in unknown if storage.within(_plain(name).partition(".lora_")[0], saved)]
    if inside:
        raise ModelError(
            f"The adapters in '{source}' lie inside the score head too ('{inside[0]}'), which halfrank trains whole. "
            "Merge them with peft (merge_and_unload), and load the merged model."
        )
    if unknown or absent:
        said = f"do not fit: {unknown[0]!r} has no place" if unknown else f"lack {absent[0]!r}"
        raise ModelError(
            f"The adapters in '{source}' and the model '{stored.base}' {said}. Is it the right base model?"
        )
    with torch.no_grad():
        for name, tensor in stored.tensors.items():
            if tensor.shape != wanted[name].shape:
                raise ModelError(
                    f"'{name}' in '{source}' is {tuple(tensor.shape)}, the model '{stored.base}' takes "
                    f"{tuple(wanted[name].shape)}. Is it the right base model, and the right number of labels?"
                )
            if not bool(tensor.isfinite().all()):
                raise NonFiniteWeightError(
                    f"'{name}' in '{source}' holds NaN or infinite values. Load another copy of the adapters.",
                    tensors=[name],
                )
            wanted[name].copy_(tensor)
    filled = {_plain(name) for name in stored.tensors}
    own = Adapters(
        _config_of(model), stored.base, stored.revision, stored.storage or model.dtype, expected or fingerprint(
            model, stored.storage or model.dtype, saved
        ), saved,
    )  # fmt: skip
    return own, [name for name in missing if name not in filled]


def stored(source: str, file_of: FileOf) -> Stored | None:
    """The adapters at `source`; None for a whole model. Raises ModelError for kinds that halfrank does not compute."""
    place = file_of(CONFIG)
    if place is None:
        return None
    if file_of("config.json") is not None:
        raise ModelError(
            f"'{source}' holds a whole model and adapters ({CONFIG}), and nobody says which is meant. Move one of them "
            "to a folder of its own."
        )
    config = require_peft().PeftConfig.from_pretrained(os.path.dirname(place))
    if (other := _other_kind(config)) is not None:
        raise ModelError(
            f"The adapters in '{source}' are of a kind that halfrank does not compute ({other}); it takes plain LoRA. "
            "Merge them with peft (merge_and_unload), and load the merged model."
        )
    if not config.base_model_name_or_path:
        raise ModelError(f"{CONFIG} of '{source}' names no base model: write its folder into base_model_name_or_path.")
    weights = file_of(WEIGHTS)
    if weights is None:
        raise ModelError(f"'{source}' holds no {WEIGHTS}, and halfrank never unpickles. Save it again with peft.")
    listed = file_of("config_sentence_transformers.json")
    content = {} if listed is None else json.loads(Path(listed).read_text(encoding="utf-8"))
    base = str(config.base_model_name_or_path)
    return Stored(config, base, config.revision, load_file(weights), content.get(NOTES) or {})


def write(scorer: Scorer, stage: Path) -> None:
    """Write the adapters and what is trained beside them, float32, as peft does; no other file."""
    adapters = scorer.adapters
    assert adapters is not None
    if fingerprint(scorer.model, adapters.storage, adapters.saved) != adapters.fingerprint:
        raise ModelError(
            "The frozen weights are not those that the adapters were added to (they were trained, narrowed, or have "
            "new tokens), and adapters are saved without them. Merge the adapters and save the whole model."
        )
    tensors = {
        name: p.detach().float().cpu().contiguous() for name, p in _tensors(scorer.model, adapters.saved).items()
    }
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise NonFiniteWeightError(f"'{bad[0]}' has values that are NaN or infinite. Nothing was saved.", tensors=bad)
    config = copy.deepcopy(adapters.config)
    config.base_model_name_or_path, config.revision = _absolute(adapters.base), adapters.revision
    config.inference_mode = True
    modular = isinstance(scorer.model, Modular)
    config.task_type = "FEATURE_EXTRACTION" if modular else "SEQ_CLS"
    config.modules_to_save = None if modular else list(adapters.saved)
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(os.fspath(stage))
    save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})


def notes(scorer: Scorer) -> dict[str, Any]:
    """What halfrank has to know of saved adapters beyond what peft stores."""
    adapters = scorer.adapters
    assert adapters is not None
    return {
        "num_labels": scorer.num_labels, "storage": dtype_name(adapters.storage),
        "fingerprint": adapters.fingerprint, "islands": list(scorer.islands),
    }  # fmt: skip


def merge(scorer: Scorer, dtype: torch.dtype = torch.float32) -> None:
    """Add the adapters to the weights that they lie beside, in float32, store all in `dtype`; in place.

    Raises NonFiniteWeightError, with nothing changed, where `dtype` cannot hold the sums.
    """
    model = scorer.model
    if scorer.adapters is None:
        raise ModelError("The model has no adapters to merge.")
    largest = torch.finfo(dtype).max
    for name, layer in _layers(model):
        reach = float(_sum(layer).abs().max())
        if not reach <= largest:
            raise NonFiniteWeightError(
                f"With its adapters '{name}' reaches {reach:g}, above {largest:g}, the largest {dtype_name(dtype)} "
                "number. Merge to float32.",
                tensors=[name],
                out_of_range=True,
            )
    islands = [own_name(name) for name in scorer.islands if ".lora_" not in name]
    for _, layer in _layers(model):
        layer.base_layer.weight.data = _sum(layer).to(dtype)
    _remove(model)
    scorer.adapters = None
    scorer.set_islands(islands)
    scorer.adopt(replace(scorer.precision, scheme=dtype_name(dtype), storage=dtype))


def refuse_own_base(scorer: Scorer, path: Path) -> None:
    """Raise ModelError where adapters would be written over the model that they belong to, which they need."""
    if scorer.adapters is not None and path.exists() and path.resolve() == Path(scorer.adapters.base).resolve():
        raise ModelError(
            f"'{path}' holds the model that these adapters belong to, and saving them there would replace it. Choose "
            "another folder, or merge the adapters first."
        )


def opened_by_peft(scorer: Scorer) -> str:
    """How peft opens the folder of adapters, for its card: it does not know labels and pad token of a bare base."""
    adapters = scorer.adapters
    assert adapters is not None
    kind, words = "SequenceClassification", f", num_labels={scorer.num_labels}"
    if isinstance(scorer.model, Modular):
        kind, words = "FeatureExtraction", ""
    words += f", pad_token_id={scorer.config.pad_token_id}"
    rounded = (
        ""
        if adapters.storage is torch.float32
        else f" They were trained beside its weights in {dtype_name(adapters.storage)}: where it is stored wider, peft "
        "and sentence-transformers read it unrounded, and scores differ by what the rounding does. Merging keeps them."
    )
    return (
        f"\nAdapters (LoRA, rank {adapters.rank}) and score head of `{adapters.base}`.{rounded} With peft:\n\n"
        f"```python\nAutoPeftModelFor{kind}.from_pretrained(folder{words})\n```\n"
    )


def origin_of(model: Model, source: str, revision: str | None, missing: Collection[str]) -> Origin:
    """What to remember of a model that has just been read; `missing` are weights that were in no file."""
    heads = head_modules(model)
    new = dict.fromkeys(name.rpartition(".")[0] for name in missing)
    return Origin(
        source, revision, dict(_samples(model, (*heads, *new))),
        tuple(name for name in new if not storage.within(name, heads)),
    )  # fmt: skip


def fingerprint(model: Model, dtype: torch.dtype, saved: Collection[str]) -> str:
    """A hash of a few elements of each frozen weight as `dtype` holds them, whatever they rest in."""
    found = hashlib.sha256()
    for name, sample in sorted(_samples(model, saved)):
        found.update(name.encode())
        found.update(sample.to(dtype).float().numpy().tobytes())
    return found.hexdigest()[:32]


def own_name(name: str) -> str:
    """The name that a module or a parameter has without adapters."""
    return name.replace(".base_layer", "")


def is_adapter(name: str) -> bool:
    """Whether a module or parameter of this name is part of adapters."""
    return ".lora_" in name


def sides_of(model: nn.Module) -> int:
    """Inputs and outputs of all Linear modules that have adapters: what one rank has."""
    return sum(sum(layer.base_layer.weight.shape) for _, layer in _layers(model))


def _other_kind(config: Any) -> str | None:
    """What makes settings of peft another kind than plain LoRA; None for that."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return str(kind)
    if config.bias != "none":
        return f"bias={config.bias!r}"
    return next((name for name in OTHERS if getattr(config, name, None)), None)


def _sum(layer: Any) -> Tensor:
    with torch.no_grad():
        return layer.base_layer.weight.float() + layer.get_delta_weight(NAME).float()


def _remove(model: Model) -> None:
    """Take all adapters out; every parameter is trained again."""
    for name, layer in list(_layers(model)):
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer.base_layer)
    for module in model.modules():
        if hasattr(module, storage.TRAINED):
            delattr(module, storage.TRAINED)
    host = _host(model)
    if hasattr(host, "peft_config"):
        del host.peft_config
    model.requires_grad_(True)


def _host(model: Model) -> nn.Module:
    return model.body if isinstance(model, Modular) else model


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _trained(model: Model, saved: Collection[str]) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if name in saved or name.rpartition(".")[2] in ("lora_A", "lora_B"):
            yield module


def _with_parameters(model: Model, names: Collection[str]) -> list[str]:
    return sorted(name for name in names if next(model.get_submodule(name).parameters(), None) is not None)


def _aimed(model: Model, config: Any, saved: Collection[str]) -> Any:
    """`config` with every plain Linear of the body as target where it names none, and without what is saved whole."""
    aimed = _without(config, saved)
    if aimed.target_modules is None:
        prefix = "body." if isinstance(model, Modular) else ""
        aimed.target_modules = {
            name.removeprefix(prefix)
            for name, module in model.named_modules()
            if type(module) is nn.Linear and not storage.within(name, saved)
        }
        if not aimed.target_modules:
            raise ModelError(f"{type(model).__name__} has no Linear module that adapters could lie beside.")
    return aimed


def _without(config: Any, saved: Collection[str]) -> Any:
    """A copy of `config` whose targets are none of the modules that are saved whole, and which wraps none of these."""
    own = copy.deepcopy(config)
    given = own.exclude_modules
    parts = [given] if isinstance(given, str) else [rf"(.*\.)?{re.escape(name)}" for name in given or ()]
    own.exclude_modules = "|".join([*parts, *(rf"{re.escape(name)}(\..*)?" for name in saved)]) or None
    own.modules_to_save, own.inference_mode, own.task_type = None, False, None
    return own


def _config_of(model: Model) -> Any:
    return _host(model).peft_config[NAME]  # type: ignore[index]


def _tensors(model: Model, saved: Collection[str]) -> dict[str, Tensor]:
    """Parameters of the adapters, and of what is saved whole beside them, by the names they have in a folder.

    A head of steps is not among them: it has files of its own.
    """
    prefix = "body." if isinstance(model, Modular) else ""
    return {
        PREFIX + name.removeprefix(prefix).replace(f".{NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and (is_adapter(name) or storage.within(name, saved))
    }


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _samples(model: Model, skip: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        plain = own_name(name)
        if not is_adapter(name) and not storage.within(plain, skip):
            flat = parameter.detach().reshape(-1)
            yield (
                plain,
                flat[:: max(1, -(-flat.numel() // SAMPLE))].float().cpu().clone(),
            )  # no view of a float32 weight


def _changed(model: Model, origin: Origin) -> str | None:
    """The name of a weight that is no longer what its folder holds."""
    here = {name: sample for name, sample in _samples(model, ()) if name in origin.samples}
    for name, sample in origin.samples.items():
        now, parameter = here.get(name), None if name not in here else model.get_parameter(name)
        if now is None or parameter is None or not torch.equal(sample.to(parameter.dtype).float(), now):
            return name
    return None


def _round_frozen(model: Model, dtype: torch.dtype, saved: Collection[str]) -> None:
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and not storage.within(own_name(name), saved):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _absolute(source: str) -> str:
    return os.path.abspath(source) if os.path.isdir(source) else source


def _lora_linear() -> Any:
    from peft.tuners.lora.layer import Linear

    return Linear


def require_peft() -> Any:
    """The package peft; raises MissingExtraError where it is not installed."""
    if find_spec("peft") is None:
        raise MissingExtraError("Adapters (LoRA) need the extra [lora]: pip install 'halfrank[lora]'.")
    import peft  # seconds at import, so only for those who use adapters

    return peft
