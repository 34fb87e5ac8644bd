"""Each loss against its float64 formula (1e-6) and against sentence-transformers' own (1e-5), values and gradients.

The formulas are those of `tests/test_losses.py`, written from the papers in plain Python. The peer's losses get the
same logits through a stand-in for its model. Where the peer takes a mean over all document pairs of a batch and
halfrank a mean over groups, one group at a time is compared.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import ROOT, arguments, finish

sys.path.insert(0, str(ROOT / "tests"))
from halfrank.losses import LOSSES
from test_losses import EXACT

FORMULA, PEER = 1e-6, 1e-5


class Stand(nn.Module):
    """What the peer's losses ask of a model: texts are row numbers, scores are given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.num_labels = logits.shape[1]
        self.device = torch.device("cpu")

    @property  # the peer's losses ask whether their model is a CrossEncoder
    def __class__(self) -> type:
        from sentence_transformers import CrossEncoder

        return CrossEncoder

    def preprocess(self, pairs: list[tuple[str, str]], **_: Any) -> dict[str, Tensor]:
        return {"rows": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = self.logits[features["rows"]]
        return {"scores": scores[:, 0] if self.num_labels == 1 else scores}


def case(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three groups of five: logits, labels, groups; a teacher's best document comes first, as the peer expects."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(15, 3 if name == "cross-entropy" else 1, generator=draw) * 3
    grades = torch.randint(0, 4, (15,), generator=draw).float()
    grades[::5] = 4.0
    labels = {
        "bce": torch.rand(15, generator=draw),
        "cross-entropy": torch.randint(0, 3, (15,), generator=draw).float(),
        "softmax": torch.eye(5)[0].repeat(3),
        "lambda": grades,
        "ranknet": grades,
    }.get(name, torch.randn(15, generator=draw).view(3, 5).sort(1, descending=True).values.flatten())
    return scores, labels, torch.arange(3).repeat_interleave(5)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3))


def evaluated(function: Callable[..., Tensor], scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    value = function(scores, *rest)
    (gradient,) = torch.autograd.grad(value, scores)
    return value.detach(), gradient


def peer(name: str, scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """Value and gradient of the peer's loss of this name; None where it has none."""
    from sentence_transformers.cross_encoder import losses

    model = Stand(scores.clone())
    rows = [str(row) for row in range(len(scores))]
    lists = [[rows[i] for i in (groups == g).nonzero()[:, 0].tolist()] for g in range(int(groups.max()) + 1)]
    graded = [labels[groups == g] for g in range(int(groups.max()) + 1)]
    queries = ["q"] * len(lists)
    listwise = [queries, lists]
    pairs = [["q"] * len(rows), rows]
    columns = [queries, *[list(column) for column in zip(*lists, strict=True)]]
    known: dict[str, Callable[[], Tensor]] = {
        "bce": lambda: losses.BinaryCrossEntropyLoss(model)(pairs, labels),
        "cross-entropy": lambda: losses.CrossEntropyLoss(model)(pairs, labels.long()),
        "mse": lambda: losses.MSELoss(model)(pairs, labels),
        "softmax": lambda: losses.ListNetLoss(model)(listwise, [100 * grade for grade in graded]),
        "margin-mse": lambda: losses.MarginMSELoss(model)(columns, list(torch.stack(graded))),
        "ranknet": lambda: losses.RankNetLoss(model)(listwise, graded),
        "lambda": lambda: losses.LambdaLoss(model)(listwise, graded),
        "listmle": lambda: losses.ListMLELoss(model, respect_input_order=False)(listwise, graded),
    }
    if name not in known:
        return None
    value = known[name]()
    (gradient,) = torch.autograd.grad(value, model.logits)
    return value.detach(), gradient


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    seeds = range(options.seed, options.seed + (20 if options.quick else 200))
    rows: dict[str, dict[str, float]] = {}
    for name, loss in LOSSES.items():
        worst = {"formula": 0.0, "formula_gradient": 0.0}
        for seed in seeds:
            scores, labels, groups = case(name, seed)
            value, gradient = evaluated(loss.function, scores, labels, groups)
            exact, exact_gradient = evaluated(EXACT[name], scores.double(), labels, groups)
            errors = {"formula": relative(value, exact), "formula_gradient": relative(gradient, exact_gradient)}
            if name in ("ranknet", "lambda"):
                scores, labels, groups = scores[:5], labels[:5], groups[:5]
                value, gradient = evaluated(loss.function, scores, labels, groups)
            theirs = peer(name, scores, labels, groups)
            if theirs is not None:
                errors |= {"peer": relative(value, theirs[0]), "peer_gradient": relative(gradient, theirs[1])}
            worst = {key: max(worst.get(key, 0.0), error) for key, error in errors.items()}
        rows[name] = worst
        print(f"{name:14s}" + "".join(f"  {key} {error:.1e}" for key, error in worst.items()))
    bars = {}
    for name, worst in rows.items():
        bars[f"{name}: formula within {FORMULA:g}"] = max(worst["formula"], worst["formula_gradient"]) <= FORMULA
        if "peer" in worst:
            bars[f"{name}: the peer's within {PEER:g}"] = max(worst["peer"], worst["peer_gradient"]) <= PEER
    far = max(max(worst["formula"], worst["formula_gradient"]) for worst in rows.values())
    near = max(max(worst.get("peer", 0.0), worst.get("peer_gradient", 0.0)) for worst in rows.values())
    figure = f"largest relative difference to the formulas {far:.1e}, to the peer {near:.1e}"
    finish("losses", options.quick, {"rows": rows}, bars, figure)


if __name__ == "__main__":
    main()
