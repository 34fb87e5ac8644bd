"""What a run does when a step fails: a ladder whose every rung is logged, counted and summed up at the end.

skip the step (and lower the loss scale) -> widen modules -> leave out pairs -> go back with a lower rate -> stop.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from halfrank.diagnosis import Finding, explain_step
from halfrank.errors import DataError, NonFiniteUpdateError, TornUpdateError
from halfrank.model.scorer import Scorer
from halfrank.numerics.scaling import LossScale
from halfrank.train import faults
from halfrank.train.config import FIRST_LOSSES, Limits
from halfrank.train.examples import Examples
from halfrank.train.faults import Attempt, Fault
from halfrank.train.step import LossFunction, RandomState, StepResult, random_state, restore

log = logging.getLogger("halfrank")
LEVEL = 3.0  # times the level a run began with: a spike is above that too
ORDINARY = 20.0  # times that level: what comes again and again and is no higher is a rarer kind of pair
RECENT = 100  # steps among which spikes are counted for that
EARLY_LEVEL = 10.0  # times the first loss, as long as no level is known
REFERENCE_STEPS = 5  # steps whose pairs tell lost weights from bad data: one small batch may be right by chance
CHEAP_SKIPS = 3  # gradient overflows in a row that the loss scale is trusted with before they are looked into


@dataclass
class Account:
    """What recovery did in a run and what that cost; part of every checkpoint."""

    lowered: int = 0  # steps skipped to lower the loss scale
    spikes: int = 0  # steps skipped because of a finite spike
    broken: int = 0  # steps skipped because nothing else helped
    emptied: int = 0  # steps all of whose pairs were left out
    widenings: int = 0
    islands: list[str] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: int = 0
    returned: bool = False  # whether the run went back and has not reached a new good state since
    repeated: int = 0  # steps done a second time
    rate: float = 1.0  # of the learning rate asked for
    halvings: int = 0  # of the token budget, because memory ran out
    pass_tokens: int = 0  # the budget after them
    seconds: float = 0.0
    seconds_since_good: float = 0.0
    spikes_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps that a new loss is compared with
    level: float | None = None  # the loss that the run began with
    spike_steps: list[int] = field(default_factory=list)  # the last ones that were skipped as spikes
    ordinary: float | None = None  # the highest loss that came too often to be a spike
    sound: list[list[int]] = field(default_factory=list)  # units of the last steps that were stored

    @property
    def happened(self) -> bool:
        """Whether there is anything to tell."""
        counts = (self.lowered, self.spikes, self.broken, self.widenings, self.quarantined, self.rollbacks)
        return any(counts) or self.halvings > 0

    def as_json(self) -> dict[str, Any]:
        """What a finished run tells machines."""
        return {
            "skipped_for_loss_scale": self.lowered,
            "skipped_for_spikes": self.spikes,
            "skipped_otherwise": self.broken + self.emptied,
            "islands": self.islands,
            "pairs_left_out": len(self.quarantined),
            "rollbacks": self.rollbacks,
            "steps_repeated": self.repeated,
            "learning_rate_factor": self.rate,
            "token_budget_halvings": self.halvings,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        skipped = self.lowered + self.spikes + self.broken + self.emptied
        parts = []
        if skipped:
            causes = {"the loss scale": self.lowered, "loss spikes": self.spikes, "other causes": self.broken,
                      "lack of usable pairs": self.emptied}  # fmt: skip
            why = ", ".join(f"{count} for {cause}" for cause, count in causes.items() if count)
            parts.append(f"{skipped} steps skipped ({why})")
        if self.islands:
            parts.append(f"{len(self.islands)} modules compute in float32 now ({_some(self.islands)})")
        if self.quarantined:
            parts.append(f"{len(self.quarantined)} pairs left out ({_reasons(self.quarantined)})")
        if self.halvings:
            parts.append(f"token budget halved {self.halvings} times for lack of memory")
        if self.rollbacks:
            parts.append(
                f"went back {self.rollbacks} times, {self.repeated} steps repeated, learning rate {self.rate:g} of "
                "the one asked for"
            )
        return f"Recovered: {'; '.join(parts)}; this took {self.seconds:.1f} s." if parts else "Nothing to recover."


INSTEAD = {  # what a run that is not strict does about each kind of fault
    faults.SCALE: "lowers the loss scale further",
    faults.NARROW: "computes these modules in float32",
    faults.PAIRS: "leaves these pairs out",
    faults.WEIGHTS: "goes back to its last good state, with a lower learning rate",
    faults.LOSS: "skips such a step",
}
STORED, SKIPPED, BACK, STOP = "stored", "skipped", "back", "stop"
_AGAIN = "again"


class Outcome(NamedTuple):
    """How a step ended. `result` is None where none of its pairs is left; `reason` explains BACK and STOP."""

    verdict: str
    result: StepResult | None = None
    reason: str = ""
    diverged: bool = False  # whether the weights themselves are suspected
    finding: Finding | None = None
    out_of_memory: bool = False  # whether nothing but a lack of memory makes the run go back
    instead: str = ""  # what the run would have done, were it not strict
    data: bool = False  # whether pairs alone are to blame


class _Case(NamedTuple):
    """A failed try at step `number` (from 1), and the loss scale's state before it."""

    attempt: Attempt
    number: int
    started: float
    scale: dict[str, Any]
    finding: Finding | None = None


class Ladder:
    """Takes a failed step up the ladder until it is stored, skipped, or the run must go back or stop."""

    def __init__(
        self,
        scorer: Scorer,
        examples: Examples,
        limits: Limits,
        account: Account,
        *,
        scale: LossScale,
        loss: LossFunction,
        per_unit: bool,
        max_tokens: int,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.account = account
        self._scorer, self._limits, self._scale = scorer, limits, scale
        self._loss, self._per_unit, self._max_tokens = loss, per_unit, max_tokens
        self._tell = tell
        self._looked_into: set[str] = set()  # reasons that have had their diagnosis
        self.last_skip: tuple[str, Finding | None] = ("", None)  # why the last step was skipped
        self._all = len(examples.tokens)
        self.examples = examples.without(record["row"] for record in account.quarantined)

    @property
    def sound(self) -> bool:
        """Whether the run's state may be called good: its last losses are not above where it began."""
        account = self.account
        if account.spikes_in_a_row or account.level is None or len(account.losses) < 5:
            return not account.spikes_in_a_row
        return statistics.median(account.losses[-5:]) <= _above(account.level, LEVEL)

    def screen(self) -> None:
        """Leave out, before the first step, the pairs that cannot be trained on; raises DataError for too many."""
        bad = faults.screen(self._scorer, self.examples)
        if not bad:
            return
        row, reason = next(iter(sorted(bad.items())))
        share = len(bad) / self._all
        if self._limits.strict or share > self._limits.quarantined:
            record = self.examples.record(row)
            otherwise = ", or leave out --strict, and they are left out" if share <= self._limits.quarantined else ""
            raise DataError(
                f"{len(bad)} of {self._all} pairs cannot be trained on. The first is {record['place']} "
                f"({record['query']!r:.60}): {reason}. Repair or drop them{otherwise}."
            )
        self._leave_out(
            _Case(self._attempt([], 1.0, random_state(self._scorer.device)), 0, time.perf_counter(), {}), bad
        )

    def refuses(self, loss: float) -> bool:
        """Whether a finite loss is a spike: far above the last ones, and above the level the run began with."""
        account = self.account
        if not self._limits.spike or account.level is None or len(account.losses) < FIRST_LOSSES:
            return False
        middle = statistics.median(account.losses)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in account.losses)
        usual = middle + self._limits.spike * max(deviation, 0.05 * abs(middle), 1e-6)
        seen = -math.inf if account.ordinary is None else _above(account.ordinary, LEVEL)
        return loss > max(usual, seen, _above(account.level, LEVEL))

    def run(
        self, units: Sequence[int], step: Callable[[Examples, list[int]], StepResult], *, number: int, in_a_row: int
    ) -> Outcome:
        """Try `step` on `units`, as often as the ladder says.

        `number` is that of the step, from 1; `in_a_row` says how many before it were skipped. After BACK and STOP
        random state and loss scale are those from before the step.
        """
        random, scale = random_state(self._scorer.device), self._scale.state_dict()
        started = time.perf_counter()
        while True:
            present = [unit for unit in units if len(self.examples.units[unit])]
            if not present:
                self.account.emptied += 1
                return Outcome(SKIPPED)
            tried = time.perf_counter()
            starved = False
            try:
                result: StepResult | None = step(self.examples, present)
                refused = ""
            except NonFiniteUpdateError as error:
                self._scorer.model.zero_grad(set_to_none=True)
                result, refused = None, str(error)
                starved = isinstance(error, TornUpdateError) and error.out_of_memory
            if result is not None and result.stored:
                self._went_well(result.loss, present, tried - started, time.perf_counter() - tried)
                return Outcome(STORED, result)
            case = _Case(self._attempt(present, float(scale["value"]), random), number, started, scale)
            outcome = self._starved(case, refused) if starved else self._climb(case, result, refused, in_a_row)
            if outcome.verdict == SKIPPED:
                self.account.seconds += time.perf_counter() - started
                return outcome
            restore(random)
            self._scale.load_state_dict(scale)
            if outcome.verdict != _AGAIN:
                self.account.seconds += time.perf_counter() - started
                return outcome

    def went_back(self, good: Account, repeated: int, *, slower: bool = True) -> None:
        """Take note that the run stands at an earlier state, whose own account was `good`; `slower`: with a lower rate.

        A run that went back for memory alone does the same steps again.
        """
        account = self.account
        account.rollbacks, account.returned = account.rollbacks + 1, account.returned or slower
        account.rate *= self._limits.rate_factor if slower else 1.0
        account.repeated += repeated
        account.seconds += account.seconds_since_good
        account.seconds_since_good = 0.0
        account.spikes_in_a_row = 0
        account.losses, account.level, account.sound = list(good.losses), good.level, list(good.sound)
        account.ordinary, account.spike_steps = good.ordinary, []

    def _attempt(self, units: Sequence[int], scale: float, random: RandomState) -> Attempt:
        return Attempt(
            self._scorer, self.examples, units, self._loss, self._per_unit, self._max_tokens, scale, random,
            list(dict.fromkeys(unit for units in self.account.sound for unit in units)),
        )  # fmt: skip

    def _went_well(self, loss: float, units: list[int], lost: float, used: float) -> None:
        account = self.account
        account.seconds += lost
        account.seconds_since_good += used
        account.spikes_in_a_row = 0
        account.sound = [*account.sound, list(units)][-REFERENCE_STEPS:]
        account.losses = [*account.losses, loss][-self._limits.spike_window :]
        if account.level is None and len(account.losses) == FIRST_LOSSES:
            account.level = statistics.median(account.losses)

    def _climb(self, case: _Case, result: StepResult | None, refused: str, in_a_row: int) -> Outcome:
        if result is None:
            return self._back(case._replace(finding=self._explained(case.attempt)), refused)
        if result.finite:
            return self._after_spike(case, result)
        lowers = self._scale.value < case.attempt.scale
        cheap = math.isfinite(result.loss) and lowers and in_a_row < CHEAP_SKIPS
        if cheap and not faults.absurd_labels(case.attempt):  # with such a label the scale would go on falling
            return self._lower(case, result)
        fault = faults.examine(case.attempt)
        if fault.kind == faults.SCALE and lowers and in_a_row < self._limits.skips_in_a_row:
            return self._lower(case, result)
        if self._tells_something_new(fault, in_a_row):
            case = case._replace(finding=self._explained(case.attempt))
        if self._limits.strict:
            return self._stop(case, fault.reason, fault.pairs, instead=INSTEAD.get(fault.kind, INSTEAD[faults.LOSS]))
        if fault.kind == faults.PAIRS:
            return self._quarantine(case, fault.pairs)
        if fault.kind == faults.NARROW:
            return self._widen(case, fault)
        if fault.kind == faults.WEIGHTS:
            return self._back(case, fault.reason)
        if in_a_row >= self._limits.skips_in_a_row:
            what = "gradients" if math.isfinite(result.loss) else "loss"
            return self._stop(case, f"the {what} stayed non-finite in {in_a_row + 1} steps in a row: {fault.reason}")
        self.account.broken += 1
        self._scale.load_state_dict(case.scale)  # it is not the scale's doing
        self._say("skip", case, fault.reason)
        self.last_skip = (fault.reason, case.finding or self.last_skip[1])
        return Outcome(SKIPPED, result)

    def _lower(self, case: _Case, result: StepResult) -> Outcome:
        self.account.lowered += 1
        reason = f"gradients overflow at a loss scale of {result.loss_scale:g}"
        self.last_skip = (reason, None)
        self._say("skip", case, reason, {"loss_scale": self._scale.value})
        return Outcome(SKIPPED, result)

    def _after_spike(self, case: _Case, result: StepResult) -> Outcome:
        account = self.account
        absurd = faults.absurd_labels(case.attempt)
        reason = f"the loss is {result.loss:.4g}, after a median of {statistics.median(account.losses):.4g}"
        if self._limits.strict:
            return self._stop(case, reason, absurd, instead=INSTEAD[faults.PAIRS if absurd else faults.LOSS])
        if absurd:
            return self._quarantine(case, absurd)
        account.spikes_in_a_row += 1
        account.spike_steps = [n for n in account.spike_steps if case.number - RECENT < n < case.number]
        account.spike_steps.append(case.number)
        if self._comes_again(case, result.loss):
            account.ordinary, account.spikes_in_a_row, account.spike_steps = result.loss, 0, []
            self._say("accept", case, f"{reason}, one of several within {RECENT} steps")
            return Outcome(_AGAIN)
        if account.spikes_in_a_row < self._limits.spikes_in_a_row:
            account.spikes += 1
            self._say("skip", case, reason)
            return Outcome(SKIPPED, result)
        if self.refuses(faults.reference_loss(case.attempt)):
            return self._back(case, f"{reason}, and that of a batch that was fine before has risen as well")
        # The weights do as well as ever on what they knew: the data have changed, not the run.
        account.losses, account.level, account.spikes_in_a_row = [], None, 0
        self._say("accept", case, f"{reason}, and an earlier batch is as good as it was")
        return Outcome(_AGAIN)

    def _comes_again(self, case: _Case, loss: float) -> bool:
        """Whether such losses are part of the data, as a rare label's are: frequent, not absurd, the weights sound."""
        account = self.account
        apart = account.spikes_in_a_row < len(account.spike_steps)  # with steps that went well between them
        if not apart or len(account.spike_steps) < self._limits.spikes_in_a_row or account.level is None:
            return False
        return loss <= _above(account.level, ORDINARY) and not self.refuses(faults.reference_loss(case.attempt))

    def _widen(self, case: _Case, fault: Fault) -> Outcome:
        scorer, account = self._scorer, self.account
        with scorer.computing_in("float32"):
            known = faults.reference_loss(case.attempt)
            if self.refuses(known) or self._exploded(known):  # no format would have held what the weights became
                return self._back(case, f"{fault.reason}, and the loss of a batch that was fine before has exploded")
        before = set(scorer.islands)
        named = case.finding.islands if case.finding is not None else ()
        if named and account.widenings < self._limits.widenings:
            scorer.widen(named)
        if set(scorer.islands) == before:  # no name helps, or too many were needed: the whole model then
            scorer.widen([name for name, _ in scorer.model.named_children()])
        added = [name for name in scorer.islands if name not in before]
        if not added:
            return self._stop(case, f"{fault.reason}, though every module computes in float32")
        account.widenings += 1
        account.islands += added
        self._say("widen", case, fault.reason, {"modules": added})
        log.warning("Step %d: %s; %s computed in float32 from now on.", case.number, fault.reason, _some(added))
        return Outcome(_AGAIN)

    def _exploded(self, known: float) -> bool:
        """Whether, before a level is known, pairs already seen do far worse than the first ones did untrained."""
        account = self.account
        return account.level is None and bool(account.losses) and known > _above(account.losses[0], EARLY_LEVEL)

    def _quarantine(self, case: _Case, bad: dict[int, str]) -> Outcome:
        count = len(self.account.quarantined) + len(bad)
        if count > self._limits.quarantined * self._all:
            return self._stop(
                case,
                f"{count} of {self._all} pairs cannot be trained on, the last because {next(iter(bad.values()))}; "
                f"more than {self._limits.quarantined:.0%} are never left out",
                bad,
            )
        self._leave_out(case, bad)
        return Outcome(_AGAIN)

    def _leave_out(self, case: _Case, bad: dict[int, str]) -> None:
        records = self._records(case, bad)
        self.account.quarantined += records
        self.examples = self.examples.without(bad)
        self._say("quarantine", case, _reasons(records), {"pairs": records})
        log.warning(
            "Step %d: %d pairs are left out (%s): %s.", case.number, len(records), _places(records), _reasons(records)
        )

    def _records(self, case: _Case, bad: dict[int, str]) -> list[dict[str, Any]]:
        return [
            {**self.examples.record(row), "reason": reason, "step": case.number} for row, reason in sorted(bad.items())
        ]

    def _back(self, case: _Case, reason: str) -> Outcome:
        if self._limits.strict or self.account.rollbacks >= self._limits.rollbacks:
            return self._stop(case, reason, diverged=True, instead=INSTEAD[faults.WEIGHTS])
        self._say("rollback", case, reason)
        log.warning(
            "Step %d: %s. Back to the last good state, with a lower learning rate.",
            case.number,
            reason.removesuffix("."),
        )
        return Outcome(BACK, None, reason)

    def _starved(self, case: _Case, reason: str) -> Outcome:
        """Memory ended an update half-way: the weights are torn, and nothing else is wrong with them."""
        if self.account.rollbacks >= self._limits.rollbacks:
            return self._stop(case, reason, diverged=True)
        self._say("rollback", case, reason)
        log.warning("Step %d: %s", case.number, reason)
        return Outcome(BACK, None, reason, out_of_memory=True)

    def _stop(
        self,
        case: _Case,
        reason: str,
        bad: dict[int, str] | None = None,
        *,
        diverged: bool = False,
        instead: str = "",
    ) -> Outcome:
        """End the run; `bad` pairs are written down beside those that were left out, and are still in."""
        records = self._records(case, bad or {})
        self._say("stop", case, reason, {"pairs": records} if records else None)
        reason = f"{reason.removesuffix('.')}; pairs: {_places(records)}" if records else reason
        strict = ", and the run is strict" if self._limits.strict else ""
        text = f"Step {case.number}: {reason.removesuffix('.')}{strict}."
        told = text if case.finding is None else f"{text}\n{case.finding}"
        instead = instead if self._limits.strict else ""
        return Outcome(STOP, None, told, diverged, case.finding, instead=instead, data=bool(records))

    def _tells_something_new(self, fault: Fault, in_a_row: int) -> bool:
        """Whether a diagnosis is worth its time: of steps that fail alike, the first and the last one's are."""
        if fault.kind == faults.PAIRS:
            return not any(record["reason"] in fault.pairs.values() for record in self.account.quarantined)
        if fault.kind != faults.LOSS:
            return True
        new = fault.reason not in self._looked_into or in_a_row >= self._limits.skips_in_a_row
        self._looked_into.add(fault.reason)
        return new

    def _explained(self, attempt: Attempt) -> Finding | None:
        before = random_state(self._scorer.device)
        restore(attempt.random)
        try:
            return explain_step(
                self._scorer, attempt.parts, self._loss, loss_scale=attempt.scale, source_of=attempt.examples.place
            )
        finally:
            restore(before)

    def _say(self, rung: str, case: _Case, reason: str, facts: dict[str, Any] | None = None) -> None:
        seconds = round(time.perf_counter() - case.started, 3)
        record = {"event": "recovery", "rung": rung, "step": case.number, "reason": reason, "seconds": seconds}
        finding = {} if case.finding is None else {"finding": case.finding.as_json()}
        self._tell({**record, **(facts or {}), **finding})


def _above(level: float, times: float) -> float:
    return level + (times - 1.0) * abs(level)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _places(records: Sequence[dict[str, Any]]) -> str:
    return _some([record["place"] for record in records])


def _reasons(records: Sequence[dict[str, Any]]) -> str:
    """The reasons of pairs left out, the commonest first."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["reason"]] = counts.get(record["reason"], 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = "; ".join(f"{count} because {reason}" for reason, count in ordered[:2])
    rest = sum(count for _, count in ordered[2:])
    return f"{shown}; {rest} for other reasons" if rest else shown
