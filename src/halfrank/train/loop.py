"""The training loop: plan -> step -> journal -> evaluation -> checkpoint; two hops from here to the model."""

from __future__ import annotations

import itertools
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from halfrank import whole
from halfrank.allocator import bring_in
from halfrank.certify import saving
from halfrank.data.ahead import ahead
from halfrank.data.tokens import TokenRows
from halfrank.diagnosis import Finding, explain_state
from halfrank.errors import (
    CertificateError,
    DataError,
    HalfrankError,
    Interrupted,
    MemoryExhaustedError,
    NonFiniteWeightError,
    TrainingError,
)
from halfrank.losses import LOSSES, default_loss
from halfrank.model import folder
from halfrank.model.families import head_modules
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.scaling import LossScale
from halfrank.numerics.watch import Watch
from halfrank.train import rate
from halfrank.train.budget import TokenBudget
from halfrank.train.card import Sources, training_card
from halfrank.train.checkpoint import (
    CHECKPOINT,
    JOURNAL,
    LastGood,
    Progress,
    never_saved,
    put_back,
    read_checkpoint,
    read_weights,
    residuals_of,
    state_of,
    write_checkpoint,
    write_weights,
)
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, MicroBatch, epoch_plan, micro_batches
from halfrank.train.recovery import BACK, STOP, STORED, Account, Ladder, Outcome
from halfrank.train.report import QUARANTINE, Journal, Line, write_report
from halfrank.train.schedule import factor
from halfrank.train.step import LossFunction, StepResult, train_step

TOKENS = ".halfrank-tokens"  # of a run that is not finished


USUAL_GRADE = 4.0  # the highest of the usual scales of judgement


class _Prepared(NamedTuple):
    """One step's batch, where it stands (`position` batches of the epoch are done after it), what it was made of."""

    epoch: int
    position: int
    units: list[int]
    last: bool
    examples: Examples
    tokens: int
    present: list[int]  # units that still hold pairs
    parts: list[MicroBatch]


class Evaluation(NamedTuple):
    """What an evaluation found: the number that chooses the best model, and all numbers for the journal."""

    score: float
    metrics: dict[str, float]


Evaluator = Callable[[int, int], Evaluation]  # (epoch, step) -> Evaluation
BatchPlan = Callable[[int], Sequence[Sequence[int]]]  # epoch -> units of each batch


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    skipped: int
    losses: list[float]
    best_score: float | None
    best_step: int
    evaluations: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer
    recovery: Account
    finding: Finding | None = None  # what is wrong with a run that ended well: it did not learn


def train(
    scorer: Scorer,
    examples: Examples,
    config: TrainConfig,
    *,
    evaluate: Evaluator | None = None,
    out: Path | None = None,
    resume: bool = False,
    shown: bool = False,
    loss: LossFunction | None = None,
    plan: BatchPlan | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr_factor: Callable[[int, int], float] | None = None,
    keep_best: bool = True,
    seeded: bool = True,
    sources: Sources = Sources(),
    budget: TokenBudget | None = None,
    closing: Callable[[], Mapping[str, Any]] | None = None,
) -> TrainResult:
    """Train `scorer` in place; with `out` also write `train.jsonl`, checkpoints and the best model's folder.

    `loss` (scores, labels, groups) and `plan` (epoch -> batches of unit indices) default to what `config` says;
    `lr_factor` (step, total) replaces the schedule; `seeded=False` goes on with torch's random state; `sources` name
    the data in the model card; `budget` knows the limit of memory, and its tokens replace `config.max_tokens`;
    `closing` gives facts for the journal's last line.
    Raises Interrupted after Ctrl-C, once the state is saved, TrainingError where recovery comes to its limits, with the
    last good weights kept, and CertificateError when the finished 16-bit model scores too far from itself in float32,
    which is kept beside `out`.
    """
    if len(examples) == 0:
        raise TrainingError("There is nothing to train on: the data set is empty.")
    loss_name = config.loss or default_loss(scorer.num_labels, examples.grouped)
    if loss is None and loss_name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss_name!r}.")
    function, per_unit = (loss, False) if loss else (LOSSES[loss_name].function, LOSSES[loss_name].unit == "group")
    if per_unit and not examples.grouped:
        raise DataError(f"The {loss_name} loss compares the documents of a group; the data are single pairs.")
    size, buckets = config.batch_size, config.length_buckets
    plan = plan or (lambda epoch: epoch_plan(examples, size, seed=config.seed, epoch=epoch, buckets=buckets))
    optimizer = optimizer or make_optimizer(scorer, config)
    initial_rates = [group["lr"] for group in optimizer.param_groups]
    highest_rate, share = max(initial_rates), rate.share_of_weights(optimizer)
    rate.announce(scorer, highest_rate, share)
    total = config.steps or sum(_updates(len(plan(epoch)), config.accumulate) for epoch in range(config.epochs))
    settings = _settings(scorer, examples, config, loss_name if loss is None else "given") | {"model": sources.model}
    scale = LossScale(initial=config.loss_scale, enabled=scorer.precision.scales_loss)
    progress = Progress()
    if resume and out is not None and never_saved(out):
        scorer.note(f"The run in '{out}' was stopped before its first checkpoint: it starts again.")
        resume = False
    if resume:
        assert out is not None
        progress = put_back(read_checkpoint(out / CHECKPOINT, settings), scorer, optimizer)
        scale.load_state_dict(progress.loss_scale)
        _refuse_corrupt(out / CHECKPOINT, explain_state(scorer.model, optimizer))
    elif seeded:
        torch.manual_seed(config.seed)
    if out is not None:
        whole.make(out)
    journal = Journal(None if out is None else out / JOURNAL, kept=progress.lines)
    account = Account(**progress.recovery)
    quarantine = Journal(None if out is None else out / QUARANTINE, kept=len(account.quarantined))

    def tell(record: dict[str, Any]) -> None:
        pairs = record.get("pairs", [])
        for pair in pairs:  # a person looks for its place; a second number, counted otherwise, would mislead
            quarantine.write({key: value for key, value in pair.items() if key != "row"})
        journal.write(record | ({"pairs": [pair["place"] for pair in pairs]} if pairs else {}))

    if not resume:
        journal.write(
            {"event": "start", "step": 0, "precision": str(scorer.precision), "notes": scorer.notes, **settings}
        )
    ladder = Ladder(
        scorer, examples, config.limits, account, scale=scale, loss=function, per_unit=per_unit,
        max_tokens=config.max_tokens, tell=tell,
    )  # fmt: skip
    if not resume:
        ladder.screen()
    if loss is None:
        kept = ladder.examples
        rows = kept.units.rows()
        labels, where = kept.labels[rows], (lambda index: kept.place(int(rows[index])))
        try:
            LOSSES[loss_name].check_labels(labels, scorer.num_labels, where)
            _announce_gains(scorer, labels, loss_name, where)
            if per_unit:
                _announce_empty_groups(scorer, kept, loss_name)
        except HalfrankError:
            if not resume:  # nothing was trained, so nothing is left behind
                journal.drop()
                quarantine.drop()
            raise
    budget = budget or TokenBudget(config.max_tokens)
    budget.go_on(account.halvings, account.pass_tokens)
    watch = Watch(every=config.watch_every, narrow=_watched_format(scorer))
    last_good = LastGood(out)
    losses: list[float] = []

    def save(*, good: bool = False) -> None:
        """Write the checkpoint where there is a folder, and remember it as the last good state if it is one."""
        if out is None and not good:
            return
        if good:
            progress.good_step, account.returned, account.seconds_since_good = progress.step, False, 0.0
        progress.loss_scale, progress.recovery, progress.lines = scale.state_dict(), asdict(account), journal.lines
        state = state_of(scorer, optimizer, progress, settings)
        if out is not None:
            write_checkpoint(out / CHECKPOINT, state)
        if good:
            last_good.keep(state)

    def evaluated() -> bool:
        """Evaluate, keep the model if it is the best so far, and say whether the run may stop early."""
        if evaluate is None:
            return False
        result = evaluate(progress.epoch, progress.step)
        scorer.model.train()
        better = progress.best_score is None or result.score > progress.best_score
        progress.without_better = 0 if better else progress.without_better + 1
        if better:
            progress.best_score, progress.best_step = result.score, progress.step
            if out is not None and keep_best:
                write_weights(out / "best", scorer, residuals_of(scorer, optimizer))
        record = {"event": "evaluation", "step": progress.step, "score": result.score, **result.metrics}
        progress.evaluations.append(record)
        journal.write(record)
        return 0 < config.patience <= progress.without_better

    def go_back(*, slower: bool = True) -> Progress:
        """Put the last good state back; what was counted, found and left out since then stays so."""
        state = last_good.get(settings, earlier=account.returned)
        earlier = put_back(state, scorer, optimizer)
        scale.load_state_dict(earlier.loss_scale)
        ladder.went_back(Account(**earlier.recovery), progress.step - earlier.step, slower=slower)
        return replace(
            progress, step=earlier.step, epoch=earlier.epoch, position=earlier.position, skipped_in_a_row=0,
            without_better=earlier.without_better, good_step=earlier.step,
        )  # fmt: skip

    def step(chosen: Examples, units: list[int]) -> StepResult:
        return budget.run(scorer, lambda tokens: attempt(chosen, units, tokens), tell_halved)

    def tell_halved(record: dict[str, Any]) -> None:
        account.halvings, account.pass_tokens = account.halvings + 1, record["max_tokens"]
        tell({**record, "step": progress.step + 1})

    def prepared() -> Iterator[_Prepared]:
        """The run's batches in order, packed as examples and token budget are when their turn to be packed comes."""
        for epoch, position, units, last in _batches(plan, config, progress, total):
            chosen, tokens = ladder.examples, budget.tokens
            present = [unit for unit in units if len(chosen.units[unit])]
            parts = micro_batches(chosen, present, max_tokens=tokens, per_unit=per_unit) if present else []
            yield _Prepared(epoch, position, units, last, chosen, tokens, present, parts)

    def attempt(chosen: Examples, units: list[int], tokens: int) -> StepResult:
        assert ready is not None
        if chosen is ready.examples and (units, tokens) == (ready.present, ready.tokens):
            parts = ready.parts
        else:  # pairs were left out or the budget was halved since
            parts = micro_batches(chosen, units, max_tokens=tokens, per_unit=per_unit)
        budget.check(parts)
        return train_step(
            scorer, parts, function, optimizer, scale, clip=config.clip, watch=watch, refuses=ladder.refuses,
            release=config.release_gradients,
        )  # fmt: skip

    def last_batches() -> list[MicroBatch]:
        """What the last steps that were stored learned from."""
        chosen = ladder.examples
        units = [unit for unit in dict.fromkeys(itertools.chain(*account.sound)) if len(chosen.units[unit])]
        return micro_batches(chosen, units, max_tokens=budget.tokens, per_unit=per_unit) if units else []

    ready: _Prepared | None = None

    def advance(batches: Iterator[_Prepared], line: Line, interrupted: threading.Event) -> bool:
        """Go on from where `progress` stands; True when the run is over, False after a step back."""
        nonlocal progress, ready
        for ready in batches:
            epoch, position, units, last = ready.epoch, ready.position, ready.units, ready.last
            started = time.perf_counter()
            course = account.rate * _rate(config, lr_factor, progress.step, total)
            for group, initial in zip(optimizer.param_groups, initial_rates, strict=True):
                group["lr"] = initial * course
            outcome = ladder.run(units, step, number=progress.step + 1, in_a_row=progress.skipped_in_a_row)
            if outcome.verdict == STOP:
                raise _Stopped(outcome)
            if outcome.verdict == BACK:
                progress = go_back(slower=not outcome.out_of_memory)
                if outcome.out_of_memory:
                    budget.halve()
                    tell_halved({"event": "memory", "reason": outcome.reason, "max_tokens": budget.tokens})
                save()
                last_good.agree(progress)
                return False
            progress.step, progress.epoch, progress.position = progress.step + 1, epoch, position
            stored = outcome.verdict == STORED
            progress.skipped += not stored
            progress.skipped_in_a_row = 0 if stored else progress.skipped_in_a_row + 1
            if outcome.result is not None:
                losses.append(outcome.result.loss)
                record = _record(progress, outcome.result, optimizer, time.perf_counter() - started) | watch.next_step()
                journal.write(record)
                line.show(progress.step, record)
            due = config.eval_every and progress.step % config.eval_every == 0
            stop = evaluated() if due or (last and progress.best_step != progress.step) else False
            stop = stop or progress.step >= total
            good = _every(config.limits.good_every, progress.step) and ladder.sound
            if good or due or last or _every(config.checkpoint_every, progress.step):
                save(good=good)
            if interrupted.is_set():
                raise Interrupted
            if stop:
                break
        return True

    def ended_early(why: str) -> None:
        """Say what was recovered until here: a run that stops hides no more than one that ends."""
        write_last_line("stopped", progress, account, journal, {"reason": why})
        if account.happened:
            scorer.note(str(account))
        if out is not None:
            write_report(out)

    def left(why: str) -> str:
        """Save the model as it stands, end the journal, and say where the model is."""
        refused = None if out is None else _saved(scorer, out, progress.step, journal)
        ended_early(why)
        if out is None:
            return f"The weights of step {progress.step} are kept."
        wide = f", with {len(scorer.islands)} modules in float32," if scorer.islands else ""
        where = f"The model of step {progress.step}{wide} and the state of the run are saved in '{out}'."
        return where if refused is None else f"The state of step {progress.step} is saved in '{out}'. {refused}"

    refused: CertificateError | NonFiniteWeightError | None = None
    scorer.model.train()
    checkpointed, scorer.checkpointing = scorer.checkpointing, scorer.checkpointing or config.checkpointing
    budget.begin()
    for parameter in scorer.model.parameters():  # they lie in their file until they are written to
        if parameter.requires_grad and parameter.device.type == "cpu":
            bring_in(parameter.data_ptr(), parameter.nbytes)
    try:
        if not resume:
            save(good=True)
        else:
            last_good.agree(progress)
        with _interruptible() as interrupted, Line(total, progress.step, shown=shown) as line:
            over = False
            while not over:
                with ahead(prepared()) as batches:  # a step back begins anew from where it leads
                    over = advance(batches, line, interrupted)
    except _Stopped as stopped:
        if stopped.outcome.diverged:
            progress = go_back()
        save()
        outcome = stopped.outcome
        if outcome.finding is not None and outcome.finding.replayed and outcome.finding.islands:
            scorer.widen(outcome.finding.islands)  # in the model that is kept; a resumed run finds out for itself
        raise TrainingError(
            f"{outcome.reason} {left('recovery came to its limits')} "
            f"{_advice(scorer, out, outcome.instead, data=outcome.data)}",
            finding=outcome.finding,
        ) from None
    except MemoryExhaustedError as error:
        save()
        raise MemoryExhaustedError(f"{error.reason} {left('memory ran out')}", plan=error.plan) from None
    except Interrupted:
        save()
        if out is not None:
            refused = _saved(scorer, out, progress.step, journal)
        ended_early("interrupted")
        raise Interrupted(
            f"Stopped after step {progress.step} of {total}; the state is saved, --resume goes on."
            + (f" {refused}" if refused is not None else "")
        ) from None
    finally:
        budget.end()
        scorer.model.eval()
        scorer.checkpointing = checkpointed
    if not account.sound:
        ended_early("no step could be stored")
        reason, finding = ladder.last_skip
        why = reason or "all of their pairs were left out"
        raise TrainingError(
            f"None of the {progress.step} steps could be stored, so the model is as it was: {why}. "
            + _advice(scorer, out)
            + (f"\n{finding}" if finding is not None else ""),
            finding=finding,
        )
    scorer.untrained_head = False
    if out is not None and keep_best and progress.best_score is not None and progress.best_step != progress.step:
        read_weights(out / "best", scorer)
    finding = rate.nothing_learned(
        scorer, last_batches, function, rate=highest_rate * account.rate, share=share * account.rate,
        steps=progress.step - progress.skipped,
    )  # fmt: skip
    if finding is not None:
        journal.write({"event": "finding", "step": progress.step, "finding": finding.as_json()})
    if out is not None:
        card = training_card(
            scorer, settings, progress.evaluations, best_step=progress.best_step if keep_best else progress.step,
            sources=sources,
        )  # fmt: skip
        refused = _saved(scorer, out, progress.step, journal, card)
        progress.finished = True
        facts = {} if closing is None else closing()
        write_last_line("end", progress, account, journal, {"best_step": progress.best_step, **facts})
        write_report(out)
    last_good.drop()
    if account.happened:
        scorer.note(str(account))
    if finding is not None:
        scorer.note(str(finding))
    if refused is not None:
        raise refused
    return TrainResult(
        progress.step,
        progress.skipped,
        losses,
        progress.best_score,
        progress.best_step,
        progress.evaluations,
        optimizer,
        account,
        finding,
    )


def _advice(scorer: Scorer, out: Path | None, instead: str = "", *, data: bool = False) -> str:
    if instead:
        how = "Give the same command with --resume and without --strict" if out is not None else "Leave strict out"
        return f"{how}, and the run goes on: it {instead}."
    if data:
        if out is None:
            return "Repair or drop them."
        return f"These and those left out before are listed in '{out / QUARANTINE}': repair or drop them."
    wider = ", compute in bfloat16 or float32" if scorer.active_compute.narrow is not None else ""
    return f"Lower the learning rate{wider}, or look at the pairs named above."


def _saved(
    scorer: Scorer, out: Path, step: int, journal: Journal, card: str | None = None
) -> CertificateError | NonFiniteWeightError | None:
    """Save the model with its certificate; a refusal is written to the journal and returned, the model lies beside."""
    try:
        certificate = saving.save(scorer, out, writer=lambda storage: folder.writer(scorer, dtype=storage, card=card))
    except (CertificateError, NonFiniteWeightError) as refused:
        journal.write({"event": "certificate", "step": step, "passed": False, "text": str(refused)})
        return refused
    if certificate is not None:
        journal.write({"event": "certificate", "step": step, "passed": True, "text": certificate.line()})
    return None


def _announce_empty_groups(scorer: Scorer, examples: Examples, loss_name: str) -> None:
    loss = LOSSES[loss_name]
    empty = sum(not loss.teaches(examples.labels[rows]) for rows in examples.units)
    if empty == len(examples):
        raise TrainingError(f"No group has {loss.learns_from}: the {loss_name} loss has nothing to learn from.")
    if empty:
        scorer.note(
            f"{empty} of {len(examples)} groups do not have {loss.learns_from} and teach the {loss_name} loss nothing. "
            "Grade them or drop them."
        )


def _announce_gains(scorer: Scorer, labels: Tensor, loss_name: str, where: Callable[[int], str]) -> None:
    """Say so where one grade of the lambda loss, whose gain is 2^grade - 1, outweighs all usual ones."""
    if loss_name != "lambda" or not len(labels):
        return
    highest = int(labels.argmax())
    grade = labels[highest].item()
    if grade > USUAL_GRADE:
        scorer.note(
            f"The lambda loss gains 2^grade - 1: the highest grade, {grade:g} at {where(highest)}, weighs as much as "
            f"{2**grade - 1:.0f} documents of grade 1. Grades usually go to 3 or 4: scale them if that is not meant."
        )


def make_optimizer(scorer: Scorer, config: TrainConfig) -> AdamW:
    """AdamW over all trainable parameters: no decay for norms and biases, the head's own rate where one is given."""
    head = head_modules(scorer.model)
    if config.freeze_embeddings:
        for module in scorer.model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.requires_grad_(False)
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in scorer.model.named_parameters():
        if parameter.requires_grad:
            key = (name.split(".")[0] in head, parameter.ndim > 1)
            groups.setdefault(key, []).append((name, parameter))
    return AdamW(
        [
            {
                "params": members,
                "lr": config.head_lr or config.lr if in_head else config.lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (in_head, decays), members in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )


def write_last_line(
    event: str, progress: Progress, account: Account, journal: Journal, facts: Mapping[str, Any]
) -> None:
    """Close the journal with how far the run came, what it recovered, and `facts`."""
    record = {"event": event, "step": progress.step, "skipped": progress.skipped, **facts}
    journal.write(record | {"recovery": account.as_json()})


def _batches(
    plan: BatchPlan, config: TrainConfig, progress: Progress, total: int
) -> Iterator[tuple[int, int, list[int], bool]]:
    """(epoch, batches done after it, units, whether it ends the epoch or the run), going on where `progress` stands."""
    done, epoch, position = progress.step, progress.epoch, progress.position
    while done < total:
        batches = plan(epoch)
        while position < len(batches) and done < total:
            taken = batches[position : position + config.accumulate]
            position += len(taken)
            done += 1
            yield (
                epoch,
                position,
                [unit for batch in taken for unit in batch],
                position >= len(batches) or done == total,
            )
        epoch, position = epoch + 1, 0


def _updates(batches: int, accumulate: int) -> int:
    return -(-batches // accumulate)


def _rate(config: TrainConfig, given: Callable[[int, int], float] | None, step: int, total: int) -> float:
    if given is not None:
        return given(step, total)
    return factor(step, total=total, warmup=config.warmup, kind=config.schedule)


def _watched_format(scorer: Scorer) -> torch.dtype:
    """The format whose range matters: that of products, else of storage, else the one that a run may move to."""
    storage = scorer.precision.storage
    return scorer.active_compute.narrow or (torch.float16 if storage is torch.float32 else storage)


def _every(count: int, step: int) -> bool:
    return count > 0 and step % count == 0


@contextmanager
def kept_to_resume(out: Path) -> Iterator[None]:
    """Keep the tokens in `out` after a run that can be resumed, and after no other."""
    resumable = False
    try:
        yield
    except CertificateError:  # it is finished
        raise
    except BaseException:
        resumable = (out / CHECKPOINT).exists()
        raise
    finally:
        if not resumable:
            shutil.rmtree(out / TOKENS, ignore_errors=True)


class _Stopped(Exception):
    """The ladder has come to its end."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


def _refuse_corrupt(checkpoint: Path, finding: Finding | None) -> None:
    if finding is not None:
        raise TrainingError(
            f"The checkpoint in '{checkpoint}' is damaged. {finding} Start a new folder from the last saved model.",
            finding=finding,
        )


def _record(progress: Progress, result: StepResult, optimizer: torch.optim.Optimizer, seconds: float) -> dict[str, Any]:
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "loss_scale": result.loss_scale,
        "skipped": progress.skipped,
        "lr": optimizer.param_groups[0]["lr"],
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / max(seconds, 1e-9),
    }


def _settings(scorer: Scorer, examples: Examples, config: TrainConfig, loss_name: str) -> dict[str, Any]:
    tokens = examples.tokens
    asked = config.as_json()
    asked["limits"].pop("strict")  # a strict run that stopped may go on without
    for saves_memory in ("release_gradients", "checkpointing"):  # the bits are the same with and without
        asked.pop(saves_memory)
    return asked | {
        "loss": loss_name,
        "scheme": scorer.precision.scheme,
        "adapters": None if scorer.adapters is None else scorer.adapters.as_json(),
        "compute": scorer.precision.compute.name,
        "max_length": scorer.max_length,
        "units": len(examples),
        "pairs": len(tokens),
        "tokens": int(tokens.lengths.sum()),
        "truncated": tokens.truncated,
        "data_hash": _data_hash(tokens),
    }


def _data_hash(tokens: TokenRows) -> int:
    """A number that other tokens, or the same in another order, change."""
    total, place = 0, 1
    for block in tokens.blocks():
        count = len(block.input_ids)
        total += int(block.input_ids.astype(np.int64).dot(np.arange(place, place + count, dtype=np.int64)))
        place += count
    return total & 0x7FFFFFFF


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a flag read between steps, so that no step is cut in two; a second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
