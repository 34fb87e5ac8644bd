"""The plan of a run, made from its own batches before the first step, and followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from halfrank.allocator import peak_resident, resident
from halfrank.errors import DoesNotFitError, ModelError
from halfrank.memory import (
    Described,
    Plan,
    Row,
    Way,
    all_gradients,
    limit_of_machine,
    plan,
    usual_ways,
)
from halfrank.model import dropped_attention, gelu
from halfrank.model.attention import NAME as PACKED
from halfrank.model.dropout import drop_levels
from halfrank.model.scorer import Scorer
from halfrank.model.shadow import sizes_of
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.moments import BLOCK
from halfrank.precision import LORA
from halfrank.train.budget import TokenBudget
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, epoch_plan, tokens_of
from halfrank.train.step import random_state, restore

CHOICES = {"auto": (False, True), "no": (False,), "yes": (True,)}


def check_choices(release: str, checkpointing: str) -> None:
    """Raise ValueError where one of both settings is neither auto nor yes nor no."""
    for name, choice in (("release_gradients", release), ("checkpointing", checkpointing)):
        if choice not in CHOICES:
            raise ValueError(f"{name} must be auto, yes or no; got {choice!r}.")


def planned(
    scorer: Scorer,
    examples: Examples,
    config: TrainConfig,
    *,
    base: int,
    limit: int | None = None,
    release: str = "auto",
    checkpointing: str = "auto",
    batches: Sequence[Sequence[int]] | None = None,
    splits: bool = True,
) -> tuple[TrainConfig, Plan | None, TokenBudget]:
    """The fastest way that fits, as settings, plan and token budget; ways behind it are not looked at.

    `base` is what the process held before the model, `limit` what it may hold in all. `batches` are the units of each
    batch, where `config` does not decide them; without `splits` none is split. A class that looks at values cannot be
    planned: it trains as it was asked to. Raises DoesNotFitError, with the plan, where nothing fits.
    """
    ways = list(_ways(scorer, release, checkpointing))
    allowed = limit_of_machine() if limit is None else min(limit, limit_of_machine())
    described = Described(
        scorer.config.name_or_path or type(scorer.model).__name__, scorer.config, sizes_of(scorer.model),
        scorer.precision.storage,
    )  # fmt: skip
    heaviest = _heaviest(examples, config, batches)
    random = random_state(scorer.device)
    rows: list[Row] = []
    try:
        for way in ways:
            found = plan(
                described, [heaviest], limit=allowed, base=base, ways=[way], compute=scorer.compute.name,
                max_tokens=config.max_tokens, splits=splits,
            )  # fmt: skip
            rows += found.rows
            if found.chosen is not None:
                break
        found = replace(found, rows=tuple(rows))
        if found.chosen is None:
            raise _refused(found, described, heaviest, splits=splits)
    except ModelError as error:
        scorer.note(f"The memory of this run is not planned: {error}")
        asked = replace(config, release_gradients=release == "yes", checkpointing=checkpointing == "yes")
        return asked, None, TokenBudget(config.max_tokens, limit=limit, splits=splits)
    finally:
        restore(random)  # what a plan draws must not change what is trained
    way, needed, max_tokens, *_ = found.chosen
    held, tokens = needed.peak - needed.weights - needed.residual - needed.moments, min(found.tokens, max_tokens)
    budget = TokenBudget(
        max_tokens, limit=limit, bytes_per_token=held / max(tokens, 1), plan=str(found), splits=splits,
        activations_per_token=needed.activations / max(tokens, 1), gradients=all_gradients(described, way),
        roomy=found.roomy,
    )  # fmt: skip
    chosen = replace(config, release_gradients=way.released, checkpointing=way.checkpointing)
    return chosen, found, budget


def _refused(found: Plan, described: Described, heaviest: list[int], *, splits: bool) -> DoesNotFitError:
    """What is raised where no way of a precision fits; it names the fastest of another one that does."""
    tried = {row.way.scheme for row in found.rows}
    others = [] if any(scheme.startswith(LORA) for scheme in tried) else usual_ways(described)
    others = [way for way in others if way.scheme not in (*tried, "float32")]
    fitting = plan(described, [heaviest], limit=found.limit, base=found.base, ways=others, splits=splits)
    if fitting.chosen is None:
        return DoesNotFitError(f"This run does not fit.\n{found}")
    way, peak = fitting.chosen.way, fitting.chosen.need.peak / 2**20
    asked = f"--lora {way.lora_rank}" if way.lora_rank else f"--precision {way.scheme}"
    return DoesNotFitError(
        f"This run does not fit.\n{found}\nWith {asked} it would: about {peak:.0f} MiB.",
        instead=None if way.lora_rank else way.scheme,
    )


def loaded_beside(scorer: Scorer, before: int) -> int:
    """Bytes that the process has grown by since it held `before`, less the model's weights: what loading imported.

    They are the library's own and no part of a run; a plan's `base` holds them.
    """
    held = sum(tensor.nbytes for tensor in (*scorer.model.parameters(), *scorer.model.buffers()))
    return max(resident() - before - held, 0)


def first_use(scorer: Scorer) -> int:
    """Bytes that the process grows by what training imports and compiles when it is first used.

    They are the library's own and no part of a run; a plan's `base` holds them.
    """
    before = resident()
    storage = scorer.precision.storage if scorer.adapters is None else torch.float32
    weight = nn.Parameter(torch.zeros(2, BLOCK, dtype=storage))
    weight.grad = torch.ones_like(weight)
    AdamW([weight]).step()
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in scorer.model.modules()):
        drop_levels(torch.zeros(BLOCK, dtype=scorer.precision.compute.arithmetic), 1, (0, 0))
        config = scorer.model.config
        if config._attn_implementation == PACKED and _head_size(config) % dropped_attention.TILE == 0:
            dropped_attention.use_once()
    if any(gelu.is_gelu(module) for module in scorer.model.modules()):
        gelu.use_once(scorer.precision.compute.arithmetic)
    return max(resident() - before, 0)


def _head_size(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None) or 1
    return int(getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // heads)


def _heaviest(examples: Examples, config: TrainConfig, given: Sequence[Sequence[int]] | None) -> list[int]:
    """Lengths of the pairs of the first epoch's batch that has most tokens."""
    sizes = np.diff(examples.tokens.offsets[np.asarray(examples.units.first_rows)])
    batches = given or epoch_plan(
        examples, config.batch_size * config.accumulate, seed=config.seed, epoch=0, buckets=config.length_buckets
    )
    heaviest = max(batches, key=lambda units: int(sizes[list(units)].sum()))
    return [int(length) for unit in heaviest for length in tokens_of(examples, unit)]


def memory_facts(found: Plan | None) -> dict[str, int]:
    """Planned and measured peak above the library's own, in MiB, for the end of a run; empty without a plan.

    What is measured includes freed memory where it was kept: `memory_kept` is 1 then.
    """
    if found is None or found.chosen is None:
        return {}
    measured = max(peak_resident() - found.base, 0)
    return {
        "memory_planned_mib": round(found.chosen.need.peak / 2**20), "memory_measured_mib": round(measured / 2**20),
        "memory_kept": int(found.roomy),
    }  # fmt: skip


def compared(facts: Mapping[str, int]) -> str:
    """`memory_facts` in words; nothing without a plan."""
    if not facts:
        return ""
    planned, measured = facts["memory_planned_mib"], facts["memory_measured_mib"]
    kept = " with freed memory kept for speed, as there was room" if facts["memory_kept"] else ""
    return f"Memory above the library's own: planned {planned} MiB, measured {measured} MiB{kept}."


def _ways(scorer: Scorer, release: str, checkpointing: str) -> Iterator[Way]:
    check_choices(release, checkpointing)
    if scorer.adapters is not None:
        if release == "yes":
            raise ValueError("Adapters have few gradients and keep them: leave release_gradients at auto with LoRA.")
        yield from (Way(scorer.precision.scheme, c, False, scorer.adapters.rank) for c in CHOICES[checkpointing])
        return
    both = [(c, r) for c in CHOICES[checkpointing] for r in CHOICES[release]]
    yield from sorted((Way(scorer.precision.scheme, c, r) for c, r in both), key=lambda way: way.cost)
