"""halfrank.AdamW alone in sentence-transformers' trainer, on a model loaded in 16 bits: how near is its float32 run?

Everything but the optimizer is the peer's: its trainer, its loss, its 16-bit products, no loss scale. Each optimizer
is compared with the trainer's run of the same starting values in float32 with torch's AdamW: distance moved, ratio
and cosine over all weights; a run that ends non-finite counts as cosine -1.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import halfrank
from common import arguments, finish, minilm
from train_speed import in_order, passages

RATIO = 0.05
COSINE = {"bfloat16": 0.98, "float16": 0.95}
LARGER = ("optimi AdamW, Kahan",)  # holds 8 bytes a weight where the others hold 4 to 6
Make = Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]


def optimizers(lr: float) -> dict[str, Make]:
    import bitsandbytes
    import optimi
    import pytorch_optimizer

    def plain(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Make:
        return lambda named: make([parameter for _, parameter in named], lr=lr, **settings)

    return {
        "halfrank AdamW": lambda named: halfrank.AdamW(named, lr=lr, weight_decay=0.0),
        "torch AdamW": plain(torch.optim.AdamW, weight_decay=0.0, foreach=False),
        "torch AdamW fused": plain(torch.optim.AdamW, weight_decay=0.0, fused=True),
        "bitsandbytes AdamW8bit": plain(bitsandbytes.optim.AdamW8bit, weight_decay=0.0, min_8bit_size=4096),
        "FlashAdamW": plain(pytorch_optimizer.FlashAdamW, weight_decay=0.0),
        "FlashAdamW, 24 bits": plain(pytorch_optimizer.FlashAdamW, weight_decay=0.0, master_weight_bits=24),
        # Its own betas and eps are others; foreach and triton change speed alone.
        "optimi AdamW, Kahan": plain(
            optimi.AdamW, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, kahan_sum=True, foreach=False, triton=False
        ),
    }


def small_model(path: Path, seed: int) -> Path:
    """Two layers, 128 wide, MiniLM's tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(path)
    return path


def trained(path: Path, start: torch.dtype, dtype: torch.dtype, make: Make, batch: int, steps: int, seed: int) -> Any:
    """(distance moved by each weight in float64, weights and residuals joined where the optimizer keeps residuals)."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    torch.manual_seed(seed)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = CrossEncoder(
        str(path), num_labels=1, max_length=32, device="cpu", model_kwargs={"dtype": start}, config_kwargs=settings
    )
    model.to(dtype)
    named = list(model.named_parameters())
    before = {name: parameter.detach().double() for name, parameter in named}
    pairs = passages(seed)[: steps * batch]
    columns = {
        "query": [pair.query for pair in pairs],
        "document": [pair.document for pair in pairs],
        "label": [pair.label for pair in pairs],
    }
    optimizer = make(named)
    with tempfile.TemporaryDirectory() as out:
        args = CrossEncoderTrainingArguments(
            output_dir=out,
            per_device_train_batch_size=batch,
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
            batch_sampler=in_order,
            seed=seed,
        )
        trainer = CrossEncoderTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict(columns), optimizers=(optimizer, None)
        )
        trainer.train()
    return {name: exact(optimizer, parameter).double() - before[name] for name, parameter in named}


def exact(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A weight together with what its optimizer keeps of the rounding, whosever optimizer it is."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, halfrank.AdamW):
        return optimizer.exact(parameter)
    if "error_bits" in state:  # FlashAdamW
        return optimizer.get_param_fp32(parameter.detach(), state)
    if state.get("kahan_comp") is not None:  # optimi
        return parameter.detach().float() + state["kahan_comp"].float()
    return parameter.detach()


def compared(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    a, b = (torch.cat([side[name].flatten() for name in reference]) for side in (ours, reference))
    if not a.isfinite().all():
        return {"ratio": float("nan"), "cosine": -1.0}
    return {"ratio": float(a.norm() / b.norm()), "cosine": float(a @ b / (a.norm() * b.norm())) if a.any() else -1.0}


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    batch, steps, lr = (4, 15, 1e-4) if options.quick else (8, 40, 5e-5)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    bars = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = small_model(Path(temporary), options.seed) if options.quick else minilm()
        run = partial(trained, path, batch=batch, steps=steps, seed=options.seed)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
            reference = run(dtype, torch.float32, optimizers(lr)["torch AdamW"])
            rows[name] = {}
            for label, make in optimizers(lr).items():
                row = rows[name][label] = compared(run(dtype, dtype, make), reference)
                print(f"{name:9s} {label:24s} ratio {row['ratio']:8.4f}  cosine {row['cosine']:8.5f}", flush=True)
            own = rows[name]["halfrank AdamW"]
            others = max(r["cosine"] for label, r in rows[name].items() if label not in ("halfrank AdamW", *LARGER))
            bars[f"{name}: cosine above every other optimizer's of at most 6 bytes ({others:.4f})"] = (
                own["cosine"] > others
            )
            bars[f"{name}: cosine at least {COSINE[name]}"] = own["cosine"] >= COSINE[name]
            bars[f"{name}: ratio within {RATIO:.0%}"] = abs(own["ratio"] - 1) <= RATIO
    figure = "; ".join(
        f"{name}: ratio {row['halfrank AdamW']['ratio']:.4f}, cosine {row['halfrank AdamW']['cosine']:.5f}"
        for name, row in rows.items()
    )
    finish("optimizer_only", options.quick, {"steps": steps, "batch": batch, "lr": lr, "rows": rows}, bars, figure)


if __name__ == "__main__":
    main()
