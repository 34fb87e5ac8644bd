"""What a saved folder says about itself: names, data and evaluations collected while it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub as hub

from halfrank.model.scorer import Scorer

TAGS = ["sentence-transformers", "cross-encoder", "text-ranking", "halfrank"]


@dataclass
class ModelCardData:
    """Facts for the model card; evaluators of sentence-transformers report here.

    Data sets are names, or mappings with `name` and `id` (their id on the hub).
    """

    language: str | list[str] | None = None
    license: str | None = None
    model_name: str | None = None
    model_id: str | None = None
    train_datasets: list[Any] = field(default_factory=list)
    eval_datasets: list[Any] = field(default_factory=list)
    task_name: str | None = None
    tags: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, Any], epoch: float = 0, step: int = 0
    ) -> None:
        """Remember what an evaluator measured after a step."""
        name = getattr(evaluator, "name", "") or type(evaluator).__name__
        self.evaluations.append({"evaluator": name, "epoch": epoch, "step": step, "metrics": dict(metrics)})


def write_card(scorer: Scorer, data: Any, model_name: str | None, train_datasets: Sequence[Any] | None) -> str:
    """The README of a model folder, with the facts that the hub reads before it."""
    title = model_name or getattr(data, "model_name", None) or getattr(data, "model_id", None) or "Cross-encoder"
    stored = str(scorer.precision.storage).removeprefix("torch.")
    trained_on = train_datasets or getattr(data, "train_datasets", None) or []
    evaluations = getattr(data, "evaluations", [])
    last = evaluations[-1] if evaluations else None
    lines = [
        _front_matter(scorer, data, title, trained_on, last),
        f"# {title}",
        "",
        f"A {scorer.config.model_type} model with {scorer.num_labels} label(s), weights in {stored}, "
        f"at most {scorer.max_length} tokens a pair.",
    ]
    task = getattr(data, "task_name", None)
    if task:
        lines += ["", f"Made for {task}."]
    if trained_on:
        lines += ["", "Trained on: " + ", ".join(_name_of(one) for one in trained_on) + "."]
    if last is not None:
        lines += ["", f"## Evaluation after step {last['step']}", "", f"| {last['evaluator']} | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in last["metrics"].items()]
    return "\n".join(lines) + "\n"


def _front_matter(scorer: Scorer, data: Any, title: str, trained_on: Sequence[Any], last: Any) -> str:
    task = "text-ranking" if scorer.num_labels == 1 else "text-classification"
    given = list(getattr(data, "tags", None) or [])
    facts = hub.ModelCardData(
        language=getattr(data, "language", None),
        license=getattr(data, "license", None),
        library_name="sentence-transformers",
        pipeline_tag=task,
        tags=[*TAGS, *(tag for tag in given if tag not in TAGS)],
        datasets=[one["id"] for one in trained_on if isinstance(one, Mapping) and one.get("id")] or None,
        model_name=title if last else None,
        eval_results=_results(last, task) if last else None,
    )
    return f"---\n{facts.to_yaml()}\n---\n"


def _results(last: Mapping[str, Any], task: str) -> list[hub.EvalResult]:
    numbers = {name: value for name, value in last["metrics"].items() if isinstance(value, (int, float))}
    return [
        hub.EvalResult(
            task_type=task,
            dataset_type="unknown",
            dataset_name=last["evaluator"],
            metric_type=name,
            metric_value=float(value),
        )
        for name, value in numbers.items()
    ]


def _name_of(dataset: Any) -> str:
    return str(dataset.get("name") or dataset.get("id")) if isinstance(dataset, Mapping) else str(dataset)
