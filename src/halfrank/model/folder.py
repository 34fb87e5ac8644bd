"""Model folders: read from disk or hub into a Scorer, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from halfrank.allocator import collect_as_usual
from halfrank.data.packing import Batch, pack
from halfrank.data.templates import Template
from halfrank.errors import ModelError, NonFiniteWeightError
from halfrank.model import adapters as lora
from halfrank.model import backends, yes_no
from halfrank.model import template as templates
from halfrank.model.activation import OLD_NAME, activation_named, stored_activation
from halfrank.model.families import head_modules, position_limit
from halfrank.model.headers import headers_in, layer_notes, refuse_integers, refuse_misfit
from halfrank.model.modular import SCORES, TOKENS, Model, Modular, load_steps
from halfrank.model.parts import MODULES, TRANSFORMER, TRANSFORMER_TYPE, FileOf, Parts, parts_of
from halfrank.model.pieces import Source, TensorFile
from halfrank.model.scorer import PROBES, Scorer, refuse_out_of_range
from halfrank.model.shards import MAX_SHARD_SIZE, files_of, write_weights
from halfrank.model.storage import NARROW, narrow_storage
from halfrank.model.streaming import converting_as_read
from halfrank.numerics.formats import all_finite, dtype_name
from halfrank.precision import Facts, Precision, choose, compute_named, detect, usual_device
from halfrank.whole import unchanged, write_whole

SETTINGS = "config_sentence_transformers.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.codes")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True)
class LoadOptions:
    """How to read a model; the three mappings are handed to transformers as they are."""

    num_labels: int | None = None
    max_length: int | None = None
    dtype: torch.dtype | None = None  # None: as stored
    compute: str = "auto"
    device: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_folder: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    islands: tuple[str, ...] | None = None  # modules that compute in float32; None: those that the folder names
    template: str | None = None  # how a causal model reads a pair: a name of model/template.py; None: the folder's own
    instruction: str | None = None  # what the model is told about its task; None: the folder's default prompt
    backend: str = "torch"  # or a graph of the folder, of model/backends.py: onnx, openvino
    file_name: str | None = None  # of the graph; None: the usual one, or the only one
    config: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


def load(path: str | os.PathLike[str], options: LoadOptions = LoadOptions()) -> Scorer:
    """Read a folder or hub id; raises ModelError for what cannot be read, NonFiniteWeightError for NaN weights."""
    collect_as_usual()  # all that is large is imported, and no model is there yet that would be kept for good
    source = os.fspath(path)
    if options.num_labels is not None and options.num_labels < 1:
        raise ValueError(f"num_labels must be at least 1; got {options.num_labels}.")
    templates.check_name(options.template)
    if options.backend != "torch":
        return _load_graph(source, options)
    device = options.device or usual_device()
    with _readable(source), unchanged(source):
        _check_folder(source)
        found = partial(file_of, source, options=options)
        added = lora.stored(source, found)
        base, own = (source, options) if added is None else _of_base(added, source, options)
    # One lock a folder: a second on the same would wait for the first where a save was cut off.
    with _readable(base), unchanged(base), unchanged(source) if added is not None else nullcontext():
        config = _config(base, own)
        with_tokenizer = source if added is None or found("tokenizer_config.json") else base
        tokenizer = AutoTokenizer.from_pretrained(with_tokenizer, **{**_hub(options), **options.tokenizer})
        settings = settings_of(source, options)
        parts = parts_of(found, cross_encoder=settings.get("model_type") == "CrossEncoder")
        causal = own.num_labels is None and (parts.answers is not None or yes_no.is_causal(config))
        template, answers, notes = _reading(base, parts, tokenizer, options.template, causal)
        model, new_head, check = _built(base, config, parts, tokenizer, template, answers, own, found)
    notes += _compared(model, base, own)
    _refuse_non_finite(model, base)
    stored = model.dtype if model.dtype in NARROW else torch.float32
    narrow_storage(model, stored, head_modules(model))
    trained = None
    if added is not None:
        with quiet():
            trained, new_head = lora.load(model, added, new_head, source)
        stored = options.dtype or stored
        refuse_out_of_range(model, stored)
        narrow_storage(model, stored, head_modules(model))
    model.to(device).eval()
    facts = Facts(model.num_parameters(), stored, detect(device))
    precision = choose(
        facts, scheme=str(stored).removeprefix("torch."), compute=options.compute, frozen=trained is not None
    )
    notes += _set_pad_token(model, tokenizer)
    max_length = _max_length(model, tokenizer, options.max_length)
    told = _default_prompt(settings) if options.instruction is None else options.instruction
    scorer = Scorer(model, tokenizer, precision, max_length=max_length, template=template, instruction=told)
    for note in notes:
        scorer.note(note)
    if check is not None:
        _check_scores(scorer, check)
    _set_activation(scorer, settings)
    scorer.widen(_found_in(model, _islands(config, settings, options.islands)))
    scorer.adapters = trained
    scorer.origin = lora.origin_of(model, source, options.revision, new_head) if trained is None else None
    if new_head:
        scorer.untrained_head = True
        scorer.note(
            f"A new score head was initialised ({', '.join(new_head)}): train it before its scores mean anything."
        )
    return scorer


def _load_graph(source: str, options: LoadOptions) -> Scorer:
    """A scorer whose logits a graph of the folder computes; its model has names and settings, and no weights."""
    kind = backends.format_named(options.backend, kind="backend", more=("torch",))
    found = partial(file_of, source, options=options)
    with _readable(source), unchanged(source):
        graph = _graph_file(source, kind, options, found)
        config = _config(source, options)
        tokenizer = AutoTokenizer.from_pretrained(source, **{**_hub(options), **options.tokenizer})
        settings = settings_of(source, options)
        parts = parts_of(found, cross_encoder=settings.get("model_type") == "CrossEncoder")
        if yes_no.is_causal(config) or parts.steps:
            raise ModelError(
                f"'{source}' makes its score after the model's own output, which a graph does not hold. "
                "Use backend='torch'."
            )
        template, _, notes = _reading(source, parts, tokenizer, options.template, False)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    engine = backends.opened(kind.name, graph, compute=options.compute)
    if engine.labels not in (None, config.num_labels):
        raise ModelError(
            f"The graph '{graph}' gives {engine.labels} scores a pair, '{source}' has {config.num_labels}."
        )
    notes += _set_pad_token(model, tokenizer)
    precision = Precision("float32", torch.float32, compute_named(engine.compute), f"as {graph.name} is")
    told = _default_prompt(settings) if options.instruction is None else options.instruction
    scorer = Scorer(
        model.eval(), tokenizer, precision, max_length=_max_length(model, tokenizer, options.max_length),
        template=template, instruction=told, engine=engine,
    )  # fmt: skip
    for note in notes:
        scorer.note(note)
    _set_activation(scorer, settings)
    return scorer


def _graph_file(source: str, kind: backends.Format, options: LoadOptions, found: FileOf) -> Path:
    """The graph of a folder or repository; raises ModelError, with the line that makes one, where there is none."""
    usual = Path(kind.file)
    wanted = usual if options.file_name is None else Path(options.file_name)
    here = sorted(path.relative_to(source) for path in Path(source).rglob(f"*{usual.suffix}"))
    if options.file_name is None and usual not in here and len(here) == 1:
        wanted = here[0]
    for place in dict.fromkeys((wanted, usual.parent / wanted)):
        if (graph := found(place.as_posix())) is not None:
            for weights in (place.with_suffix(".bin"), place.with_name(f"{place.name}.data")):
                found(weights.as_posix())  # a file of their own, which a hub is to bring too
            return Path(graph)
    others = f" It holds {', '.join(path.as_posix() for path in here)}: give one as file_name." if here else ""
    raise ModelError(
        f"'{source}' holds no '{wanted.as_posix()}' for backend='{kind.name}'.{others} Make one: "
        f"halfrank export MODEL --format {kind.name} --out FOLDER"
    )


def save(
    scorer: Scorer,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write `scorer` as a sequence-classification folder, uniformly in `dtype` (its storage dtype by default).

    Weights above `max_shard_size` are cut into several files. They are converted as they are written: a save holds no
    second copy of the model. Raises NonFiniteWeightError before anything is written, SaveError (nothing partial left)
    when the disk refuses.
    """
    lora.refuse_own_base(scorer, Path(path))
    write = writer(scorer, dtype=dtype, card=card, max_shard_size=max_shard_size)
    write_whole(Path(path), write, stale=stale_files(scorer))


def stale_files(scorer: Scorer) -> tuple[str, ...]:
    """Files of a folder that a save of `scorer` makes untrue where it does not write them again."""
    return (*WEIGHT_FILES, *(lora.FILES if scorer.adapters is None else ("config.json",)))


def write_settings(scorer: Scorer, stage: Path, *, card: str | None = None) -> None:
    """Fill a folder with all of `scorer` but weights: configuration, tokenizer, how others read it, card."""
    with quiet():
        model: Any = scorer.model
        model.save_pretrained(stage, state_dict={})
        scorer.tokenizer.save_pretrained(stage)
    for empty in (path for pattern in WEIGHT_FILES for path in stage.glob(pattern)):
        empty.unlink()
    _finish_config(stage, scorer, torch.float32)
    (stage / "README.md").write_text(card or _card(scorer, torch.float32), encoding="utf-8")


def writer(
    scorer: Scorer, *, dtype: torch.dtype | None = None, card: str | None = None, max_shard_size: str = MAX_SHARD_SIZE
) -> Callable[[Path], None]:
    """What fills an empty folder with `scorer`; raises NonFiniteWeightError at once, before there is a folder.

    Of a model with adapters these alone are written, in float32, with the name of the model that they belong to.
    """
    if scorer.adapters is not None:
        return partial(_write_adapters, scorer, card)
    scorer.needs_weights("Saving")
    storage = dtype or scorer.precision.storage
    refuse_unstorable(scorer, storage)

    def write(stage: Path) -> None:
        with quiet():
            _write_model(scorer, stage, storage, max_shard_size)
            scorer.tokenizer.save_pretrained(stage)
        _finish_config(stage, scorer, storage)
        (stage / "README.md").write_text(card or _card(scorer, storage), encoding="utf-8")

    return write


def _write_adapters(scorer: Scorer, card: str | None, stage: Path) -> None:
    lora.write(scorer, stage)
    if isinstance(scorer.model, Modular):
        scorer.model.write_steps(stage, sources(scorer, torch.float32))
    with quiet():
        scorer.tokenizer.save_pretrained(stage)
    _write_settings(stage, scorer)
    text = (card or _card(scorer, torch.float32)) + lora.opened_by_peft(scorer)
    (stage / "README.md").write_text(text, encoding="utf-8")


def record_islands(scorer: Scorer, path: Path) -> None:
    """Write the islands of `scorer` into an existing folder of its; weights and tokenizer stay as they are."""

    def write(stage: Path) -> None:
        for name, islands in (
            ("config.json", list(scorer.islands)),
            ("config_sentence_transformers.json", [f"{PEER_PREFIX}{name}" for name in scorer.wide_products()]),
        ):
            if (path / name).exists():
                content = json.loads((path / name).read_text(encoding="utf-8"))
                _write_json(stage / name, content | {ISLANDS: islands})

    write_whole(path, write)


def exported_weights(scorer: Scorer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's state in one dtype; float32 joins 16-bit weights with their residuals, so nothing trained is lost.

    All of it at once: a save goes through `sources` instead.
    """
    refuse_unstorable(scorer, dtype)
    return {name: source.whole() for name, source in sources(scorer, dtype).items()}


def sources(scorer: Scorer, dtype: torch.dtype) -> dict[str, Source]:
    """The model's state as it would be written in one dtype; nothing is converted yet."""
    found = {}
    for name, tensor in scorer.model.state_dict().items():
        residual = None if dtype in NARROW else scorer.residuals.get(name)
        found[name] = Source(tensor, dtype if tensor.is_floating_point() else tensor.dtype, residual)
    return found


def refuse_unstorable(scorer: Scorer, dtype: torch.dtype) -> None:
    """Raise NonFiniteWeightError for the first weight that is not finite or that `dtype` cannot hold."""
    for name, source in sources(scorer, dtype).items():
        if not all(all_finite(piece) for piece in source.pieces() if piece.is_floating_point()):
            raise NonFiniteWeightError(
                f"'{name}' has values that are NaN, infinite or beyond {torch.finfo(dtype).max:g}, the largest "
                f"{dtype_name(dtype)} number. Nothing was saved; save with dtype=torch.float32.",
                tensors=[name],
                out_of_range=all_finite(source.tensor),
            )


def _write_model(scorer: Scorer, stage: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Configuration, code of the folder's own if it has any, and weights."""
    model, weights = scorer.model, sources(scorer, dtype)
    body = model.body if isinstance(model, Modular) else model
    body.save_pretrained(stage, state_dict={})  # everything but the weights
    if isinstance(model, Modular):
        model.write_steps(stage, weights)
        weights = {name.removeprefix("body."): s for name, s in weights.items() if name.startswith("body.")}
    write_weights(body, stage, weights, max_shard_size=max_shard_size)


def _of_base(added: lora.Stored, source: str, options: LoadOptions) -> tuple[str, LoadOptions]:
    """The model that adapters belong to, and how it is read for them."""
    labels = added.num_labels
    if None not in (labels, options.num_labels) and labels != options.num_labels:
        raise ModelError(
            f"The adapters in '{source}' have a head of {labels} labels; got num_labels={options.num_labels}."
        )
    own = replace(
        options, num_labels=labels or options.num_labels, dtype=added.storage or options.dtype, revision=added.revision
    )
    where = f"{lora.CONFIG} in '{source}' (base_model_name_or_path)"
    try:
        _check_folder(added.base)
    except ModelError as error:
        raise ModelError(
            f"'{source}' holds adapters (LoRA) of the model '{added.base}', which is not there. Put it back, or write "
            f"where it is into {where}. ({error})"
        ) from error
    if file_of(added.base, lora.CONFIG, options=own) is not None:
        raise ModelError(
            f"{where} names '{added.base}', which holds adapters itself. Merge those, and name the result."
        )
    return added.base, own


def _check_folder(source: str) -> None:
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists() and (folder / lora.CONFIG).exists():
        return  # adapters, which are checked when they are read
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"'{source}' holds no config.json: it is not a model folder.")
        if not list(folder.glob("*.safetensors")):
            found = sorted(item.name for pattern in ("*.bin", "*.pt") for item in folder.glob(pattern))
            graphs = [name for name, kind in backends.FORMATS.items() if (folder / kind.file).exists()]
            if graphs:
                raise ModelError(
                    f"'{source}' holds no torch weights, it was exported to {graphs[0]}: load it with "
                    f"backend='{graphs[0]}' (--backend {graphs[0]})."
                )
            what = (
                f"only pickled weights ({', '.join(found)}), which halfrank never unpickles" if found else "no weights"
            )
            raise ModelError(f"'{source}' holds {what}. It needs model.safetensors: save it again with safetensors.")
        files_of(folder)  # an index that names them all
        if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
            # transformers would make an empty tokenizer, and score texts that it never read.
            raise ModelError(
                f"'{source}' holds no tokenizer. Copy tokenizer.json (or the vocabulary) beside the weights."
            )
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or folder.exists():
        raise ModelError(f"There is no model folder at '{source}'. Give a folder or a hub id such as 'owner/name'.")


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except SafetensorError as error:
        raise ModelError(
            f"The weights in '{source}' are corrupt or truncated ({error}). Copy the folder again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        if "pytorch_model.bin" in str(error):
            raise ModelError(
                f"'{source}' holds no model.safetensors, and halfrank never unpickles. Save it again with safetensors."
            ) from error
        reason = str(error).strip().splitlines()
        raise ModelError(f"Cannot load '{source}': {' '.join(reason[:3]) or type(error).__name__}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own messages and bars away while a model is read or written."""
    # The load report and the shard bar of transformers say in forty lines what `notes` say in one.
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _hub(options: LoadOptions) -> dict[str, Any]:
    return {
        "revision": options.revision or "main",
        "token": options.token,
        "cache_dir": options.cache_folder,
        "local_files_only": options.local_files_only,
        "trust_remote_code": options.trust_remote_code,
    }


def read_config(source: str, options: LoadOptions = LoadOptions()) -> Any:
    """The config that `load` would use; raises ModelError for what is no model folder. No weight is read."""
    with _readable(source):
        _check_folder(source)
        added = lora.stored(source, partial(file_of, source, options=options))
        return _config(*((source, options) if added is None else _of_base(added, source, options)))


def base_of(source: str, options: LoadOptions = LoadOptions()) -> str:
    """The folder or hub id whose config a model has: its own, or for adapters that of the model they belong to."""
    added = adapters_of(source, options)
    return source if added is None else added.base


def adapters_of(source: str, options: LoadOptions = LoadOptions()) -> lora.Stored | None:
    """The adapters that a folder or hub id holds; None for a whole model."""
    return lora.stored(source, partial(file_of, source, options=options))


def read_tokenizer(source: str, model: PreTrainedModel, options: LoadOptions) -> tuple[Any, int]:
    """The tokenizer at `source`, and the longest pair in tokens that it and `model` hold; no weight is read."""
    with _readable(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **{**_hub(options), **options.tokenizer})
    return tokenizer, _max_length(model, tokenizer, options.max_length)


def _config(source: str, options: LoadOptions) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **{**_hub(options), **options.config})
    except (AttributeError, StrictDataclassError) as error:  # a dtype that torch does not have, a size that is a text
        raise ModelError(f"The config.json of '{source}' cannot be used: {' '.join(str(error).split())}.") from error
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise ModelError(f"The config.json of '{source}' cannot be used: it has {layers!r} layers (num_hidden_layers).")
    names = config.architectures or []
    if options.num_labels is not None:
        config.num_labels = options.num_labels
    elif any(name.endswith("ForConditionalGeneration") for name in names):
        raise ModelError(
            f"'{source}' generates text from an input of its own ({names[0]}), so it has no yes/no score. "
            "Pass num_labels=1 to put a new score head on it, which then has to be trained."
        )
    elif not any(name.endswith("ForSequenceClassification") for name in names) and "num_labels" not in options.config:
        config.num_labels = 1
    return config


Answers = tuple[int, int | None]  # tokens of yes and no
Check = Callable[[Batch, Tensor], None]  # raises ModelError for scores that are not the checkpoint's own


def _reading(
    source: str, parts: Parts, tokenizer: Any, asked: str | None, causal: bool
) -> tuple[Template | None, Answers | None, list[str]]:
    """How pairs are read, for a causal model with the tokens of its answers, and what the user should know about it."""
    name, notes = asked, []
    template = None if asked else templates.stored_template(parts.transformer, parts.listed, tokenizer)
    if causal and template is None and asked is None and parts.answers is None:
        name = templates.published_kind(source)
        if name is None and tokenizer.chat_template:
            raise ModelError(
                f"The chat template of '{source}' cannot carry a query and a document, and the folder does not say how "
                f"its pairs are to be read. Choose a template: {', '.join(templates.KINDS)} or {templates.PLAIN}; or "
                "pass num_labels=1 to put a new score head on the model."
            )
        if name is None:
            notes = [
                "The folder has no chat template: query and document are read one after the other, and the score is "
                "'yes' less 'no'. Train it, or choose how a pair is asked about "
                f"(template={', '.join(repr(kind) for kind in templates.KINDS)})."
            ]
        else:
            notes = [f"Pairs are read through the built-in template '{name}', which will be saved with the model."]
    if name in templates.KINDS:
        template = templates.built_in(name, tokenizer)
    if not causal:
        return template, None, notes
    if parts.answers is not None and asked is None:
        return template, parts.answers, notes
    kind = templates.KINDS.get(name or "")
    return template, templates.answer_ids(tokenizer, *((kind.yes, kind.no) if kind else ("yes", "no"))), notes


def _built(
    source: str,
    config: Any,
    parts: Parts,
    tokenizer: Any,
    template: Template | None,
    answers: Answers | None,
    options: LoadOptions,
    found: FileOf,
) -> tuple[Model, list[str], Check | None]:
    """The model, the names of weights that are new, and for a causal one a check of its scores."""
    if parts.modular:
        return _modular(source, config, parts, options, found), [], None
    if answers is None:
        return *_model(source, config, options), None
    causal = _pretrained(AutoModelForCausalLM, source, config, options)
    probe = tokenizer("a", "b") if template is None else tokenizer(template.text(tokenizer, ("a", "b")))
    by_mask = probe["input_ids"][-1] == (tokenizer.pad_token_id if tokenizer.pad_token_id is not None else -1)
    return yes_no.scorer_of(causal, *answers, by_mask=by_mask), [], yes_no.agrees(causal, *answers)


def _check_scores(scorer: Scorer, check: Check) -> None:
    batch = pack(scorer.pairs.encode(PROBES), range(len(PROBES))).to(scorer.device)
    with scorer.computing_in("float32"), torch.no_grad():
        check(batch, scorer.logits(batch))


def _modular(source: str, config: Any, parts: Parts, options: LoadOptions, found: FileOf) -> Modular:
    labels = config.num_labels
    model = Modular(_pretrained(AutoModel, source, config, options), parts.steps)
    if options.num_labels not in (None, model.config.num_labels):
        raise ModelError(
            f"The steps of '{source}' make {model.config.num_labels} scores and not {labels}. Leave num_labels out."
        )
    load_steps(model, found)
    return model


def _read(kind: Any, source: str, config: Any, options: LoadOptions) -> tuple[PreTrainedModel, list[str]]:
    """A model of an Auto class and the names of its weights that are in no file; random state is left as it was."""
    before = torch.get_rng_state()
    try:
        with converting_as_read():
            model, info = kind.from_pretrained(
                source,
                config=config,
                dtype=options.dtype or "auto",
                output_loading_info=True,
                use_safetensors=True,
                **{**_hub(options), **options.model},
            )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            _refuse_misfit(kind, source, config, options)
        raise
    finally:
        torch.set_rng_state(before)
    return model, sorted(info["missing_keys"])


def _refuse_misfit(kind: Any, source: str, config: Any, options: LoadOptions) -> None:
    """Raise ModelError naming the weight that has another shape in the files than in the model of `config`."""
    place = file_of(source, "config.json", options=options)
    if place is not None:
        with torch.device("meta"):
            refuse_misfit(kind.from_config(config), headers_in(Path(place).parent), source)


def _pretrained(kind: Any, source: str, config: Any, options: LoadOptions) -> PreTrainedModel:
    """A model of which all weights are in the folder; a pooler that nothing reads may be missing."""
    model, missing = _read(kind, source, config, options)
    missing = [name for name in missing if "pooler" not in name]
    if missing:
        raise ModelError(f"'{source}' lacks {len(missing)} weights: {', '.join(missing[:5])}.")
    return model


def _model(source: str, config: Any, options: LoadOptions) -> tuple[PreTrainedModel, list[str]]:
    model, missing = _read(AutoModelForSequenceClassification, source, config, options)
    body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name]
    if body:
        raise ModelError(f"'{source}' lacks {len(body)} weights of the model's body: {', '.join(body[:5])}.")
    _initialise_in_float32(model, missing)
    return model, missing


def _initialise_in_float32(model: PreTrainedModel, missing: list[str]) -> None:
    # Drawn in float32 whatever the storage: a seed gives the same head in every format.
    for name in dict.fromkeys(key.rpartition(".")[0] for key in missing):
        module = model.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
            parameter._is_hf_initialized = False
        with torch.no_grad():
            model._init_weights(module)


def _refuse_non_finite(model: PreTrainedModel, source: str) -> None:
    bad = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point() and not all_finite(tensor)]
    if not bad:
        return
    names = ", ".join(bad[:5])
    if all(_finite_in_file(source, name) for name in bad):
        raise NonFiniteWeightError(
            f"'{source}' holds finite values too large for {dtype_name(model.dtype)} in {len(bad)} of its tensors: "
            f"{names}. Load in bfloat16 or float32.",
            tensors=bad,
            out_of_range=True,
        )
    raise NonFiniteWeightError(
        f"'{source}' holds NaN or infinite values in {len(bad)} of its tensors: {names}. Load another copy of it.",
        tensors=bad,
    )


def _finite_in_file(source: str, name: str) -> bool:
    """Whether a local file holds finite values for a weight; False where no file has it under this name."""
    for file in files_of(Path(source)):
        if name in (stored := TensorFile(file)):
            return all_finite(stored[name])
    return False


def _set_pad_token(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise ModelError("The tokenizer has no pad, end or unknown token: add one and resize the embeddings.")
        tokenizer.pad_token = token
        model.config.pad_token_id = tokenizer.pad_token_id
        return [f"The tokenizer had no pad token: {token!r} is used, and will be saved."]
    if model.config.pad_token_id != tokenizer.pad_token_id:
        stored, model.config.pad_token_id = model.config.pad_token_id, tokenizer.pad_token_id
        return [
            f"The config's pad_token_id {stored} is not the tokenizer's {tokenizer.pad_token_id}: the latter is used."
        ]
    return []


def _compared(model: Model, source: str, options: LoadOptions) -> list[str]:
    """What the files hold beside `model`, as notes; raises ModelError where they hold its weights in integers."""
    place = file_of(source, "config.json", options=options)
    body = model.body if isinstance(model, Modular) else model
    stored = {} if place is None else headers_in(Path(place).parent)
    refuse_integers(body, stored, source)
    return layer_notes(body, stored, source)


def _max_length(model: PreTrainedModel, tokenizer: Any, asked: int | None) -> int:
    limit = position_limit(model)
    if asked is not None:
        if asked < 4 or (limit is not None and asked > limit):
            raise ModelError(f"max_length must lie between 4 and the model's {limit or 'own'} positions; got {asked}.")
        return asked
    # Tokenizers without a limit store 1e30.
    candidates = [length for length in (tokenizer.model_max_length, limit) if length and length < 10**9]
    return min(candidates, default=512)


def settings_of(source: str | os.PathLike[str], options: LoadOptions) -> dict[str, Any]:
    """What a folder or repository stores in its sentence-transformers file, if it is that of a cross-encoder."""
    found = file_of(os.fspath(source), SETTINGS, options=options)
    content = {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    return content if content.get("model_type", "CrossEncoder") == "CrossEncoder" else {}


def file_of(source: str, name: str, *, options: LoadOptions) -> str | None:
    """A file of a folder or repository; None where there is none of that name."""
    return cached_file(
        source,
        name,
        cache_dir=options.cache_folder,
        revision=options.revision,
        token=options.token,
        local_files_only=options.local_files_only,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _default_prompt(settings: Mapping[str, Any]) -> str:
    return (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or ""


def _set_activation(scorer: Scorer, settings: Mapping[str, Any]) -> None:
    path = stored_activation(scorer.config, settings)
    if path is None:
        return
    try:
        activation_named(path)
    except ModelError as error:
        usual = scorer.activation.rpartition(".")[2]
        scorer.note(f"{error} {usual} is used, as for a folder without one: pass activation_fn to choose another.")
    else:
        scorer.activation = path


def _islands(config: Any, settings: Mapping[str, Any], asked: tuple[str, ...] | None) -> list[str]:
    if asked is None:
        noted = (settings.get(lora.NOTES) or {}).get("islands") or ()
        asked = (*(getattr(config, ISLANDS, None) or ()), *(settings.get(ISLANDS) or ()), *noted)
    return [own_name(name) for name in asked]


def own_name(name: str) -> str:
    """A module's name without what sentence-transformers puts before it."""
    return name.removeprefix(PEER_PREFIX)  # sentence-transformers counts its own modules first


def _finish_config(stage: Path, scorer: Scorer, dtype: torch.dtype) -> None:
    config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    if OLD_NAME in config:
        config[OLD_NAME] = scorer.activation
    config["sentence_transformers"] = {"activation_fn": scorer.activation, "version": "5.0.0"}
    for private in ("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", ISLANDS):
        config.pop(private, None)
    if scorer.islands:
        config[ISLANDS] = list(scorer.islands)
    _write_json(stage / "config.json", config)
    _write_settings(stage, scorer)


def _write_settings(stage: Path, scorer: Scorer) -> None:
    _write_json(stage / MODULES, _module_list(scorer.model))
    _write_json(
        stage / SETTINGS,
        {
            "__version__": {"pytorch": torch.__version__, "transformers": transformers.__version__},
            "activation_fn": scorer.activation,
            "default_prompt_name": PROMPT if scorer.instruction else None,
            "model_type": "CrossEncoder",
            "prompts": {PROMPT: scorer.instruction} if scorer.instruction else {},
            # The peer widens plain Linear modules only, and refuses any other name.
            **(
                {ISLANDS: [_peer_name(scorer.model, name) for name in scorer.wide_products()]} if scorer.islands else {}
            ),
            **({} if scorer.adapters is None else {lora.NOTES: lora.notes(scorer)}),
        },
    )
    _write_json(stage / TRANSFORMER, _transformer_settings(scorer))


def _module_list(model: Model) -> list[dict[str, Any]]:
    steps = model.specs if isinstance(model, Modular) else ()
    places = [("0", "", TRANSFORMER_TYPE), *((step.name, step.path, step.type) for step in steps)]
    return [{"idx": n, "name": name, "path": path, "type": kind} for n, (name, path, kind) in enumerate(places)]


def _transformer_settings(scorer: Scorer) -> dict[str, Any]:
    """How sentence-transformers reads texts, and what it takes from the model, to score as halfrank does."""
    modular, template = isinstance(scorer.model, Modular), scorer.template
    call: dict[str, Any] = {"method": "forward", "method_output_name": "last_hidden_state" if modular else "logits"}
    settings: dict[str, Any] = {
        "transformer_task": "feature-extraction" if modular else "sequence-classification",
        "modality_config": {"text": call},
        "module_output_name": TOKENS if modular else SCORES,
    }
    if scorer.adapters is not None:  # the peer reads the config of their base model, which may name no pad token
        settings["config_kwargs"] = {"pad_token_id": scorer.config.pad_token_id}
    if template is not None:
        layout = "structured" if template.structured else "flat"
        settings["modality_config"]["message"] = {**call, "format": layout}
        settings["processing_kwargs"] = {"chat_template": dict(template.arguments)}
    return settings


def _peer_name(model: Model, name: str) -> str:
    if not isinstance(model, Modular):
        return f"{PEER_PREFIX}{name}"
    inner = name.removeprefix("head.")
    return inner if inner != name else f"{PEER_PREFIX}{name.removeprefix('body.')}"


def _found_in(model: Model, names: list[str]) -> list[str]:
    """Names as `model` has them: the folder of a modular one leaves out what body and head are called here."""
    known = dict(model.named_modules())
    return [next((own for own in (name, f"body.{name}", f"head.{name}") if own in known), name) for name in names]


ISLANDS = "keep_in_fp32_modules"
PEER_PREFIX = "0.model."
PROMPT = "default"  # what a saved instruction is called among the prompts of a folder


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(scorer: Scorer, storage: torch.dtype) -> str:
    return (
        "---\ntags:\n- sentence-transformers\n- cross-encoder\n- halfrank\npipeline_tag: text-ranking\n"
        "library_name: sentence-transformers\n---\n\n"
        f"# Cross-encoder\n\nA {scorer.config.model_type} model with {scorer.num_labels} label(s), at most "
        f"{scorer.max_length} tokens a pair, weights in {dtype_name(storage)}.\n"
    )
