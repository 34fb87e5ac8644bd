"""What a saved folder says about itself: names, data and evaluations collected while it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfrank.model.scorer import Scorer

HEADER = """---
tags:
- sentence-transformers
- cross-encoder
- text-ranking
- halfrank
pipeline_tag: text-ranking
library_name: sentence-transformers
---
"""


@dataclass
class ModelCardData:
    """Facts for the model card; evaluators of sentence-transformers report here."""

    model_name: str | None = None
    train_datasets: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, Any], epoch: float = 0, step: int = 0
    ) -> None:
        """Remember what an evaluator measured after a step."""
        name = getattr(evaluator, "name", "") or type(evaluator).__name__
        self.evaluations.append({"evaluator": name, "epoch": epoch, "step": step, "metrics": dict(metrics)})


def write_card(scorer: Scorer, data: Any, model_name: str | None, train_datasets: list[str] | None) -> str:
    """The README of a model folder."""
    title = model_name or getattr(data, "model_name", None) or "Cross-encoder"
    stored = str(scorer.precision.storage).removeprefix("torch.")
    lines = [
        HEADER,
        f"# {title}",
        "",
        f"A {scorer.config.model_type} model with {scorer.num_labels} label(s), weights in {stored}, "
        f"at most {scorer.max_length} tokens a pair.",
    ]
    datasets = train_datasets or getattr(data, "train_datasets", None) or []
    if datasets:
        lines += ["", "Trained on: " + ", ".join(str(name) for name in datasets) + "."]
    evaluations = getattr(data, "evaluations", [])
    if evaluations:
        last = evaluations[-1]
        lines += ["", f"## Evaluation after step {last['step']}", "", f"| {last['evaluator']} | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in last["metrics"].items()]
    return "\n".join(lines) + "\n"
