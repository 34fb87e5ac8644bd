"""The model card of a trained folder, after huggingface_hub's template: data, settings, metrics, precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from halfrank.model.scorer import Scorer


class Sources(NamedTuple):
    """Where model, training and held-out data come from, in words; a run is resumed with the same model."""

    data: str | None = None
    held_out: str | None = None
    model: str | None = None


SHOWN = ("loss", "steps", "epochs", "batch_size", "accumulate", "lr", "head_lr", "weight_decay", "warmup", "schedule",
         "clip", "seed", "max_length", "scheme", "compute")  # fmt: skip


def training_card(
    scorer: Scorer,
    settings: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    best_step: int,
    sources: Sources,
) -> str:
    """The README of what a run leaves; `evaluations` are the journal's, `settings` those of its first line."""
    chosen = next((record for record in reversed(evaluations) if record["step"] == best_step), None)
    metrics = {name: value for name, value in (chosen or {}).items() if name not in ("event", "step", "score")}
    name = f"{scorer.config.model_type} cross-encoder"
    header = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="text-ranking" if scorer.num_labels == 1 else "text-classification",
        tags=["sentence-transformers", "cross-encoder", "text-ranking", "halfrank"],
        model_name=name,
        eval_results=[
            EvalResult("text-ranking", "custom", sources.held_out or "held-out data", metric, value)
            for metric, value in metrics.items()
        ]
        or None,
    )
    rows = [f"| {key} | {settings[key]} |" for key in SHOWN if settings.get(key) is not None]
    lines = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        "## Model Details",
        f"A {scorer.config.model_type} model with {scorer.num_labels} label(s), at most {scorer.max_length} tokens a "
        f"pair. {scorer.precision}.",
        "## Training Details",
        f"{settings.get('pairs', 'Unknown')} pairs of {sources.data or 'data that are not named'}"
        + (f", {settings['truncated']} of them cut" if settings.get("truncated") else "")
        + ".",
        "| setting | value |\n|---|---|\n" + "\n".join(rows),
    ]
    if metrics:
        table = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in metrics.items())
        where = sources.held_out or "held-out data"
        lines += ["## Evaluation", f"On {where}, after step {best_step}.", f"| metric | value |\n|---|---|\n{table}"]
    return "\n\n".join(lines) + "\n"
