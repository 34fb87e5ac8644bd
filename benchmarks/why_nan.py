"""The figures of docs/why-nan.md, each from a real run of all-MiniLM-L6-v2's first two layers on judged passages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import halfrank
from common import ROOT, arguments, finish, minilm, ranking_data

matplotlib.use("svg")
from matplotlib import pyplot

IMAGES = ROOT / "docs" / "img"
BCE = nn.BCEWithLogitsLoss()
RATE, SCALE = 2e-5, 2.0**14


def batches(count: int) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    rows = [
        (line["query"], doc["text"], float(doc["grade"] > 1)) for line in ranking_data("dl20-judged.jsonl")
        for doc in line["docs"][:4]
    ]  # fmt: skip
    found = []
    for start in range(0, 8 * count, 8):
        queries, texts, labels = zip(*rows[start : start + 8], strict=True)
        found.append(
            {
                **tokenizer(
                    list(queries), list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
                ),
                "labels": torch.tensor(labels),
            }
        )
    return found


def model_in(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=1, num_hidden_layers=2)
    return model.to(dtype).eval()


def step(model: Any, batch: dict[str, Tensor], *, scale: float = 1.0) -> float:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    loss = BCE(model(**inputs).logits[:, 0].float(), batch["labels"])
    (loss * scale).backward()
    return float(loss.detach())


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.ndim > 1}


def distances(dtype: torch.dtype, make: Callable[[Any], Any], data: list[dict[str, Tensor]]) -> list[float]:
    """Distance that the matrices have moved after each step; NaN once a weight is not finite."""
    model = model_in(dtype)
    optimizer, start, found = make(model), weights_of(model), []
    ours = isinstance(optimizer, halfrank.AdamW)
    for batch in data:
        if ours:  # with the loss scale that the training loop uses for 16-bit gradients
            step(model, batch, scale=SCALE)
            optimizer.step(grad_divisor=SCALE)
        else:
            step(model, batch)
            optimizer.step()
        optimizer.zero_grad()
        moved = sum(
            float(((optimizer.exact(p) if ours else p.detach().float()) - start[name]).double().square().sum())
            for name, p in model.named_parameters() if name in start
        )  # fmt: skip
        found.append(moved**0.5)
    return found


def figure(name: str, title: str, x: str, y: str, draw: Callable[[Any], None]) -> None:
    shape, axes = pyplot.subplots(figsize=(6.4, 3.4))
    draw(axes)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    shape.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    shape.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    pyplot.close(shape)


def optimizers(data: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    runs = {
        "float32, AdamW": (torch.float32, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE)),
        "float16, fused AdamW": (torch.float16, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE, fused=True)),
        "bfloat16, AdamW": (torch.bfloat16, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE)),
        "float16, halfrank.AdamW": (torch.float16, lambda m: halfrank.AdamW(m.named_parameters(), lr=RATE)),
        "bfloat16, halfrank.AdamW": (torch.bfloat16, lambda m: halfrank.AdamW(m.named_parameters(), lr=RATE)),
        "float16, AdamW": (torch.float16, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE)),
    }
    return {name: distances(dtype, make, data) for name, (dtype, make) in runs.items()}


def zeros_by_scale(batch: dict[str, Tensor]) -> dict[int, float]:
    """Share of zeros among the float16 gradients that are not zero in float32, by the loss scale's exponent."""
    exact = model_in(torch.float32)
    step(exact, batch)
    there = {name: p.grad != 0 for name, p in exact.named_parameters() if p.grad is not None and p.ndim > 1}
    shares = {}
    for power in range(-6, 21, 2):
        model = model_in(torch.float16)
        step(model, batch, scale=2.0**power)
        grads = {n: p.grad for n, p in model.named_parameters() if n in there}
        lost = sum(int((((grad == 0) | ~grad.isfinite()) & there[n]).sum()) for n, grad in grads.items())
        shares[power] = lost / sum(int(mask.sum()) for mask in there.values())
    return shares


def gradient_by_sharpness(batch: dict[str, Tensor]) -> dict[int, float]:
    """Length of the query and key gradients of layer 0 when its queries are multiplied by a power of two."""
    lengths = {}
    for power in range(0, 15, 2):
        model = model_in(torch.float32)
        own = model.bert.encoder.layer[0].attention.self
        with torch.no_grad():
            own.query.weight.mul_(2.0**power)
        step(model, batch)
        # The gradient of a sharpened query's input side: what earlier layers and the keys can still learn from.
        lengths[power] = float(own.key.weight.grad.norm()) / 2.0**power
    return lengths


def main() -> None:
    options = arguments(__doc__ or "")
    logging.getLogger("halfrank").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data = batches(8 if options.quick else 24)
    moved = optimizers(data)

    def distance(axes: Any) -> None:
        for name, values in moved.items():
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set_yscale("log")

    finite = [value for value in moved["float16, AdamW"] if value == value and value != float("inf")]
    figure("why-optimizers", "Distance the matrices moved", "step", "distance", distance)
    shares = zeros_by_scale(data[0])
    figure(
        "why-loss-scale", "float16 gradients lost (zero or infinite)", "loss scale, power of two", "share",
        lambda axes: axes.plot(list(shares), list(shares.values()), marker="."),
    )  # fmt: skip
    sharp = gradient_by_sharpness(data[0])

    def saturation(axes: Any) -> None:
        axes.plot(list(sharp), list(sharp.values()), marker=".")
        axes.set_yscale("log")

    figure(
        "why-saturation", "What passes a softmax of ever larger scores", "queries times 2 to the", "key gradient",
        saturation,
    )  # fmt: skip
    exact = moved["float32, AdamW"][-1]
    ratios = {name: values[-1] / exact for name, values in moved.items()}
    for name, ratio in ratios.items():
        print(f"{name:28s} distance over float32's {ratio:.4g}")
    print("gradients lost: " + ", ".join(f"2^{power} {share:.1%}" for power, share in shares.items()))
    bars = {
        "float16 with AdamW is not finite after step 1": not finite,
        "halfrank within 1 %": all(abs(ratios[f"{d}, halfrank.AdamW"] - 1) < 0.01 for d in ("float16", "bfloat16")),
        "a loss scale exists at which few gradients are lost": min(shares.values()) < 0.01,
    }
    facts = {"ratios": ratios, "lost by scale": shares, "gradient by sharpness": sharp}
    finish("why_nan", options.quick, facts, bars, f"three figures in {IMAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
