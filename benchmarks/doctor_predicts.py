"""Does what the doctor warns of happen, and does what it passes not? Settings of models, rates, formats and data.

Each setting is examined, then trained for 50 steps. The set of troubles that the doctor names must equal the set that
the run shows: overflow (modules had to be widened, or scores are not finite), loss scale (steps were skipped for it),
learning rate (the body is overwritten, or the loss ends above where it began), lost updates and non-finite weights (of
a plain AdamW on 16-bit weights), labels (the loss refuses them, or nothing is told apart), contradictions (the loss
stays at chance), leakage (held-out pairs with random labels are known by heart), refused (the folder cannot be used).
What cannot be seen in so few steps (a new head, little headroom, saturation, repetitions) is not counted.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from common import ROOT, arguments, finish
from halfrank.data.pairs import Group, Pair, by_query
from halfrank.doctor.checks import Plan, examine
from halfrank.errors import DataError, ModelError, TrainingError
from halfrank.evaluate import evaluate_pairs
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.precision import Facts, choose, detect
from halfrank.predict import predict, raw_logits
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, epoch_plan, from_groups, from_pairs, micro_batches
from halfrank.train.loop import train

sys.path.insert(0, str(ROOT / "tests"))
from tiny import SENTENCES, make_folder

STEPS, LEAST = 50, 22
TOPICS = {"scores": "overflow", "tokenizer": "refused"}  # topics of the doctor that are named otherwise here
LOST = 0.5  # share of weights


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and how; `change` damages the folder."""

    name: str
    family: str = "bert"
    change: Callable[[Path], None] = lambda path: None
    data: str = "easy"
    lr: float = 3e-4
    scheme: str = "float32"
    compute: str = "float32"
    plain: bool = False  # with torch's AdamW on 16-bit weights
    loss: str | None = None


def scaled(factors: dict[str, float]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        for name, factor in factors.items():
            tensors[name] = tensors[name] * factor
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def fewer_embeddings(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:-60].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": len(tensors[name])}))


def huge(layer: str) -> Callable[[Path], None]:
    return scaled({layer + "intermediate.dense.weight": 3e3, layer + "output.dense.weight": 3e3})


BERT, ROBERTA = "bert.encoder.layer.0.", "roberta.encoder.layer.0."
DOWN = "model.layers.0.mlp.down_proj.weight"
NARROW, HEAD = "emulated-float16", "classifier.weight"
SETTINGS = [
    Setting("bert in float16", compute=NARROW),
    Setting("bert, huge feed-forward, in float16", change=huge(BERT), compute=NARROW),
    Setting("the same in bfloat16", change=huge(BERT), compute="emulated-bfloat16"),
    Setting("the same in float32", change=huge(BERT)),
    Setting("llama in float16", family="llama", compute=NARROW),
    Setting("llama, huge down projection, in float16", family="llama", change=scaled({DOWN: 1e6}), compute=NARROW),
    Setting("xlm-roberta, huge, in float16", family="xlm-roberta", change=huge(ROBERTA), compute=NARROW),
    Setting("bert, large feed-forward, in float16", change=scaled({BERT + "output.dense.weight": 2e3}), compute=NARROW),
    Setting("mpnet in float16", family="mpnet", compute=NARROW),
    Setting("deberta in bfloat16", family="deberta-v2", scheme="bfloat16", compute="emulated-bfloat16"),
    Setting("large head in float16", change=scaled({HEAD: 3e3}), scheme="float16", compute=NARROW, lr=1e-5),
    Setting("tiny head in float16", change=scaled({HEAD: 1e-4}), scheme="float16", compute=NARROW),
    Setting("a learning rate of 0.5", lr=0.5),
    Setting("llama, a learning rate of 0.5", family="llama", lr=0.5),
    Setting("a learning rate of 1e-3 on float16", lr=1e-3, scheme="float16"),
    Setting("roberta, a learning rate of 1e-4 on bfloat16", family="roberta", lr=1e-4, scheme="bfloat16"),
    Setting("plain AdamW on float16", scheme="float16", plain=True, lr=2e-5),
    Setting("plain AdamW on bfloat16", scheme="bfloat16", plain=True, lr=2e-5),
    Setting("plain AdamW on bfloat16 at 3e-3", scheme="bfloat16", plain=True, lr=3e-3),
    Setting("our AdamW on bfloat16 at 2e-5", scheme="bfloat16", lr=2e-5),
    Setting("every label 1", data="one label", lr=3e-3),
    Setting("labels from 0 to 5", data="stars"),
    Setting("every pair with both labels", data="quarrel", lr=3e-3),
    Setting("held-out pairs in the training data", data="leaking", lr=3e-3),
    Setting("held-out pairs apart", data="apart", lr=3e-3),
    Setting("groups of one grade", data="one grade", loss="softmax", lr=3e-3),
    Setting("groups", data="groups", loss="softmax", lr=3e-3),
    Setting("a head of zeros", change=scaled({HEAD: 0.0})),
    Setting("embeddings cut", change=fewer_embeddings),
]  # fmt: skip


def material(kind: str, seed: int) -> tuple[list[Group], list[Group], bool]:
    """Training groups, held-out groups, and whether they are trained as groups."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in SENTENCES for b in SENTENCES if a != b]
    draw.shuffle(pairs)
    easy = [Pair(a, b, float(len(a) > 30)) for a, b in pairs]
    noise = [Pair(a, b, float(draw.random() < 0.5)) for a, b in pairs]
    if kind == "one label":
        return by_query([Pair(a, b, 1.0) for a, b in pairs]), [], False
    if kind == "stars":
        return by_query([Pair(a, b, float(draw.randrange(6))) for a, b in pairs]), [], False
    if kind == "quarrel":
        return by_query([Pair(a, b, label) for a, b in pairs for label in (0.0, 1.0)]), [], False
    if kind == "leaking":
        return by_query(noise[:24]), by_query(noise[:24]), False
    if kind == "apart":
        known = [pair for pair in noise if pair.query in SENTENCES[:6]]
        return by_query(known[:24]), by_query([pair for pair in noise if pair.query not in SENTENCES[:6]]), False
    if kind in ("groups", "one grade"):
        grade = 1.0 if kind == "one grade" else 0.0
        return (
            [
                Group(a, tuple(b for b in SENTENCES if b != a), tuple(1.0 if n == 0 else grade for n in range(10)))
                for a in SENTENCES
            ],
            [],
            True,
        )
    return by_query(easy), [], False


def scorer_of(setting: Setting, place: Path) -> Scorer:
    make_folder(setting.family, place)
    setting.change(place)
    scorer = folder.load(place)
    facts = Facts(scorer.model.num_parameters(), torch.float32, detect("cpu"))
    scorer.adopt(choose(facts, scheme=setting.scheme, compute=setting.compute))
    return scorer


def predicted(setting: Setting, scorer: Scorer, groups: list[Group], held_out: list[Group], grouped: bool) -> set[str]:
    """The troubles that the doctor names at the grade of a warning or worse."""
    report = examine(scorer, groups, held_out, Plan(lr=setting.lr, grouped=grouped), name=setting.name)
    named = {TOPICS.get(check.topic, check.topic) for check in report.checks if check.level in ("fix", "warn")}
    if setting.plain:
        shares = report.updates[f"plain {setting.scheme}"]
        named |= {"non-finite weights"} if shares["non_finite"] > LOST else set()
        named |= {"lost updates"} if shares["moved"] < LOST and shares["non_finite"] <= LOST else set()
    return settled(named - {"head", "headroom", "repetitions", "sigmoid", "attention"})


def settled(troubles: set[str]) -> set[str]:
    """Where something overflows, or nothing can be loaded, what follows from it is not counted apart."""
    for first in ("refused", "overflow", "learning rate", "non-finite weights"):
        if first in troubles:
            return {first}
    return troubles


def examples_of(scorer: Scorer, groups: Sequence[Group], grouped: bool) -> Examples:
    if grouped:
        return from_groups(groups, scorer.pairs)
    pairs = [Pair(g.query, d, grade) for g in groups for d, grade in zip(g.documents, g.grades, strict=True)]
    return from_pairs(pairs, scorer.pairs)


def observed(
    setting: Setting, scorer: Scorer, groups: list[Group], held_out: list[Group], grouped: bool, place: Path
) -> set[str]:
    """The troubles that show in a run."""
    texts = [text for group in groups for text in group.texts]
    found: set[str] = set()
    try:
        if not np.isfinite(raw_logits(scorer, texts)).all():
            found.add("overflow")
        examples = examples_of(scorer, groups, grouped)
        spread = within_groups(raw_logits(scorer, texts), groups)
        before = {name: p.detach().clone() for name, p in scorer.model.named_parameters()}
        losses, events = (
            plain_run(setting, scorer, examples) if setting.plain else our_run(setting, scorer, examples, place)
        )
    except (IndexError, ModelError):
        return {"refused"}
    except TrainingError as error:
        return settled(found | {"labels" if "learn from" in str(error) else "learning rate"})
    except DataError:
        return {"labels"}
    rungs = [event for event in events if event.get("event") == "recovery"]
    found |= {"overflow"} if any(event["rung"] == "widen" for event in rungs) else set()
    found |= {"loss scale"} if any("loss_scale" in event for event in rungs) else set()
    ending = float(np.mean(losses[-10:]))
    if overwritten(scorer, before):
        found.add("learning rate")
    if not ending <= 1.2 * losses[0] + 0.1 or any(event["rung"] in ("rollback", "stop") for event in rungs):
        found.add("learning rate")
    if setting.plain:
        found |= lost_in(scorer, before)
        found -= {"learning rate"} if "non-finite weights" in found else set()
    if not grouped and setting.lr >= 1e-3 and setting.lr < 0.1 and not setting.plain:
        scores = predict(scorer, texts).values[:, 0]
        if float(scores.std()) < 0.05 and ending < 0.2:
            found.add("labels")  # everything scores alike, and the loss is content
        if ending > 0.66:
            found.add("contradictions")
    if grouped and within_groups(raw_logits(scorer, texts), groups) <= spread:
        found.add("labels")
    if held_out:
        pairs = [Pair(g.query, d, grade) for g in held_out for d, grade in zip(g.documents, g.grades, strict=True)]
        values = predict(scorer, [(pair.query, pair.document) for pair in pairs]).values
        if evaluate_pairs(pairs, values).values["average_precision"] > 0.9:
            found.add("leakage")
    return settled(found)


def our_run(
    setting: Setting, scorer: Scorer, examples: Examples, place: Path
) -> tuple[list[float], list[dict[str, object]]]:
    config = TrainConfig(
        loss=setting.loss, steps=STEPS, lr=setting.lr, batch_size=8, warmup=0, schedule="constant", clip=0.0
    )
    result = train(scorer, examples, config, out=place / "run")
    lines = (place / "run" / "train.jsonl").read_text().splitlines()
    return result.losses, [json.loads(line) for line in lines]


def plain_run(setting: Setting, scorer: Scorer, examples: Examples) -> tuple[list[float], list[dict[str, object]]]:
    """What torch's AdamW does to the same 16-bit weights: no loss scale, no residual."""
    optimizer = torch.optim.AdamW(
        scorer.model.parameters(), lr=setting.lr, weight_decay=0.0, foreach=False, fused=False
    )
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        for units in epoch_plan(examples, 8, seed=0, epoch=epoch):
            total = 0.0
            for part in micro_batches(examples, units, max_tokens=16384, per_unit=False):
                loss = LOSSES["bce"].function(scorer.logits(part.batch), part.labels_P, part.groups_P) * part.share
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        epoch += 1
    return losses[:STEPS], []


def within_groups(logits: np.ndarray, groups: Sequence[Group]) -> float:
    """Mean standard deviation of the logits within a group: what ranking rests on."""
    ends = np.cumsum([len(group.documents) for group in groups])[:-1]
    return float(np.mean([part.std() for part in np.split(logits[:, 0], ends)]))


def overwritten(scorer: Scorer, before: dict[str, torch.Tensor]) -> bool:
    """Whether the body's matrices no longer point where they pointed."""
    pairs = [
        (before[n].flatten().double(), p.detach().flatten().double())
        for n, p in scorer.model.named_parameters()
        if p.ndim > 1
    ]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0)) < 0.7


def lost_in(scorer: Scorer, before: dict[str, torch.Tensor]) -> set[str]:
    moved = finite = total = 0
    for name, parameter in scorer.model.named_parameters():
        if parameter.dtype is torch.float32 or "embedding" in name:
            continue  # of an embedding only the rows of tokens seen can move
        moved += int((parameter.detach() != before[name]).sum())
        finite += int(parameter.detach().isfinite().sum())
        total += parameter.numel()
    if finite < (1 - LOST) * total:
        return {"non-finite weights"}
    return {"lost updates"} if moved < LOST * total else set()


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("halfrank").setLevel(logging.CRITICAL)
    rows = {}
    for setting in SETTINGS:
        groups, held_out, grouped = material(setting.data, options.seed)
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            try:
                said = predicted(setting, scorer_of(setting, place / "a"), groups, held_out, grouped)
            except ModelError:
                said = {"refused"}
            try:
                scorer = scorer_of(setting, place / "b")
                shown = observed(setting, scorer, groups, held_out, grouped, place)
            except ModelError:
                shown = {"refused"}
        rows[setting.name] = {"predicted": sorted(said), "observed": sorted(shown), "right": said == shown}
        names = [", ".join(sorted(troubles)) or "-" for troubles in (said, shown)]
        verdict = "right" if said == shown else "WRONG"
        print(f"{verdict}  {setting.name:46s} predicted {names[0]:22s} observed {names[1]}", flush=True)
    right = sum(row["right"] for row in rows.values())
    troubled = sum(bool(row["observed"]) for row in rows.values())
    share = LEAST / 24
    bars = {
        f"{len(rows)} settings, at least 24, {troubled} of them with trouble": len(rows) >= 24 and troubled >= 8,
        f"at least {LEAST} of 24 predicted right": right >= share * len(rows),
    }
    finish(
        "doctor_predicts", options.quick, {"settings": rows}, bars, f"{right} of {len(rows)} settings predicted right"
    )


if __name__ == "__main__":
    main()
