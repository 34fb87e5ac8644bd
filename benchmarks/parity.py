"""Does 16-bit training move the weights as float32 does? The same batches, distance moved: ratio and cosine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common import arguments, finish, minilm
from halfrank.data.pairs import Pair
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.numerics.adamw import AdamW
from halfrank.numerics.scaling import LossScale
from halfrank.precision import Facts, choose, detect
from halfrank.train.config import TrainConfig
from halfrank.train.examples import MicroBatch, from_pairs, micro_batches
from halfrank.train.loop import make_optimizer
from halfrank.train.schedule import factor
from halfrank.train.step import train_step
from train_speed import passages

Moved = dict[str, torch.Tensor]  # float64 distance of each parameter


@dataclass(frozen=True)
class Setting:
    layers: int
    steps: int
    batch: int
    tokens: int
    lr: float
    seed: int


def labelled_pairs(count: int, seed: int) -> list[Pair]:
    """Judged passages of MS MARCO in a shuffled order."""
    return passages(seed)[:count]


def scorer_in(dtype: torch.dtype, start: torch.dtype, setting: Setting, scheme: str, compute: str) -> Scorer:
    """MiniLM whose weights start as `start` rounds them, stored by `scheme`."""
    torch.manual_seed(setting.seed)
    options = folder.LoadOptions(
        num_labels=1, dtype=start, max_length=setting.tokens,
        config={"num_hidden_layers": setting.layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )  # fmt: skip
    scorer = folder.load(minilm(), options)
    facts = Facts(scorer.model.num_parameters(), dtype, detect("cpu"))
    scorer.adopt(choose(facts, scheme=scheme, compute=compute))
    return scorer


def batches_of(scorer: Scorer, setting: Setting) -> list[list[MicroBatch]]:
    examples = from_pairs(labelled_pairs(setting.steps * setting.batch, setting.seed), scorer.pairs)
    return [
        micro_batches(examples, range(i, i + setting.batch), max_tokens=1 << 30, per_unit=False)
        for i in range(0, len(examples), setting.batch)
    ]


def moved(
    scorer: Scorer, setting: Setting, optimizer: torch.optim.Optimizer, scaled: bool, *, release: bool = False
) -> tuple[Moved, float]:
    """Train; how far each weight went, and the mean loss of the last quarter."""
    exact: Callable[[torch.Tensor], torch.Tensor] = (
        optimizer.exact if isinstance(optimizer, AdamW) else (lambda p: p.detach())
    )
    named = list(scorer.model.named_parameters())
    before = {name: p.detach().double() for name, p in named}
    scale = LossScale(enabled=scaled)
    losses = []
    scorer.model.train()
    for step, parts in enumerate(batches_of(scorer, setting)):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * factor(step, total=setting.steps, warmup=0.1, kind="linear")
        if isinstance(optimizer, AdamW) or scaled:
            losses.append(
                train_step(scorer, parts, LOSSES["bce"].function, optimizer, scale, clip=1.0, release=release).loss
            )
        else:
            losses.append(plain_step(scorer, parts, optimizer))
    tail = losses[-max(len(losses) // 4, 1) :]
    return {name: exact(p).double() - before[name] for name, p in named}, sum(tail) / len(tail)


def plain_step(scorer: Scorer, parts: list[MicroBatch], optimizer: torch.optim.Optimizer) -> float:
    """What a training script of today does: backward, clip_grad_norm_, step."""
    total = 0.0
    for part in parts:
        loss = LOSSES["bce"].function(scorer.logits(part.batch), part.labels_P, part.groups_P) * part.share
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(scorer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def compared(ours: Moved, reference: Moved) -> dict[str, dict[str, float]]:
    """Ratio and cosine of the concatenated distances, in float64, by kind of weight."""
    kinds = {
        "all": list(reference),
        "matrices": [n for n, d in reference.items() if d.ndim > 1 and "embeddings" not in n],
        "embeddings": [n for n, d in reference.items() if d.ndim > 1 and "embeddings" in n],
    }
    result = {}
    for kind, names in kinds.items():
        a, b = (torch.cat([side[name].flatten() for name in names]) for side in (ours, reference))
        finite = bool(a.isfinite().all())
        result[kind] = {
            "ratio": float(a.norm() / b.norm()) if finite else float("nan"),
            "cosine": float(a @ b / (a.norm() * b.norm())) if finite and a.norm() > 0 else -1.0,
        }
    return result


def peers(quick: bool) -> dict[str, Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]]:
    import bitsandbytes
    import pytorch_optimizer

    chosen: dict[str, Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]] = {
        "torch AdamW fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
        "bitsandbytes AdamW8bit": lambda p, lr: bitsandbytes.optim.AdamW8bit(p, lr=lr, min_8bit_size=4096),
    }
    if not quick:
        chosen["torch AdamW"] = lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False)
        chosen["FlashAdamW"] = lambda p, lr: pytorch_optimizer.FlashAdamW(p, lr=lr)
    return chosen


def run_setting(setting: Setting, quick: bool) -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        plain = scorer_in(torch.float32, dtype, setting, "float32", "float32")
        decays = [
            {"params": [p for p in plain.model.parameters() if (p.ndim > 1) == decay], "weight_decay": 0.01 * decay}
            for decay in (True, False)
        ]
        reference, loss = moved(plain, setting, torch.optim.AdamW(decays, lr=setting.lr), scaled=True)
        rows[f"float32 AdamW from {name}"] = {"loss": loss}

        def add(
            label: str,
            scheme: str,
            compute: str,
            release: bool = False,
            reference: Moved = reference,
            loss: float = loss,
        ) -> None:
            scorer = scorer_in(torch.float32, dtype, setting, scheme, compute)  # noqa: B023
            config = TrainConfig(lr=setting.lr, seed=setting.seed)
            distance, own = moved(
                scorer, setting, make_optimizer(scorer, config), scaled=scorer.precision.scales_loss, release=release
            )
            rows[label] = {**compared(distance, reference), "loss": own, "loss_ratio": own / loss}

        add(f"halfrank {name}", name, "float32")
        add(f"halfrank {name}, released", name, "float32", release=True)
        add(f"halfrank {name}, emulated compute", name, f"emulated-{name}")
        add(f"mixed {name}, emulated compute", f"mixed-{name}", f"emulated-{name}")
        if quick and dtype is torch.bfloat16:
            continue
        for label, make in peers(quick).items():
            scorer = scorer_in(torch.float32, dtype, setting, name, "float32")
            try:
                distance, own = moved(scorer, setting, make(list(scorer.model.parameters()), setting.lr), scaled=False)
                rows[f"{label}, {name}"] = {**compared(distance, reference), "loss": own, "loss_ratio": own / loss}
            except (RuntimeError, ValueError, TypeError) as error:
                rows[f"{label}, {name}"] = {"failed": f"{type(error).__name__}: {error}"[:160]}
    return rows


def bars_of(rows: dict[str, dict[str, object]], at: str) -> dict[str, bool]:
    bars = {}
    for name in ("float16", "bfloat16"):
        for way in ("", ", released"):
            row = rows[f"halfrank {name}{way}"]
            for kind in ("all", "matrices", "embeddings"):
                ratio, cosine = row[kind]["ratio"], row[kind]["cosine"]  # type: ignore[index]
                bars[f"{name}{way} {kind}{at}: ratio within 0.3 %, cosine at least 0.999"] = (
                    abs(ratio - 1) <= 0.003 and cosine >= 0.999
                )
        ours, mixed = (rows[f"{who} {name}, emulated compute"]["all"]["cosine"] for who in ("halfrank", "mixed"))  # type: ignore[index]
        bars[f"emulated {name}{at}: cosine within 0.002 of the mixed scheme"] = ours >= mixed - 0.002
    return bars


def show(rows: dict[str, dict[str, object]]) -> None:
    for label, row in rows.items():
        cells = [
            f"{kind} {row[kind]['ratio']:.4f} / {row[kind]['cosine']:.5f}"  # type: ignore[index]
            for kind in ("all", "matrices", "embeddings")
            if kind in row
        ]
        loss = f"loss {row['loss']:.4f}" if "loss" in row else str(row.get("failed"))
        print(f"{label:36s} {'   '.join(cells)}   {loss}", flush=True)


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    if options.quick:
        settings = [Setting(3, 40, 8, 32, 5e-5, options.seed)]
    else:
        settings = [Setting(6, 120, 16, 48, lr, options.seed + s) for lr in (2e-5, 1e-4) for s in range(3)]
    results, bars = [], {}
    for setting in settings:
        at = f" (lr {setting.lr:g}, seed {setting.seed})"
        print(f"{setting.layers} layers, {setting.steps} steps of {setting.batch}{at}: ratio / cosine to float32")
        rows = run_setting(setting, options.quick)
        show(rows)
        results.append({"setting": vars(setting), "rows": rows})
        bars |= bars_of(rows, at)
    ours = [f"halfrank {name}{way}" for name in ("float16", "bfloat16") for way in ("", ", released")]
    worst = min(r["rows"][name]["all"]["cosine"] for r in results for name in ours)  # type: ignore[index]
    far = max(abs(r["rows"][name]["all"]["ratio"] - 1) for r in results for name in ours)  # type: ignore[index]
    finish(
        "parity", options.quick, {"settings": results}, bars, f"worst ratio off by {far:.4f}, worst cosine {worst:.5f}"
    )


if __name__ == "__main__":
    main()
