"""How each public name, parameter and return shape of the peer's CrossEncoder is called, on it and on ours.

A probe takes a class (ours or the peer's) and the places of tiny real folders, and returns what can be compared.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import sentence_transformers as peer
import torch
from torch import nn
from torch.utils.data import DataLoader

from judges import JUDGES
from judges import judge as judge_named
from tiny import PAIRS, SENTENCES, make_folder

Probe = Callable[[Any, "Places"], Any]
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
REPOSITORY = "tiny/model"
QUERY, DOCUMENTS = SENTENCES[0], SENTENCES[1:]
# What the facts page lists as in use, beside what the peer's classes define.
FACTS = ["parameters", "named_parameters", "state_dict", "half", "bfloat16", "float", "eval", "train", "training"]
OLDER = {  # parameter names of 2.x to 5.x by method, as the facts page lists them
    "__init__": [
        "model_name", "automodel_args", "tokenizer_args", "tokenizer_kwargs", "config_args",
        "default_activation_function", "classifier_dropout", "cache_dir",
    ],
    "predict": ["sentences", "activation_fct", "num_workers"],
    "rank": ["activation_fct", "num_workers", "apply_softmax", "convert_to_numpy", "convert_to_tensor"],
    "save_to_hub": ["repo_name"],
}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Folders of tiny models, a hub cache that holds one of them twice, and a folder to write into."""

    one: str
    three: str
    cache: str
    scratch: Path

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.scratch))


def places(root: Path) -> Places:
    one, three = make_folder("bert", root / "one"), make_folder("bert", root / "three", num_labels=3)
    cached = root / "cache" / "models--tiny--model"
    for number, branch in enumerate(("main", "other")):
        commit = str(number) * 40
        shutil.copytree(one, cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / branch).write_text(commit)
    config = cached / "snapshots" / ("1" * 40) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "other"}}))
    (root / "scratch").mkdir()
    return Places(str(one), str(three), str(root / "cache"), root / "scratch")


def scores(model: Any, **options: Any) -> Any:
    return model.predict(PAIRS, show_progress_bar=False, **options)


def made(view: Callable[[Any], Any] = scores, *positions: Any, path: str = "one", **arguments: Any) -> Probe:
    """A model made with `arguments`, seen through `view`."""
    return lambda kind, at: view(kind(getattr(at, path), *positions, **arguments))


def cached(view: Callable[[Any], Any], name: str = REPOSITORY, **arguments: Any) -> Probe:
    def probe(kind: Any, at: Places) -> Any:
        places = {"cache_folder": at.cache, "local_files_only": True}
        return view(kind(name, **{k: at.cache if v is CACHE else v for k, v in {**places, **arguments}.items()}))

    return probe


CACHE = object()


def called(method: str, *positions: Any, path: str = "one", **arguments: Any) -> Probe:
    """What a method returns that leaves the model as it is."""
    return lambda kind, at: getattr(read_only(kind, getattr(at, path)), method)(*positions, **arguments)


def card(kind: Any, at: Places) -> Any:
    facts = peer.cross_encoder.CrossEncoderModelCardData(language="en", license="apache-2.0", model_name="Mine")
    model = kind(at.one, model_card_data=facts)
    model.save(str(at.fresh() / "m"))
    text = (sorted(at.scratch.iterdir(), key=os.path.getmtime)[-1] / "m" / "README.md").read_text()
    return model.model_card_data is facts, "language:\n- en" in text, "license: apache-2.0" in text, "# Mine" in text


def from_modules(kind: Any, at: Places) -> Any:
    from sentence_transformers.base.modules import Transformer

    return scores(kind(modules=[Transformer(at.one, transformer_task="sequence-classification")]))


def dtype_of(model: Any) -> Any:
    return model.dtype, scores(model).dtype


CONSTRUCTOR: dict[str, Probe] = {
    "model_name_or_path": made(),
    "modules": from_modules,
    "device": made(lambda m: (m.device, scores(m)), device="cpu"),
    "prompts": made(lambda m: (m.prompts, scores(m, prompt_name="q")), prompts={"q": "what is "}),
    "default_prompt_name": made(
        lambda m: (m.default_prompt_name, scores(m)), prompts={"q": "what is "}, default_prompt_name="q"
    ),
    "cache_folder": cached(scores),
    "trust_remote_code": made(lambda m: (m.trust_remote_code, scores(m)), trust_remote_code=True),
    "revision": cached(lambda m: m.config.id2label, revision="other"),
    "local_files_only": cached(scores, "tiny/absent"),
    "token": made(token="secret"),
    "model_kwargs": made(dtype_of, model_kwargs={"torch_dtype": "float16"}),
    "processor_kwargs": made(lambda m: (m.max_seq_length, scores(m)), processor_kwargs={"model_max_length": 24}),
    "config_kwargs": made(lambda m: m.config.classifier_dropout, config_kwargs={"classifier_dropout": 0.25}),
    "model_card_data": card,
    "backend": made(lambda m: (m.backend, m.get_backend()), backend="torch"),
    "num_labels": made(lambda m: (m.num_labels, scores(m).shape), num_labels=1),
    "max_length": made(lambda m: (m.max_length, scores(m)), max_length=24),
    "activation_fn": made(lambda m: (type(m.activation_fn), scores(m)), activation_fn=nn.Tanh()),
    "keep_in_fp32_modules": made(
        lambda m: (m.keep_in_fp32_modules, scores(m)), keep_in_fp32_modules=["0.model.bert.pooler.dense"]
    ),
    "model_name": lambda kind, at: scores(kind(model_name=at.one)),
    "automodel_args": made(dtype_of, automodel_args={"torch_dtype": torch.bfloat16}),
    "tokenizer_args": made(lambda m: m.max_seq_length, tokenizer_args={"model_max_length": 24}),
    "tokenizer_kwargs": made(lambda m: m.max_seq_length, tokenizer_kwargs={"model_max_length": 24}),
    "config_args": made(lambda m: m.config.classifier_dropout, config_args={"classifier_dropout": 0.25}),
    "default_activation_function": made(default_activation_function=nn.Identity()),
    "classifier_dropout": made(lambda m: m.config.classifier_dropout, classifier_dropout=0.25),
    "cache_dir": lambda kind, at: scores(kind(REPOSITORY, cache_dir=at.cache, local_files_only=True)),
}
INVOKED: dict[str, Probe] = {  # further ways to call the constructor that the facts page lists
    "positions (path, 1, 48)": made(lambda m: (m.max_length, scores(m)), 1, 48),
    "positions with activation and device": made(lambda m: (type(m.activation_fn), m.device), 1, 48, nn.Tanh(), "cpu"),
    **{
        f"model_kwargs {key}={value!r}": made(dtype_of, model_kwargs={key: value})
        for key in ("torch_dtype", "dtype")
        for value in ("float16", "auto", torch.float16)
    },
    "a name without owner": cached(scores, "tiny-model"),
    "backend='onnx'": made(scores, backend="onnx"),
}

PREDICT: dict[str, Any] = {
    "prompt_name": {"prompt_name": "q"},
    "prompt": {"prompt": "what is "},
    "batch_size": {"batch_size": 3},
    "show_progress_bar": {"show_progress_bar": False},
    "activation_fn": {"activation_fn": nn.Tanh()},
    "apply_softmax": {"apply_softmax": True},
    "convert_to_numpy": {"convert_to_numpy": False},
    "convert_to_tensor": {"convert_to_tensor": True},
    "device": {"device": "cpu"},
    "pool": {"pool": None},
    "chunk_size": {"chunk_size": 5},
    "activation_fct": {"activation_fct": nn.Tanh()},
    "num_workers": {"num_workers": 0},
}
RANK_ONLY: dict[str, Any] = {"top_k": {"top_k": 3}, "return_documents": {"return_documents": True}}


def prompted(kind: Any, at: Places, labels: int = 1) -> Any:
    return kind(at.one if labels == 1 else at.three, prompts={"q": "what is "})


def predict_probes() -> dict[str, Probe]:
    def with_options(options: dict[str, Any]) -> Probe:
        return lambda kind, at: [prompted(kind, at, labels).predict(PAIRS, **options) for labels in (1, 3)]

    found = {name: with_options(options) for name, options in PREDICT.items()}
    found["inputs"] = lambda kind, at: prompted(kind, at).predict(inputs=PAIRS)
    found["sentences"] = lambda kind, at: prompted(kind, at).predict(sentences=PAIRS)
    return found


def rank_probes() -> dict[str, Probe]:
    def with_options(options: dict[str, Any]) -> Probe:
        return lambda kind, at: prompted(kind, at).rank(QUERY, DOCUMENTS, **options)

    shared = {name: options for name, options in PREDICT.items() if name not in ("inputs", "sentences")}
    found = {name: with_options(options) for name, options in (shared | RANK_ONLY).items()}
    found["query"] = lambda kind, at: prompted(kind, at).rank(query=QUERY, documents=DOCUMENTS)
    found["documents"] = lambda kind, at: prompted(kind, at).rank(QUERY, documents=tuple(DOCUMENTS))
    return found


def pooled(method: str, options: dict[str, Any]) -> Probe:
    """The same with two worker processes."""

    def probe(kind: Any, at: Places) -> Any:
        model = kind(at.one)
        pool = model.start_multi_process_pool(["cpu", "cpu"])
        try:
            arguments = (PAIRS,) if method == "predict" else (QUERY, DOCUMENTS)
            result = getattr(model, method)(*arguments, pool=pool, **options)
        finally:
            model.stop_multi_process_pool(pool)
        return sorted(pool), result

    return probe


POOLED: dict[tuple[str, str], Probe] = {
    ("predict", "pool"): pooled("predict", {}),
    ("predict", "chunk_size"): pooled("predict", {"chunk_size": 5}),
    ("predict", "device"): lambda kind, at: kind(at.one).predict(PAIRS, device=["cpu", "cpu"]),
    ("rank", "pool"): pooled("rank", {}),
    ("rank", "chunk_size"): pooled("rank", {"chunk_size": 3}),
    ("rank", "device"): lambda kind, at: kind(at.one).rank(QUERY, DOCUMENTS, device=["cpu", "cpu"]),
    ("start_multi_process_pool", "target_devices"): pooled("predict", {}),
    ("stop_multi_process_pool", "pool"): pooled("predict", {}),
}
PLACES_OF_PREDICT: dict[str, Probe] = {
    "positions: a number in second place is the batch size, as before 6": (lambda kind, at: scores_of_older(kind, at)),
    "positions: batch size in fourth place": lambda kind, at: kind(at.one).predict(PAIRS, None, None, 8),
    "processing_kwargs": lambda kind, at: kind(at.one).predict(PAIRS, processing_kwargs={"text": {"max_length": 9}}),
}


def scores_of_older(kind: Any, at: Places) -> Any:
    model = kind(at.one)  # 6.2 itself reads the number as a prompt's name, so it is called as its older versions were
    return model.predict(PAIRS, batch_size=8) if kind is peer.CrossEncoder else model.predict(PAIRS, 8)


INPUTS: dict[str, Any] = {
    "list of tuples": PAIRS,
    "list of lists": [list(pair) for pair in PAIRS],
    "tuple of tuples": tuple(PAIRS),
    "2-d array": np.array(PAIRS),
    "object array": np.array(PAIRS, dtype=object),
    "one pair in a list": [PAIRS[0]],
    "one tuple": PAIRS[0],
    "one list": list(PAIRS[0]),
    "1-d array": np.array(PAIRS[0]),
    "nothing": [],
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "numpy": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "softmax": {"apply_softmax": True},
}


@functools.cache
def read_only(kind: Any, path: str) -> Any:
    return kind(path)


def returned(form: str, output: str, labels: int) -> Probe:
    def probe(kind: Any, at: Places) -> Any:
        return read_only(kind, at.one if labels == 1 else at.three).predict(INPUTS[form], **OUTPUTS[output])

    return probe


RETURNS: dict[str, Probe] = {
    **{
        f"predict, {form}, {output}, {labels} label{'s' if labels > 1 else ''}": returned(form, output, labels)
        for form in INPUTS
        for output in OUTPUTS
        for labels in (1, 3)
    },
    "predict, 16-bit weights give float32": lambda kind, at: [
        kind(at.one, model_kwargs={"dtype": name}).predict(PAIRS).dtype for name in ("float16", "bfloat16")
    ],
    "rank": called("rank", QUERY, DOCUMENTS),
    "rank, with texts": called("rank", QUERY, DOCUMENTS, return_documents=True),
    "rank, no documents": called("rank", QUERY, []),
    "rank, several labels": called("rank", QUERY, DOCUMENTS, path="three"),
    "rank, in JSON": lambda kind, at: len(json.dumps(kind(at.one).rank(QUERY, DOCUMENTS))) > 0,
    "preprocess": called("preprocess", PAIRS[:3]),
    "preprocess, nothing": called("preprocess", []),
    "tokenize": called("tokenize", PAIRS[:3]),
    "forward": lambda kind, at: (lambda model: model(model.preprocess(PAIRS[:3])))(kind(at.one).eval()),
    "smart_batching_collate": lambda kind, at: kind(at.one).smart_batching_collate(examples()[:3]),
    "smart_batching_collate, classes": lambda kind, at: kind(at.three).smart_batching_collate(examples()[:3]),
    "smart_batching_collate_text_only": called("smart_batching_collate_text_only", PAIRS[:3]),
    **{f"evaluate, {name}": (lambda kind, at, name=name: judged(name)(kind, at)) for name in JUDGES},
    "to returns the model": lambda kind, at: (lambda model: model.to("cpu") is model)(kind(at.one)),
    "half, bfloat16, float, cpu, train and eval return the model": lambda kind, at: [
        (lambda model, name=name: getattr(model, name)() is model)(kind(at.one))
        for name in ("half", "bfloat16", "float", "cpu", "train", "eval")
    ],
}


# Training


def examples() -> list[Any]:
    return [peer.InputExample(texts=list(pair), label=number % 2) for number, pair in enumerate(PAIRS[:8])]


def judge() -> Any:
    return judge_named("CrossEncoderCorrelationEvaluator")


def judged(name: str) -> Probe:
    path = "one" if JUDGES[name][0] == 1 else "three"
    return lambda kind, at: read_only(kind, getattr(at, path)).evaluate(judge_named(name))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)  # the peer writes checkpoints into the working folder
    try:
        yield
    finally:
        os.chdir(before)


FAST = {"epochs": 2, "warmup_steps": 0, "optimizer_params": {"lr": 1e-3}, "show_progress_bar": False}
FIT: dict[str, dict[str, Any]] = {
    "train_dataloader": {},
    "evaluator": {"evaluator": judge()},
    "epochs": {"epochs": 3},
    "loss_fct": {"loss_fct": nn.MSELoss()},
    "activation_fct": {"activation_fct": nn.Tanh()},
    "scheduler": {"scheduler": "warmupcosine"},
    "warmup_steps": {"warmup_steps": 2},
    "optimizer_class": {"optimizer_class": torch.optim.SGD},
    "optimizer_params": {"optimizer_params": {"lr": 5e-4, "betas": (0.5, 0.9)}},
    "weight_decay": {"weight_decay": 0.5},
    "evaluation_steps": {"evaluation_steps": 1, "evaluator": judge()},
    "output_path": {"output_path": "out", "evaluator": judge(), "evaluation_steps": 1},
    "save_best_model": {"save_best_model": False, "output_path": "out"},
    "max_grad_norm": {"max_grad_norm": 0.01, "optimizer_class": torch.optim.SGD, "optimizer_params": {"lr": 0.5}},
    "use_amp": {"use_amp": True},
    "callback": {"callback": lambda score, epoch, steps: None, "evaluator": judge(), "evaluation_steps": 1},
    "show_progress_bar": {"show_progress_bar": False},
}
SCHEDULERS = ["constantlr", "warmupconstant", "warmuplinear", "warmupcosine", "warmupcosinewithhardrestarts"]


def fitted(method: str, options: dict[str, Any]) -> Probe:
    """What training returns, whether a model was written, and the scores it ends with."""

    def probe(kind: Any, at: Places) -> Any:
        model = kind(at.one, config_kwargs=dict(DRY))
        # 6.2's fit cannot take a loss of the user's: the loop it kept from 3.x can.
        older = kind is peer.CrossEncoder and "loss_fct" in options
        train = model.old_fit if older else getattr(model, method)
        with inside(at.fresh()):
            result = train(DataLoader(examples(), batch_size=8), **{**FAST, **options})
            written = Path("out", "model.safetensors").exists()
        return result, written, Trained(scores(model), scores(kind(at.one)))

    return probe


@dataclass(frozen=True)
class Trained:
    """Scores after and before training: compared by how far they moved."""

    after: np.ndarray
    before: np.ndarray


# Folders and repositories


def saved(method: str, options: dict[str, Any]) -> Probe:
    def probe(kind: Any, at: Places) -> Any:
        target = at.fresh() / "m"
        model = kind(at.one)
        result = getattr(model, method)(str(target), **options)
        readme = (target / "README.md").read_text() if (target / "README.md").exists() else None
        weights = sorted(item.name for item in target.iterdir() if item.suffix in (".safetensors", ".bin"))
        named = readme is not None and options.get("model_name", "") in readme  # the peer's card has no data sets
        return result, weights, readme is not None, named, scores(kind(str(target)))

    return probe


SAVE: dict[str, dict[str, Any]] = {
    "path": {},
    "model_name": {"model_name": "Mine"},
    "create_model_card": {"create_model_card": False},
    "train_datasets": {"train_datasets": ["stsb"]},
    "safe_serialization": {"safe_serialization": True},
}
PUSH: dict[str, dict[str, Any]] = {
    "repo_id": {},
    "organization": {"repo_id": "model", "organization": "tiny"},
    "token": {"token": "secret"},
    "private": {"private": True},
    "safe_serialization": {"safe_serialization": True},
    "commit_message": {"commit_message": "mine"},
    "local_model_path": {"local_model_path": "."},
    "exist_ok": {"exist_ok": True},
    "replace_model_card": {"replace_model_card": True},
    "train_datasets": {"train_datasets": ["stsb"], "replace_model_card": True},
    "revision": {"revision": "try"},
    "create_pr": {"create_pr": True},
}


class Hub:
    """Stands in for the hub's client and notes what both classes ask of it."""

    def __init__(self, token: str | None = None) -> None:
        self.asked: list[Any] = [("token", token)]
        HEARD.append(self.asked)

    def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False, **_: Any) -> Any:
        self.asked.append(("create_repo", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool = False) -> None:
        self.asked.append(("create_branch", repo_id, branch, exist_ok))

    def file_exists(self, *_: Any, **__: Any) -> bool:
        return True

    def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> Any:
        card = Path(folder_path, "README.md")
        named = {key: options.get(key) for key in ("commit_message", "revision")} | {"pr": bool(options["create_pr"])}
        self.asked.append(
            ("upload_folder", repo_id, named, card.exists(), Path(folder_path, "model.safetensors").exists())
        )
        return SimpleNamespace(pr_url="https://hub/pr", commit_url="https://hub/commit")


HEARD: list[Any] = []


def pushed(method: str, options: dict[str, Any]) -> Probe:
    def probe(kind: Any, at: Places) -> Any:
        ours = "halfrank.cross_encoder.folders.HfApi"
        theirs = "sentence_transformers.base.model.HfApi"
        readme = mock.patch("sentence_transformers.base.model.load_file_path", return_value="README.md")
        model = kind(at.one)
        with inside(at.fresh()), mock.patch(ours, Hub), mock.patch(theirs, Hub), readme:
            named = {} if "repo_name" in options else {"repo_id": REPOSITORY}
            result = getattr(model, method)(**(named | options))
        return result, HEARD[-1]

    return probe


# Everything else, by name

METHODS: dict[str, dict[str, Probe]] = {
    "__init__": CONSTRUCTOR,
    "predict": predict_probes(),
    "rank": rank_probes(),
    "fit": {name: fitted("fit", options) for name, options in FIT.items()},
    "old_fit": {name: fitted("old_fit", options) for name, options in FIT.items()},
    "save": {name: saved("save", options) for name, options in SAVE.items()},
    "save_pretrained": {name: saved("save_pretrained", options) for name, options in SAVE.items()},
    "push_to_hub": {name: pushed("push_to_hub", options) for name, options in PUSH.items()},
    "save_to_hub": {name: pushed("save_to_hub", options) for name, options in PUSH.items()}
    | {"repo_name": pushed("save_to_hub", {"repo_name": REPOSITORY})},
    "evaluate": {
        "evaluator": lambda kind, at: kind(at.one).evaluate(evaluator=judge()),
        "output_path": lambda kind, at: (
            lambda place: (kind(at.one).evaluate(judge(), output_path=str(place / "e")), os.listdir(place / "e"))
        )(at.fresh()),
    },
    "is_singular_input": {
        "inputs": lambda kind, at: [kind(at.one).is_singular_input(inputs) for inputs in [*INPUTS.values(), (), "a"]]
    },
    "preprocess": {
        "inputs": called("preprocess", inputs=PAIRS[:5]),
        "prompt": called("preprocess", PAIRS[:5], prompt="what is "),
    },
    "tokenize": {"texts": called("tokenize", texts=PAIRS[:5])},
    "forward": {"input": lambda kind, at: (lambda m: m.forward(input=m.preprocess(PAIRS[:5])))(kind(at.one).eval())},
    "supports": {"modality": lambda kind, at: [kind(at.one).supports(one) for one in ("text", "image", ("text", "a"))]},
    "set_keep_in_fp32_modules": {
        "module_names": lambda kind, at: [chosen(kind(at.one), names) for names in (["0.model.classifier"], [])]
    },
    "gradient_checkpointing_enable": {
        "gradient_checkpointing_kwargs": lambda kind, at: checkpointed(kind(at.one, config_kwargs=dict(DRY)))
    },
    "smart_batching_collate": {"batch": lambda kind, at: kind(at.one).smart_batching_collate(batch=examples())},
    "smart_batching_collate_text_only": {"batch": called("smart_batching_collate_text_only", batch=PAIRS)},
    "merge": {},
    "cuda": {"device": called("cuda", device=None)},
    "start_multi_process_pool": {},
    "stop_multi_process_pool": {},
}


def chosen(model: Any, names: list[str]) -> Any:
    model.set_keep_in_fp32_modules(names)
    return model.keep_in_fp32_modules, scores(model)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(model.preprocess(PAIRS[:5]))["scores"].sum().backward()
    gradient = model.model.bert.encoder.layer[0].output.dense.weight.grad
    return model.model.is_gradient_checkpointing, gradient


def names_of(values: Any) -> list[str]:
    return [name for name, _ in values]


NAMES: dict[str, Probe] = {  # values and methods without parameters
    "activation_fn": lambda kind, at: type(kind(at.one).activation_fn),
    "backend": made(lambda m: m.backend),
    "config": made(lambda m: (type(m.config), m.config.hidden_size)),
    "cpu": made(lambda m: m.cpu().device),
    "default_activation_function": made(lambda m: type(m.default_activation_function)),
    "default_huggingface_organization": lambda kind, at: kind.default_huggingface_organization,
    "default_prompt_name": made(lambda m: m.default_prompt_name),
    "device": made(lambda m: m.device),
    "dtype": made(lambda m: m.dtype),
    "get_backend": called("get_backend"),
    "get_default_activation_fn": lambda kind, at: [
        type(kind(path).get_default_activation_fn()) for path in (at.one, at.three)
    ],
    "get_max_seq_length": called("get_max_seq_length"),
    "get_model_kwargs": called("get_model_kwargs"),
    "keep_in_fp32_modules": made(lambda m: m.keep_in_fp32_modules),
    "max_length": made(lambda m: (setattr(m, "max_length", 20), m.max_length, scores(m))),
    "max_seq_length": made(lambda m: (setattr(m, "max_seq_length", 20), m.max_seq_length, scores(m))),
    "modalities": made(lambda m: m.modalities),
    "model": made(lambda m: type(m.model)),
    "model_card_data": made(lambda m: (hasattr(m.model_card_data, "set_evaluation_metrics"), isinstance(
        m.model_card_data, type(m).model_card_data_class))),
    "model_card_data_class": lambda kind, at: sorted(
        {"language", "license", "model_name", "model_id", "train_datasets", "eval_datasets", "task_name", "tags"}
        & set(kind.model_card_data_class.__dataclass_fields__)
    ),
    "model_type": lambda kind, at: kind.model_type,
    "num_labels": lambda kind, at: [kind(path).num_labels for path in (at.one, at.three)],
    "processor": made(lambda m: m.processor("a b").input_ids),
    "prompts": made(lambda m: m.prompts),
    "tokenizer": made(lambda m: m.tokenizer("a b", "c").input_ids),
    "transformers_model": made(lambda m: type(m.transformers_model)),
    "training": made(lambda m: (m.train().training, m.eval().training)),
    "trust_remote_code": made(lambda m: m.trust_remote_code),
    "module_kwargs": made(lambda m: dict(m.module_kwargs)),
    "is_hpu_graph_enabled": made(lambda m: m.is_hpu_graph_enabled),
    "to": made(lambda m: [m.to(*a, **k).dtype for a, k in (
        ((torch.float16,), {}), ((), {"dtype": torch.bfloat16}), (("cpu", torch.float32), {}), ((), {"device": "cpu"}),
    )]),
    "parameters": made(lambda m: [tuple(one.shape) for one in m.parameters()]),
    "named_parameters": made(lambda m: names_of(m.named_parameters())),
    "state_dict": made(lambda m: list(m.state_dict())),
    "half": made(lambda m: m.half().dtype),
    "bfloat16": made(lambda m: m.bfloat16().dtype),
    "float": made(lambda m: m.half().float().dtype),
    "eval": made(lambda m: m.eval().training),
    "train": made(lambda m: m.train().training),
}  # fmt: skip
NOT_CALLED = ["merge"]  # the peer's needs mergekit; ours is tested against float64 averages
WITHOUT_PICKLES = {"save(safe_serialization=False)": saved("save", {"safe_serialization": False})}
