"""A model and its data before training: measured on a few pairs, and what to change, worst first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.data import probes
from halfrank.data.pairs import Group
from halfrank.diagnosis.islands import find_islands
from halfrank.doctor import arithmetic, texts
from halfrank.doctor.attention import saturation
from halfrank.doctor.modules import Module, measure
from halfrank.doctor.report import Check, Examination, ModuleRow
from halfrank.losses import LOSSES
from halfrank.model.activation import activation_named
from halfrank.model.families import head_modules
from halfrank.model.scorer import Scorer
from halfrank.model.storage import within
from halfrank.numerics.formats import NARROW_DTYPES, dtype_name
from halfrank.precision import Hardware, detect
from halfrank.predict import raw_logits

SAMPLE = 64  # pairs that are scored and pushed back
ISLAND_PAIRS = 16  # of them, to find out which modules have to be widened
FIRST_SCALE = 2.0**16  # the loss scale that a run begins with
LARGEST_SCALE = 2.0**24
RESERVE_BITS = 3.0  # between the largest scaled gradient and the format's largest number
NEAR_BITS = 1.0  # a module with less headroom than this may overflow on other texts
BIG_STEP = 0.05  # of a weight's usual size, moved by one step of AdamW: twenty steps replace it
SATURATED = 0.5  # share of queries that attend to one token
SURE_SCORE = 12.0  # a logit beyond it has a gradient below 1e-5


@dataclass(frozen=True)
class Plan:
    """What is going to be trained with, as far as the doctor needs it."""

    lr: float = 2e-5
    grouped: bool = False
    memory: Mapping[str, Any] | None = None  # what `memory.py` plans, where the caller has asked it


def examine(
    scorer: Scorer,
    groups: Sequence[Group] | None,
    held_out: Sequence[Group] | None,
    plan: Plan,
    *,
    name: str,
    say: Callable[[str], None] = lambda what: None,
) -> Examination:
    """Everything that can be known before the first step; without `groups` on the built-in texts.

    Weights and settings of `scorer` are the same afterwards. `say` is told what is being done.
    """
    measured_on = list(groups or probes.groups())
    say("reading tokens")
    pairs = [text for group in measured_on for text in group.texts]
    tokens = scorer.pairs.encode(pairs)
    rows = _spread(len(pairs), SAMPLE)
    chosen = [pairs[row] for row in rows]
    labels, loss = _labels(measured_on, rows, scorer.num_labels)
    say("measuring modules")
    modules, logits_PL, mean = measure(scorer, chosen, labels, loss)
    gradients = _gradients(scorer)
    scale = _loss_scale(modules, scorer)
    say("looking at attention and updates")
    attention = saturation(scorer, chosen)
    weights = {n: (p.detach(), p.grad) for n, p in scorer.model.named_parameters() if p.grad is not None and p.ndim > 1}
    updates = arithmetic.moved(weights, plan.lr)
    data = texts.describe(groups, tokens, held_out or ()) if groups else {}
    checks = [
        *_folder_checks(scorer, bool(groups)),
        *_range_checks(scorer, modules, chosen),
        *_gradient_checks(scorer, modules, scale, gradients),
        *_saturation_checks(attention, logits_PL, scorer),
        *_update_checks(scorer, updates, gradients, plan),
        *_speed_checks(scorer, chosen, detect(scorer.device)),
    ]
    if data:
        checks += texts.checks(data, num_labels=scorer.num_labels, max_length=scorer.max_length, grouped=plan.grouped)
    if plan.memory is not None and plan.memory.get("fits") is False:
        advice = "Shorten pairs (--max-length), train adapters, or use a larger machine; see halfrank plan."
        checks.append(Check("memory", "fix", "No way of training fits into what is free.", advice))
    scorer.model.zero_grad(set_to_none=True)
    return Examination(
        name,
        _facts(scorer, len(rows), "the data" if groups else "built-in texts") | {"loss": mean},
        tuple(_row(module, scale) for module in modules.values()),
        attention,
        scale,
        updates,
        data,
        dict(plan.memory or {}),
        tuple(checks),
    )


def _spread(count: int, most: int) -> list[int]:
    """At most `most` rows, evenly over all."""
    return sorted({int(index * count / min(most, count)) for index in range(min(most, count))})


def _labels(groups: Sequence[Group], rows: list[int], num_labels: int) -> tuple[Tensor, Any]:
    """Labels of the rows for a pairwise loss, 0 where there is none, and that loss."""
    grades = torch.tensor([grade or 0.0 for group in groups for grade in group.grades])
    if num_labels > 1:
        return grades[rows].round().clamp(0, num_labels - 1), LOSSES["cross-entropy"].function
    low, high = float(grades.min()), float(grades.max())
    return (grades[rows] - low) / max(high - low, 1e-9), LOSSES["bce"].function


def _facts(scorer: Scorer, pairs: int, source: str) -> dict[str, Any]:
    children = dict(scorer.model.named_children())
    head = [name for name in sorted(head_modules(scorer.model)) if next(children[name].parameters(), None) is not None]
    tokenizer = scorer.tokenizer
    example = scorer.pairs.encode([("query", "document")])
    how = "packed: end to end in one row" if scorer.packed else "padded" if scorer.pads else "batched by equal length"
    return {
        "family": scorer.config.model_type,
        "class": type(scorer.model).__name__,
        "head": f"{', '.join(head)} ({scorer.num_labels} label(s))",
        "head_is_new": scorer.untrained_head,
        "parameters": scorer.model.num_parameters(),
        "stored": dtype_name(scorer.precision.storage),
        "islands": list(scorer.islands),
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens",
        "pad_token": f"{tokenizer.pad_token!r} ({tokenizer.pad_token_id})",
        "template": " ".join(tokenizer.convert_ids_to_tokens(example.input_ids.tolist())),
        "max_length": scorer.max_length,
        "batches": how,
        "precision": str(scorer.precision),
        "notes": list(scorer.notes),
        "measured_on": f"{pairs} pairs of {source}",
    }


def _row(module: Module, scale: Mapping[str, float]) -> ModuleRow:
    has_gradient = module.gradient.total > 0
    return ModuleRow(
        module.name,
        module.role,
        module.layer,
        module.kind,
        module.largest,
        module.headroom(torch.float16),
        module.headroom(torch.bfloat16),
        module.written.underflow(torch.float16),
        module.gradient.largest if has_gradient else None,
        module.gradient.underflow(torch.float16) if has_gradient else None,
        module.gradient.underflow(torch.float16, scale["recommended"]) if has_gradient else None,
    )


def _gradients(scorer: Scorer) -> list[Tensor]:
    return [p.grad for p in scorer.model.parameters() if p.grad is not None]


def _loss_scale(modules: Mapping[str, Module], scorer: Scorer) -> dict[str, float]:
    """The largest power of two that leaves every gradient of the body room, and what is lost with and without."""
    body = [m for name, m in modules.items() if m.gradient.total and not within(name, head_modules(scorer.model))]
    largest = max((m.gradient.largest for m in body), default=0.0)
    fits = math.inf if largest == 0 else math.log2(torch.finfo(torch.float16).max / largest) - RESERVE_BITS
    recommended = 2.0 ** max(min(math.floor(min(fits, 99)), math.log2(LARGEST_SCALE)), -14)
    total = max(sum(m.gradient.total for m in body), 1)

    def lost(scale: float) -> float:
        return sum(m.gradient.underflow(torch.float16, scale) * m.gradient.total for m in body) / total

    return {
        "recommended": recommended,
        "largest_gradient": largest,
        "lost_without": lost(1.0),
        "lost_with": lost(recommended),
        "overflows_above": torch.finfo(torch.float16).max / largest if largest else math.inf,
    }


def _folder_checks(scorer: Scorer, has_data: bool) -> Iterator[Check]:
    if scorer.untrained_head:
        yield Check(
            "head",
            "note" if has_data else "warn",
            "The score head was just initialised: its scores mean nothing before training.",
            "" if has_data else "Train it, or load a folder with a trained head.",
        )
    embedding = scorer.model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and len(scorer.tokenizer) > embedding.num_embeddings:
        yield Check(
            "tokenizer",
            "fix",
            f"The tokenizer has {len(scorer.tokenizer)} tokens, the embedding {embedding.num_embeddings}: some texts "
            "would read beyond the table.",
            "Copy the tokenizer that belongs to these weights, or resize the embeddings.",
        )
    for name, parameter in scorer.model.named_parameters():
        in_head = within(name, head_modules(scorer.model))  # a head of zeros is a start that learns
        if parameter.ndim > 1 and not in_head and not bool(parameter.detach().any()):
            yield Check("weights", "fix", f"'{name}' is all zeros.", "Load an undamaged copy.")
    largest = max(float(p.detach().abs().max()) for p in scorer.model.parameters())
    if largest > torch.finfo(torch.float16).max:
        level = "fix" if torch.float16 in (scorer.precision.storage, scorer.compute.narrow) else "note"
        yield Check("weights", level, f"A weight of {largest:g} is beyond float16.", "Use bfloat16 or float32.")
    yield Check("precision", "fine", str(scorer.precision))


def _range_checks(scorer: Scorer, modules: Mapping[str, Module], pairs: Sequence[tuple[str, str]]) -> Iterator[Check]:
    wide = {*head_modules(scorer.model), *scorer.islands}
    remedy = cache(partial(_widening, scorer, tuple(pairs[:ISLAND_PAIRS])))
    inside = {name: module for name, module in modules.items() if not within(name, wide)}
    for dtype in NARROW_DTYPES:
        asked = scorer.compute.narrow is dtype
        names = overflowing(inside, dtype)
        near = [name for name, module in inside.items() if 0 <= module.headroom(dtype) < NEAR_BITS]
        if names:
            yield Check(
                "overflow",
                "fix" if asked else "note",
                f"{len(names)} modules leave the range of {dtype_name(dtype)} ({_some(names)}): the worst by "
                f"{-min(inside[name].headroom(dtype) for name in names):.1f} bits.",
                remedy() if asked else f"Do not compute in {dtype_name(dtype)} without islands.",
            )
        elif near:
            yield Check(
                "headroom",
                "warn" if asked else "note",
                f"{len(near)} modules have less than {NEAR_BITS:g} bit of {dtype_name(dtype)} left ({_some(near)}): "
                "other texts may overflow them.",
                f"Keep them in float32: scorer.widen, or keep_in_fp32_modules={near[:3]}.",
            )
        else:
            least = min(inside.values(), key=lambda module: module.headroom(dtype), default=None)
            if least is not None:
                yield Check(
                    "overflow",
                    "fine",
                    f"{dtype_name(dtype)} has {least.headroom(dtype):.1f} bits left at the tightest module, "
                    f"'{least.name}'.",
                )
    if scorer.compute.narrow is not None:
        yield from _narrow_scores(scorer, pairs, remedy)


def _speed_checks(scorer: Scorer, pairs: Sequence[tuple[str, str]], hardware: Hardware) -> Iterator[Check]:
    """What a processor that multiplies bfloat16 would gain, where the weights do not ask for it, and what it costs."""
    if scorer.compute.name != "float32" or hardware.device != "cpu" or not hardware.bfloat16_products:
        return
    activated = activation_named(scorer.activation)
    found = []
    for compute in ("float32", "bfloat16"):
        with scorer.computing_in(compute):
            found.append(activated(torch.from_numpy(raw_logits(scorer, pairs))).float())
    error = float((found[0] - found[1]).abs().max())
    if not math.isfinite(error):
        return  # the checks of ranges say which modules are the reason
    yield Check(
        "speed",
        "note",
        f"This {hardware.why} multiplies bfloat16 faster than float32; scores of these pairs then differ by at most "
        f"{error:.2g}.",
        "To rank so: halfrank export MODEL --dtype bfloat16 --out FOLDER, certified; it then computes in bfloat16.",
    )


def overflowing(modules: Mapping[str, Module], dtype: torch.dtype) -> list[str]:
    """Modules that read or write what `dtype` cannot hold."""
    return [name for name, module in modules.items() if module.headroom(dtype) < 0]


def _narrow_scores(scorer: Scorer, pairs: Sequence[tuple[str, str]], remedy: Callable[[], str]) -> Iterator[Check]:
    logits_PL = torch.from_numpy(raw_logits(scorer, pairs))
    bad = int((~logits_PL.isfinite().all(dim=1)).sum())
    if bad:
        yield Check(
            "scores",
            "fix",
            f"{bad} of {len(pairs)} pairs have no finite score in {scorer.compute.name}.",
            remedy(),
        )


def _widening(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> str:
    found = find_islands(scorer, lambda: torch.from_numpy(raw_logits(scorer, pairs)))
    if not found.islands:
        return "Compute in bfloat16 or float32."
    works = "then every score is finite" if found.finite else "which is not enough alone: compute in bfloat16"
    return f"Keep {len(found.islands)} modules in float32 ({_some(found.islands)}), {works}."


def _gradient_checks(
    scorer: Scorer, modules: Mapping[str, Module], scale: Mapping[str, float], gradients: Sequence[Tensor]
) -> Iterator[Check]:
    narrow = torch.float16 in (scorer.precision.storage, scorer.compute.narrow)
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        yield Check(
            "gradients", "fix", "Gradients are not finite even in float32.", "Look for damaged weights or labels."
        )
        return
    if scale["largest_gradient"] == 0:
        alone = any(bool(gradient.any()) for gradient in gradients)  # a head of zeros learns, and then lets pass
        yield Check(
            "gradients",
            "note" if alone else "fix",
            "No gradient reaches the body" + (": at first only the head learns." if alone else ", nor the head."),
            "" if alone else "Look for a layer of zeros.",
        )
        return
    if narrow:
        skipped = math.ceil(math.log2(FIRST_SCALE / scale["overflows_above"])) if scale["overflows_above"] else 0
        yield Check(
            "loss scale",
            "warn" if skipped > 0 else "fine",
            f"Gradients up to {scale['largest_gradient']:.2g}: a loss scale of {scale['recommended']:g} leaves "
            f"{RESERVE_BITS:g} bits and loses {scale['lost_with']:.1%} of the gradients to underflow; without one "
            f"{scale['lost_without']:.1%} would be lost.",
            f"The run begins at {FIRST_SCALE:g} and skips about {skipped} steps until it fits." if skipped > 0 else "",
        )
    silent = [
        name for name, m in modules.items() if m.gradient.total == 0 and m.kind in ("Linear", "Embedding", "LayerNorm")
    ]
    if silent:
        yield Check("gradients", "note", f"{len(silent)} modules receive no gradient at all ({_some(silent)}).")


def _saturation_checks(attention: Sequence[Mapping[str, Any]], logits_PL: Tensor, scorer: Scorer) -> Iterator[Check]:
    sure = [layer for layer in attention if layer["saturated"] > SATURATED]
    if sure:
        worst = max(sure, key=lambda layer: layer["saturated"])
        yield Check(
            "attention",
            "warn",
            f"In {len(sure)} layers most queries attend to one token only (layer {worst['layer']}: "
            f"{worst['saturated']:.0%}): their query and key weights hardly learn.",
            "Look at the scale of their query and key weights.",
        )
    if scorer.num_labels == 1:
        share = float((logits_PL.abs() > SURE_SCORE).float().mean())
        if share > 0.1:
            yield Check(
                "sigmoid",
                "warn",
                f"{share:.0%} of the logits lie beyond {SURE_SCORE:g}, where the sigmoid has no gradient left.",
                "Lower the head's weights, or train with a ranking loss.",
            )


def _update_checks(
    scorer: Scorer, updates: Mapping[str, Mapping[str, float]], gradients: Sequence[Tensor], plan: Plan
) -> Iterator[Check]:
    storage = scorer.precision.storage
    for dtype in NARROW_DTYPES:
        plain, ours = updates[f"plain {dtype_name(dtype)}"], updates[f"halfrank {dtype_name(dtype)}"]
        lost = arithmetic.lost_constants(dtype)
        gone = arithmetic.lost_second_moments(gradients, dtype)
        stored = storage is dtype
        told = [f"moves {plain['moved']:.0%} of the weights"]
        told += [f"makes {plain['non_finite']:.0%} of them non-finite"] if plain["non_finite"] else []
        told += [f"its {', '.join(lost)}"] if lost else []
        told += [f"its second moment is 0 for {gone:.0%} of the gradients"] if gone > 0.01 else []
        yield Check(
            "updates",
            "note" if stored else "fine",
            f"One step at lr {plan.lr:g} on {dtype_name(dtype)} weights: a plain AdamW {', '.join(told)}; halfrank's "
            f"moves {ours['moved']:.0%} and makes {ours['non_finite']:.0%} non-finite.",
        )
        if stored and ours["moved"] < 0.5:
            yield Check(
                "learning rate",
                "warn",
                f"At lr {plan.lr:g} only {ours['moved']:.0%} of the {dtype_name(dtype)} weights move.",
                "Raise it.",
            )
    sizes = [float(p.detach().float().square().mean().sqrt()) for p in scorer.model.parameters() if p.ndim > 1]
    step = plan.lr / max(sorted(sizes)[len(sizes) // 2], 1e-12)
    if step > BIG_STEP:
        yield Check(
            "learning rate",
            "fix",
            f"A step of {plan.lr:g} is {step:.0%} of a usual weight's size: the model is overwritten in a few steps.",
            "Use 1e-5 to 1e-4 for a pretrained model.",
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"'{name}'" for name in names[:4]) + more
