"""The faults that `fault_injection.py` puts into models, data and optimizers, and what each should be found as.

A case is a JSON object: {"fault", "way", "family", "scheme", "compute", "place", "magnitude", "step"}. `place` and
`magnitude` are numbers from 0 to 1 that choose a module (or pair) and a size within the fault's range; `step` is the
training step that it happens in, from 0.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from architectures import built
from common import ROOT
from halfrank.data.packing import pack
from halfrank.diagnosis import Cause
from halfrank.model import folder
from halfrank.model.families import head_modules
from halfrank.model.scorer import Scorer

sys.path.insert(0, str(ROOT / "tests"))
from tiny import PAIRS, tokenizer_for

FAMILIES = ["bert", "deberta-v2", "modernbert", "llama", "gemma"]
SCHEMES = {"float32": torch.float32, "mixed-float16": torch.float32, "mixed-bfloat16": torch.float32,
           "float16": torch.float16, "bfloat16": torch.bfloat16}  # fmt: skip
HALF = ["emulated-float16", "float16"]
NARROW = [*HALF, "emulated-bfloat16"]
EVERY = ["float32", *NARROW]
DECODERS = ["llama", "gemma"]
BCE = nn.BCEWithLogitsLoss()


@dataclass(frozen=True)
class Case:
    """One fault in one model; see the module's first lines."""

    fault: str
    way: int
    family: str
    scheme: str
    compute: str
    place: float = 0.5
    magnitude: float = 0.5
    step: int = 2

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Injected:
    """A fault that is in: the module it should be found in (None: none is to blame), and what it does to a loss."""

    module: str | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = BCE
    labels: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """How often and where a fault can happen; `kind` says which run it is put into."""

    cause: Cause
    kind: str  # train, plain, prediction, load, resume
    ways: int
    computes: list[str] = field(default_factory=lambda: EVERY)
    families: list[str] = field(default_factory=lambda: FAMILIES)
    schemes: list[str] = field(default_factory=lambda: list(SCHEMES))


FAULTS: dict[str, Fault] = {
    "corrupt weight": Fault(Cause.CORRUPT_WEIGHT, "train", 2),
    "corrupt file": Fault(Cause.CORRUPT_WEIGHT, "load", 2),
    "weight too large": Fault(Cause.WEIGHT_OUT_OF_RANGE, "train", 1, HALF, schemes=["float32", "mixed-float16"]),
    "file too large": Fault(Cause.WEIGHT_OUT_OF_RANGE, "load", 2, schemes=["float16"]),
    "product": Fault(Cause.PRODUCT_OVERFLOW, "train", 2, EVERY),
    "residual": Fault(Cause.RESIDUAL_OVERFLOW, "train", 1, HALF),
    "masked row": Fault(Cause.MASKED_ROW, "plain", 2, ["float16"], ["bert", *DECODERS], ["float16"]),
    "saturation": Fault(Cause.SOFTMAX_SATURATION, "prediction", 1, ["float32"], schemes=["float32", "mixed-float16"]),
    "normalisation": Fault(Cause.NORMALISATION, "train", 3),
    "head": Fault(Cause.LOSS_OVERFLOW, "train", 2),
    "label": Fault(Cause.LABEL, "train", 3),
    "input": Fault(Cause.INPUT, "plain", 3, schemes=["float32", "float16", "bfloat16"]),
    "scale": Fault(Cause.GRADIENT_OVERFLOW_SCALE, "train", 1, NARROW),
    "scale given": Fault(Cause.GRADIENT_OVERFLOW_SCALE, "prediction", 1, HALF, schemes=["float32", "float16"]),
    "gradient": Fault(Cause.GRADIENT_OVERFLOW, "train", 2),
    "faint": Fault(Cause.GRADIENT_UNDERFLOW, "prediction", 1, HALF, schemes=["float32", "float16"]),
    "plain adamw": Fault(Cause.SECOND_MOMENT_UNDERFLOW, "plain", 5, ["float16"], schemes=["float16"]),
    "lost updates": Fault(Cause.UPDATE_LOST, "plain", 3, ["bfloat16"], schemes=["bfloat16"]),
    "one rate": Fault(Cause.UPDATE_TOO_LARGE, "plain", 1, ["float32"], schemes=["float32"]),
    "rate": Fault(Cause.LEARNING_RATE, "plain", 1, ["float32"], schemes=["float32"]),
    "pad": Fault(Cause.PAD_TOKEN, "plain", 2, ["float32", "bfloat16"], schemes=["float32", "bfloat16"]),
    "fresh head": Fault(Cause.UNTRAINED_HEAD, "plain", 1, ["float32"], schemes=["float32"]),
    "ties": Fault(Cause.SCORE_TIES, "plain", 2, ["float16", "bfloat16"], schemes=["float16", "bfloat16"]),
    "state": Fault(Cause.OPTIMIZER_STATE, "plain", 4, ["float32"], schemes=["float32"]),
    "checkpoint": Fault(
        Cause.OPTIMIZER_STATE, "resume", 2, ["float32", "emulated-float16"], ["bert", "llama", "deberta-v2"]
    ),
}


@functools.cache
def family_folder(family: str) -> Path:
    """A folder of a tiny random model, its head not as initialised; made once in a process."""
    place = Path(tempfile.mkdtemp(prefix="halfrank-faults-")) / family
    model = built(family)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            alpha = 0.3 if name.split(".")[0] in head_modules(model) else 0.08
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=alpha)
    tokenizer = tokenizer_for("bert")
    if getattr(model.config, "type_vocab_size", 0) < 2:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def scorer_of(case: Case) -> Scorer:
    """The case's model, without any fault."""
    options = folder.LoadOptions(dtype=SCHEMES[case.scheme], compute=case.compute, max_length=48)
    return folder.load(family_folder(case.family), options)


def plain_model(case: Case) -> tuple[Any, dict[str, Tensor]]:
    """transformers' own model in the case's format, and a padded batch of eight pairs with labels."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path, dtype = family_folder(case.family), getattr(torch, case.scheme)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).eval()
    queries, documents = (list(side) for side in zip(*PAIRS[:8], strict=True))
    batch = dict(AutoTokenizer.from_pretrained(path)(queries, documents, padding=True, return_tensors="pt"))
    return model, {**batch, "labels": torch.tensor([float(i % 2) for i in range(8)]).to(dtype)}


def body_products(model: nn.Module) -> list[str]:
    """Names of the Linear modules outside the head that score every pair."""
    head = head_modules(model)  # type: ignore[arg-type]
    return [
        n
        for n, m in model.named_modules()
        if type(m) is nn.Linear and n.split(".")[0] not in head and "pos_" not in n and "pooler" not in n
    ]


def chosen(names: list[str], place: float) -> str:
    return names[min(int(place * len(names)), len(names) - 1)]


def limit_of(case: Case) -> float:
    name = case.compute.removeprefix("emulated-")
    return torch.finfo(getattr(torch, name)).max


def storable(case: Case) -> float:
    return min(limit_of(case), torch.finfo(SCHEMES[case.scheme]).max)


def put_in(case: Case, scorer: Scorer) -> Injected:
    """Put the fault of a training or prediction case into a scorer, now."""
    return INJECT[case.fault](case, scorer)


@torch.no_grad()
def _corrupt_weight(case: Case, scorer: Scorer) -> Injected:
    name = chosen(body_products(scorer.model), case.place)
    weight = scorer.model.get_submodule(name).weight
    weight.view(-1)[int(case.magnitude * (weight.numel() - 1))] = math.nan if case.way == 0 else math.inf
    return Injected(name)


@torch.no_grad()
def _weight_too_large(case: Case, scorer: Scorer) -> Injected:
    name = chosen(body_products(scorer.model), case.place)
    scorer.model.get_submodule(name).weight.view(-1)[3] = 6.6e4 * 10 ** (3 * case.magnitude)
    return Injected(name)


@torch.no_grad()
def _product(case: Case, scorer: Scorer) -> Injected:
    # A key of -inf is a score of -inf, which a softmax takes: queries and keys are another matter than products.
    names = [n for n in body_products(scorer.model) if not n.rpartition(".")[2].startswith(("q", "k"))]
    name = chosen(names, case.place)
    weight = scorer.model.get_submodule(name).weight
    row = (0.4 + 0.5 * case.magnitude) * storable(case) * torch.sign(_input_of(scorer, name))
    rows = slice(0, 1) if case.way == 0 else slice(None)  # one row, or the whole matrix
    weight[rows] = row.to(weight.dtype)  # with the signs of an input nothing cancels
    return Injected(name)


def _input_of(scorer: Scorer, name: str) -> Tensor:
    """One token's input of a module, for weights that cannot cancel."""
    seen: list[Tensor] = []
    module = scorer.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batch = pack(scorer.pairs.encode(PAIRS), range(len(PAIRS)))
    scorer.logits(batch)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[0].float()


def _residual(case: Case, scorer: Scorer) -> Injected:
    model = scorer.model
    layers = [
        name for name, m in model.named_modules() if name.rpartition(".")[2].isdigit() and hasattr(m, "parameters")
    ]
    size = (0.55 + 0.35 * case.magnitude) * limit_of(case)
    if case.family in ("bert", "deberta-v2"):  # post-norm: the sum of a product at the limit and the normalised input
        layer = chosen(layers, case.place)
        _constant_output(model.get_submodule(f"{layer}.output.dropout"), torch.finfo(torch.float16).max)
        with torch.no_grad():
            model.get_submodule(f"{layer}.attention.output.LayerNorm").weight.fill_(300.0)
        return Injected(f"{layer}.output")
    last = "mlp.Wo" if case.family == "modernbert" else "mlp.down_proj"
    for layer in layers:
        _constant_output(model.get_submodule(f"{layer}.{last}"), size)
    return Injected(layers[1])


def _constant_output(module: nn.Module, value: float) -> None:
    module.register_forward_hook(lambda _, args, output: output * 0 + value)


@torch.no_grad()
def _saturation(case: Case, scorer: Scorer) -> Injected:
    parts = (
        "self.query",
        "self.key",
        "self.query_proj",
        "self.key_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "attn.Wqkv",
    )
    names = [name for name in body_products(scorer.model) if name.endswith(parts)]
    attention = chosen(list(dict.fromkeys(name.rpartition(".")[0] for name in names)), case.place)
    for name in names:
        if name.startswith(f"{attention}."):
            weight = scorer.model.get_submodule(name).weight
            rows = len(weight) * 2 // 3 if name.endswith("Wqkv") else len(weight)
            weight[:rows] *= 3e2 * 10**case.magnitude
    return Injected(attention)


def _normalisation(case: Case, scorer: Scorer) -> Injected:
    if case.way == 2:  # a division by 0 where nothing is normalised
        name = chosen(body_products(scorer.model), case.place)
        scorer.model.get_submodule(name).register_forward_hook(
            lambda _, args, output: output / torch.zeros_like(output)
        )
        return Injected(name)
    names = [
        n for n, m in scorer.model.named_modules()
        if "norm" in type(m).__name__.lower() and n.split(".")[0] not in head_modules(scorer.model)
    ]  # fmt: skip
    name = chosen(names, case.place)
    module: Any = scorer.model.get_submodule(name)
    layer_norm = isinstance(module, nn.LayerNorm)
    if case.way == 1 and layer_norm and case.compute == "float32":  # the square of what comes in leaves float32
        size = 10 ** (25 + 10 * case.magnitude)
        module.register_forward_pre_hook(lambda _, args: (args[0] * size, *args[1:]))
        return Injected(name)
    for attribute in ("eps", "variance_epsilon"):
        if hasattr(module, attribute):
            setattr(module, attribute, 0.0)
    module.register_forward_pre_hook(lambda _, args: (args[0] * 0, *args[1:]))
    return Injected(name)


def _head(case: Case, scorer: Scorer) -> Injected:
    if case.way == 0:
        head = head_modules(scorer.model)
        name = [n for n, m in scorer.model.named_modules() if type(m) is nn.Linear and n.split(".")[0] in head][-1]
        with torch.no_grad():
            weight = scorer.model.get_submodule(name).weight
            size = torch.finfo(torch.float32).max * (0.5 + 0.4 * case.magnitude)
            weight.copy_((size * torch.sign(_input_of(scorer, name))).expand_as(weight))
        return Injected(name)
    size = 10 ** (3 + 3 * case.magnitude)
    return Injected("", lambda scores, labels: ((scores.abs() + 1) * size).exp().mean() + BCE(scores, labels))


def _label(case: Case, scorer: Scorer) -> Injected:
    bad = [math.nan, math.inf, -math.inf][case.way]
    return Injected(None, labels={int(case.place * (len(PAIRS) - 1)): bad})


def _scale(case: Case, scorer: Scorer) -> Injected:
    factor = 10 ** (3.5 + 1.5 * case.magnitude)
    if "bfloat16" in case.compute and case.scheme != "float16":  # its range is float32's
        factor = 1e34
    return Injected(None, lambda scores, labels: BCE(scores, labels) * factor)


def _gradient(case: Case, scorer: Scorer) -> Injected:
    if case.way == 0:  # the slope of a root at 0
        return Injected("", lambda scores, labels: (scores * 0).sqrt().sum() + BCE(scores, labels))

    def guarded_too_late(scores: Tensor, labels: Tensor) -> Tensor:
        # What `where` leaves out of the value, its gradient still passes through: 0 times infinity.
        return torch.where(labels > 2, (scores - scores.detach()).log(), scores).mean() + BCE(scores, labels)

    return Injected("", guarded_too_late)


def _faint(case: Case, scorer: Scorer) -> Injected:
    factor = 10 ** -(5 + 2 * case.magnitude)
    return Injected(None, lambda scores, labels: BCE(scores, labels) * factor)


def _nothing(case: Case, scorer: Scorer) -> Injected:
    return Injected(None)


INJECT: dict[str, Callable[[Case, Scorer], Injected]] = {
    "corrupt weight": _corrupt_weight, "weight too large": _weight_too_large, "product": _product,
    "residual": _residual, "saturation": _saturation, "normalisation": _normalisation, "head": _head,
    "label": _label, "scale": _scale, "scale given": _nothing, "gradient": _gradient, "faint": _faint,
    "none": _nothing,
}  # fmt: skip
