"""Faults of every cause, put into five tiny families: is each run mended or stopped, and is cause and module named?

Place, magnitude and step of each fault are drawn from --seed; --cases FILE takes a JSON list of cases (see
`faults.py`) instead. Healthy runs of the same kinds must have no finding. Side by side: whether
`torch.autograd.detect_anomaly` and transformers' `DebugUnderflowOverflow` notice the same faults in the same model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import math
import multiprocessing
import random
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import finish
from faults import (
    BCE,
    FAMILIES,
    FAULTS,
    PAIRS,
    SCHEMES,
    Case,
    body_products,
    chosen,
    plain_model,
    put_in,
    scorer_of,
)
from halfrank import diagnose
from halfrank.data.packing import pack
from halfrank.data.pairs import Pair
from halfrank.diagnosis import Cause, Finding, explain_step, explain_weights
from halfrank.diagnosis.subject import Labelled
from halfrank.errors import CertificateError, HalfrankError, NonFiniteScoreError, NonFiniteWeightError, TrainingError
from halfrank.model import folder
from halfrank.model.pieces import TensorFile
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from halfrank.train.config import Limits, TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train

STEPS = 7
LABELLED = [Pair(q, d, float(i % 2), f"pairs.jsonl:{i + 1}") for i, (q, d) in enumerate(PAIRS)]


@dataclass
class Answer:
    """What became of a case."""

    cause: str | None = None
    module: str | None = None
    wanted_module: str | None = None  # None: no module is to blame
    ended: str = ""  # healthy, recovered, stopped, found
    weights: int = 0  # stored weights that are not finite
    scores: int = 0  # returned scores that are not finite
    text: str = ""


def run(case: Case) -> Answer:
    """Run one case to its end."""
    kind = FAULTS[case.fault].kind if case.fault in FAULTS else "train"
    return {"train": trained, "plain": plain, "prediction": looked_into, "load": loaded, "resume": resumed}[kind](case)


def trained(case: Case) -> Answer:
    """A training run of a few steps in which the fault happens."""
    scorer = scorer_of(case)
    examples = from_pairs(LABELLED, scorer.pairs)
    answer = Answer()
    state: dict[str, Any] = {"loss": BCE}

    def rate(step: int, total: int) -> float:
        if step == case.step and "in" not in state and case.fault != "none":
            state["in"] = True
            fault = put_in(case, scorer)
            answer.wanted_module, state["loss"] = fault.module, fault.loss
            for row, label in fault.labels.items():
                examples.labels[row] = label
        return 1.0

    def loss(scores_PL: Tensor, labels_P: Tensor, groups_P: Tensor) -> Tensor:
        return state["loss"](scores_PL[:, 0], labels_P)

    config = TrainConfig(steps=STEPS, batch_size=12, lr=1e-4, warmup=0, limits=Limits(good_every=2, quarantined=0.5))
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "run"
        try:
            train(scorer, examples, config, loss=loss, out=out, lr_factor=rate)
            answer.ended = "recovered"
        except (TrainingError, NonFiniteWeightError, CertificateError) as error:
            answer.ended, answer.text = "stopped", str(error)
        events = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        told = [event for event in events if event.get("event") == "recovery" and event["step"] > case.step]
        # The loss scale starts high and finds its place by itself: that is no finding.
        told = [event for event in told if case.fault != "none" or event["rung"] != "skip" or "finding" in event]
        found = next((event["finding"] for event in told if "finding" in event), None)
        if found is not None:
            answer.cause, answer.module = found["cause"], found["module"]
        elif told and told[0]["rung"] == "skip" and "loss_scale" in told[0]:
            answer.cause = Cause.GRADIENT_OVERFLOW_SCALE.value
        elif told:
            answer.text += " | " + json.dumps(told[0])
        if not told and answer.ended == "recovered" and not any(e.get("event") == "finding" for e in events):
            answer.ended = "healthy"
        for stored in (*out.glob("*.safetensors"), *out.glob("checkpoint/*.safetensors")):
            tensors = load_file(stored)
            answer.weights += sum(
                int((~t.isfinite()).sum())
                for name, t in tensors.items()
                if t.is_floating_point() and "optimizer" not in name
            )
    answer.scores = broken_scores(scorer)
    return answer


def looked_into(case: Case) -> Answer:
    """One step of a scorer, given to the diagnosis as the training loop does."""
    scorer = scorer_of(case)
    scorer.model.train()
    fault = put_in(case, scorer)
    batch = pack(scorer.pairs.encode(PAIRS[:12]), range(12))
    part = Labelled(
        batch, torch.tensor([float(row % 2) for row in batch.rows]), torch.zeros(12, dtype=torch.int64), 1.0
    )
    scale = 2.0 ** (26 + round(14 * case.magnitude)) if case.fault == "scale given" else 1.0
    finding = explain_step(scorer, [part], lambda s, y, g: fault.loss(s[:, 0], y), loss_scale=scale)
    return Answer(*named(finding), fault.module, "found", text=str(finding))


def loaded(case: Case) -> Answer:
    """A folder whose file holds NaN, infinity, or a number that float16 cannot hold."""
    with tempfile.TemporaryDirectory() as work:
        scorer = scorer_of(case)
        name = chosen([f"{n}.weight" for n in body_products(scorer.model)], case.place)
        folder.save(scorer, Path(work) / "model", dtype=torch.float32)
        file = Path(work) / "model" / "model.safetensors"
        tensors = load_file(file)
        large = 6.6e4 * 10 ** (4 * case.magnitude)
        bad = (
            (large if case.way == 0 else -large)
            if case.fault == "file too large"
            else (math.nan if case.way == 0 else math.inf)
        )
        tensors[name].view(-1)[int(case.magnitude * (tensors[name].numel() - 1))] = bad
        save_file(tensors, file, metadata={"format": "pt"})
        answer = Answer(wanted_module=name.removesuffix(".weight"), ended="found")
        try:
            again = folder.load(file.parent, folder.LoadOptions(dtype=SCHEMES[case.scheme], compute=case.compute))
            answer.scores, answer.weights = broken_scores(again), 1
        except NonFiniteWeightError as error:
            finding = explain_weights(error)
            answer.cause, answer.module, answer.ended, answer.text = *named(finding), "stopped", str(error)
    return answer


def resumed(case: Case) -> Answer:
    """A run whose checkpoint was damaged before it is resumed."""
    scorer = scorer_of(case)
    config = TrainConfig(steps=4, batch_size=12, lr=1e-4, checkpoint_every=2)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "run"
        train(scorer, from_pairs(LABELLED, scorer.pairs), config, out=out)
        file = out / "checkpoint" / "state.safetensors"
        tensors = load_file(file)
        wide = [
            key for key, t in tensors.items() if key.startswith("optimizer.") and t.dtype is torch.float32 and t.ndim
        ]
        key = chosen([k for k in wide if k.endswith((".v", ".v_scale"))], case.place)
        tensors[key].view(-1)[0] = math.nan if case.way == 0 else -1.0
        save_file(tensors, file)
        # Damage that was written as such: other bytes than the checksum's are refused before anyone looks at them.
        state = json.loads(file.with_name("state.json").read_text())
        file.with_name("state.json").write_text(json.dumps(state | {"checksum": TensorFile(file).checksum()}))
        answer = Answer(ended="recovered")
        again = scorer_of(case)
        try:
            train(again, from_pairs(LABELLED, again.pairs), config, out=out, resume=True)
        except TrainingError as error:
            answer.ended, answer.text = "stopped", str(error)
            answer.cause, answer.module = named(error.finding if isinstance(error.finding, Finding) else None)
            answer.wanted_module = answer.module  # the file numbers tensors; their names are the optimizer's
        answer.scores = broken_scores(again)
    return answer


def plain(case: Case) -> Answer:
    """A step or a prediction of transformers' own model with torch's own optimizer."""
    model, batch = plain_model(case)
    return PLAIN[case.fault](case, model, batch)


def _masked_row(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    model.set_attn_implementation("eager")
    row = int(case.place * 7.99)
    batch["attention_mask"][row] = 0
    lowest = -1e9 if case.way == 0 else -math.inf
    length = batch["input_ids"].shape[1]

    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Any:
            hidden = attention_mask[:, None, None, :] == 0
            if case.family != "bert":
                hidden = hidden.expand(-1, 1, length, length)
            mask = torch.zeros(hidden.shape).masked_fill(hidden, lowest).to(model.dtype)
            return self.inner(attention_mask=mask, **inputs)

    finding = diagnose(Masking(), batch, BCE)
    attention = "bert.encoder.layer.0.attention.self" if case.family == "bert" else "model.layers.0.self_attn"
    answer = Answer(*named(finding), f"inner.{attention}", "found", text=str(finding))
    if finding is None or finding.pair is None or finding.pair.row != row:
        answer.module = f"pair {None if finding is None else finding.pair} instead of {row}"
    return answer


def _plain_adamw(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    kinds: list[Callable[..., torch.optim.Optimizer]] = [
        torch.optim.AdamW,
        functools.partial(torch.optim.AdamW, fused=True),
        functools.partial(torch.optim.AdamW, foreach=True),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
    ]
    optimizer = kinds[case.way](model.parameters(), lr=1e-5 * 10**case.magnitude)
    return _answered(diagnose(model, batch, BCE, optimizer))


def _input(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    row = int(case.place * 7.99)
    if case.way == 2:
        batch["input_ids"][row, 1] = model.get_input_embeddings().num_embeddings + int(case.magnitude * 1e5)
    else:
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        embeds[row, 1, int(case.magnitude * 31)] = [math.nan, math.inf][case.way]
        batch["inputs_embeds"] = embeds
    finding = diagnose(model, batch, BCE)
    answer = _answered(finding)
    if finding is None or finding.pair is None or finding.pair.row != row:
        answer.cause = f"pair {None if finding is None else finding.pair} instead of {row}"
    return answer


def _lost_updates(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    kind = [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam][case.way]
    return _answered(diagnose(model, batch, BCE, kind(model.parameters(), lr=10 ** (-6 + case.magnitude))))


def _one_rate(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    name = chosen(body_products(model), case.place)
    weight = model.get_submodule(name).weight
    others = [p for p in model.parameters() if p is not weight]
    groups = [{"params": others, "lr": 2e-5}, {"params": [weight], "lr": 2.0 + 8 * case.magnitude}]
    return _answered(diagnose(model, batch, BCE, torch.optim.AdamW(groups)), name)


def _rate(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    return _answered(diagnose(model, batch, BCE, torch.optim.AdamW(model.parameters(), lr=2.0 + 8 * case.magnitude)))


def _pad(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    model.config.pad_token_id = 5 + int(case.place * 200)
    if case.way == 1:
        batch.pop("labels")
        return _answered(diagnose(model, batch))
    return _answered(diagnose(model, batch, BCE))


def _fresh_head(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    from halfrank.model.families import head_modules

    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.split(".")[0] in head_modules(model)]
    generator = torch.Generator().manual_seed(int(case.magnitude * 1e6))
    with torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * model.config.initializer_range)
            if module.bias is not None:
                module.bias.zero_()
    batch.pop("labels")
    finding = diagnose(model, batch)
    answer = _answered(finding, names[-1])
    if answer.module in names:
        answer.module = names[-1]
    return answer


def _ties(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    batch.pop("labels")
    shift = 12.0 + 6 * case.magnitude if case.way == 0 else -30.0 - 20 * case.magnitude
    return _answered(diagnose(model, batch, activation=lambda scores: torch.sigmoid(scores * 0.01 + shift)))


def _state(case: Case, model: Any, batch: dict[str, Tensor]) -> Answer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    BCE(model(**inputs).logits[:, 0], batch["labels"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    names = [name for name in body_products(model) if model.get_submodule(name).weight in optimizer.state]
    name = chosen(names, case.place)
    state = optimizer.state[model.get_submodule(name).weight]
    key = "exp_avg" if case.way in (0, 3) else "exp_avg_sq"
    state[key].view(-1)[int(case.magnitude * 31)] = [math.nan, math.inf, -1e-6, 1e3][case.way]
    return _answered(diagnose(model, batch, BCE, optimizer), name)


PLAIN: dict[str, Callable[[Case, Any, dict[str, Tensor]], Answer]] = {
    "masked row": _masked_row, "plain adamw": _plain_adamw, "lost updates": _lost_updates, "one rate": _one_rate,
    "rate": _rate, "input": _input, "pad": _pad, "fresh head": _fresh_head, "ties": _ties, "state": _state,
}  # fmt: skip


def _answered(finding: Finding | None, wanted: str | None = None) -> Answer:
    return Answer(*named(finding), wanted, "found", text=str(finding))


def named(finding: Finding | None) -> tuple[str | None, str | None]:
    return (None, None) if finding is None else (finding.cause.value, finding.module)


def broken_scores(scorer: Scorer) -> int:
    """How many scores come back that are not finite; a refusal by name returns none."""
    scorer.model.eval()
    try:
        return int((~torch.from_numpy(predict(scorer, PAIRS).values).isfinite()).sum())
    except NonFiniteScoreError:
        return 0


def peers_notice(case: Case) -> dict[str, bool]:
    """Whether the two tools that people use notice the fault in one plain pass of the same model."""
    noticed = {}
    for tool in ("detect_anomaly", "DebugUnderflowOverflow"):
        scorer = scorer_of(case)
        fault = put_in(case, scorer)
        batch = pack(scorer.pairs.encode(PAIRS), range(len(PAIRS)))
        labels = torch.tensor([fault.labels.get(row, float(row % 2)) for row in batch.rows])
        noticed[tool] = False
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            anomaly = (
                torch.autograd.detect_anomaly(check_nan=True) if tool == "detect_anomaly" else contextlib.nullcontext()
            )
            if tool == "DebugUnderflowOverflow":
                from transformers.debug_utils import DebugUnderflowOverflow

                DebugUnderflowOverflow(scorer.model)
            try:
                with anomaly:
                    (fault.loss(scorer.logits(batch)[:, 0], labels) * 2.0**16).backward()
            except (RuntimeError, ValueError):
                noticed[tool] = True
    return noticed


def drawn(seed: int, quick: bool) -> list[Case]:
    """Cases of every fault; families, schemes and formats are drawn too, so that all meet over the seeds."""
    draw = random.Random(seed)
    cases = []
    for name, fault in FAULTS.items():
        rounds = max(fault.ways, 3) if quick else max(2 * fault.ways, 7)
        families = [draw.sample(fault.families, len(fault.families)) for _ in range(rounds)]
        for number in range(rounds):
            scheme = draw.choice(fault.schemes)
            compute = scheme if fault.kind == "plain" else draw.choice(fault.computes)
            if name == "product" and scheme == "float16" and not compute.endswith("-float16") and compute != "float16":
                scheme = "float32"  # no float16 weight is large enough for a product beyond float32's range
            family = families[0][number % len(fault.families)]
            place, size = draw.random(), draw.random()
            cases.append(
                Case(name, number % fault.ways, family, scheme, compute, place, size, draw.randrange(STEPS - 4))
            )
    return cases


def healthy(quick: bool) -> list[Case]:
    """The same kinds of runs without a fault."""
    computes = ["float32", "emulated-float16", "emulated-bfloat16", "float16"]
    every = [Case("none", 0, f, s, c) for f in FAMILIES for s in SCHEMES for c in computes]
    return every[:: 9 if quick else 2]


def answers(cases: list[Case], seed: int) -> list[Answer]:
    """Every case to its end, on two processes of one thread each: tiny models gain nothing from more."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        return list(pool.map(_whole, cases, [seed + number for number in range(len(cases))]))


def _quiet() -> None:
    torch.set_num_threads(1)
    for name in ("halfrank", "transformers", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def _whole(case: Case, seed: int) -> Answer:
    torch.manual_seed(seed)
    try:
        return run(case)
    except (HalfrankError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return Answer(ended="crashed", text=traceback.format_exc())


def right_module(answer: Answer) -> bool:
    return (answer.module or "") == answer.wanted_module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about 75 cases, under 100 s on 2 cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=Path, help="a JSON list of cases instead of drawn ones")
    options = parser.parse_args()
    _quiet()
    cases = (
        [Case(**row) for row in json.loads(options.cases.read_text())]
        if options.cases
        else drawn(options.seed, options.quick)
    )
    rows, causes, modules = [], defaultdict(list), []
    peers: dict[str, list[bool]] = defaultdict(list)
    for case, answer in zip(cases, answers(cases, options.seed), strict=True):
        wanted = FAULTS[case.fault].cause.value
        causes[wanted].append(answer.cause == wanted)
        if answer.wanted_module is not None:
            modules.append(right_module(answer))
        if not options.quick and FAULTS[case.fault].kind in ("train", "prediction"):
            for tool, noticed in peers_notice(case).items():
                peers[tool].append(noticed)
        good = (
            answer.cause == wanted
            and (answer.wanted_module is None or right_module(answer))
            and answer.ended != "crashed"
        )
        rows.append({**case.as_json(), "wanted": wanted, **vars(answer), "text": "" if good else answer.text[-900:]})
        if not good or "-v" in sys.argv:
            got = f"got {answer.cause} in {answer.module!r}, {answer.ended}"
            print(f"{'ok  ' if good else 'BAD '} {case}\n     wanted {wanted} in {answer.wanted_module!r}; {got}")
            print(f"     {answer.text[-600:]}")
    calm = answers(healthy(options.quick), options.seed)
    unsafe = sum(row["weights"] + row["scores"] for row in rows)
    share = {cause: sum(found) / len(found) for cause, found in causes.items()}
    for cause, found in sorted(share.items()):
        print(f"{cause:52s} {found:5.0%} of {len(causes[cause])}")
    for tool, noticed in peers.items():
        print(f"{tool} notices {sum(noticed)} of {len(noticed)} (halfrank is asked for cause and module of the same)")
    right = sum(sum(found) for found in causes.values()) / len(cases)
    placed = sum(modules) / max(len(modules), 1)
    alarms = sum(answer.ended != "healthy" for answer in calm)
    bars = {
        f"{len(cases)} cases, all {len(Cause)} causes": bool(options.cases)
        or (len(cases) >= (60 if options.quick else 150) and len(causes) == len(Cause)),
        f"non-finite weights stored and scores returned: {unsafe}": unsafe == 0,
        f"every run recovers or stops: {sum(r['ended'] == 'crashed' for r in rows)} crashed": all(
            r["ended"] != "crashed" for r in rows
        ),
        f"right cause in {right:.1%}, at least 95 %": right >= 0.95,
        f"no cause below 80 % (lowest {min(share.values()):.0%})": min(share.values()) >= 0.8,
        f"right module in {placed:.1%} of {len(modules)}, at least 95 %": placed >= 0.95,
        f"no finding in {len(calm)} healthy runs: {alarms}": alarms == 0,
    }
    result = {
        "seed": options.seed,
        "rows": rows,
        "healthy": len(calm),
        "peers": {k: [sum(v), len(v)] for k, v in peers.items()},
    }
    finish(
        "fault_injection", options.quick, result, bars, f"{len(cases)} cases: cause {right:.1%}, module {placed:.1%}"
    )


if __name__ == "__main__":
    main()
