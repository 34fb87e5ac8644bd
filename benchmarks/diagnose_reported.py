"""Eight situations that users reported of other tools, rebuilt, and whether `halfrank.diagnose` names each.

All-MiniLM-L6-v2 as a fresh cross-encoder, in sentence-transformers' own model and loss or transformers' own model where
the situation is theirs; the two that newer versions have mended (half-precision listwise loss, subtraction of two
16-bit logits) are written as they were.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from common import arguments, finish, minilm, ranking_data
from halfrank import Finding, diagnose
from halfrank.diagnosis import Cause

PAIRS = 8
BCE = nn.BCEWithLogitsLoss()


def texts() -> tuple[list[tuple[str, str]], Tensor]:
    """Judged passages of real queries, half of them right."""
    chosen: list[tuple[str, str, float]] = []
    for line in ranking_data("dl20-judged.jsonl"):
        for wanted in (0, 3):
            found = next((doc for doc in line["docs"] if doc["grade"] == wanted), None)
            if found is not None:
                chosen.append((line["query"], found["text"], float(wanted > 0)))
        if len(chosen) >= PAIRS:
            break
    return [(query, text) for query, text, _ in chosen[:PAIRS]], torch.tensor([label for *_, label in chosen[:PAIRS]])


def peer(dtype: torch.dtype) -> Any:
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    return CrossEncoder(str(minilm()), num_labels=1, max_length=64, device="cpu", model_kwargs={"dtype": dtype})


def tokens(tokenizer: Any, pairs: list[tuple[str, str]], length: int = 64) -> dict[str, Tensor]:
    queries, documents = (list(side) for side in zip(*pairs, strict=True))
    return dict(tokenizer(queries, documents, padding=True, truncation=True, max_length=length, return_tensors="pt"))


def fit_in(dtype: torch.dtype) -> Finding | None:
    """`CrossEncoder(..., float16)` and `fit`: the peer's model, its loss, the optimizer that its `fit` makes."""
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = peer(dtype)
    pairs, labels = texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    return diagnose(model, (pairs, labels), BinaryCrossEntropyLoss(model), optimizer)


class OwnMask(nn.Module):
    """A model whose caller masks with -1e9, as many scripts do, and casts the mask to the model's format."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -1e9
        return self.inner(input_ids=input_ids, attention_mask=mask.to(self.inner.dtype), token_type_ids=token_type_ids)


def masked_row() -> Finding | None:
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=1, dtype=torch.float16).eval()
    model.set_attn_implementation("eager")
    pairs, labels = texts()
    batch = tokens(AutoTokenizer.from_pretrained(minilm()), pairs)
    batch["attention_mask"][3] = 0  # an empty document whose query was cut away as well
    return diagnose(OwnMask(model), {**batch, "labels": labels.half()}, BCE)


def sigmoid_ties() -> Finding | None:
    model = peer(torch.bfloat16)
    with torch.no_grad():  # a confident head, as trained rerankers have
        model.model.classifier.weight.mul_(40.0)
        model.model.classifier.bias.fill_(7.5)
    return diagnose(model, texts()[0], activation=torch.sigmoid)


class YesNo(nn.Module):
    """A causal reranker that subtracts two logits in the model's format."""

    def __init__(self, inner: nn.Module, yes: int, no: int) -> None:
        super().__init__()
        self.inner, self.config, self.yes, self.no = inner, inner.config, yes, no

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        last = logits[torch.arange(len(logits)), attention_mask.sum(1) - 1]
        return (last[:, self.yes] - last[:, self.no])[:, None]


def yes_no() -> Finding | None:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    inner = AutoModelForCausalLM.from_config(config)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():  # both answers are far likelier than the rest, as after training: logits near 18
        mean = inner.lm_head.weight.mean(0)
        inner.lm_head.weight[yes] += 1.6 * torch.randn(128).sign()
        inner.lm_head.weight[no] = inner.lm_head.weight[yes] + 0.003 * torch.randn(128) + mean
    batch = {key: value for key, value in tokens(tokenizer, texts()[0]).items() if key != "token_type_ids"}
    return diagnose(YesNo(inner.to(torch.bfloat16).eval(), yes, no), batch)


def wrong_pad() -> Finding | None:
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=5, num_labels=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    pairs, labels = texts()
    batch = {key: value for key, value in tokens(tokenizer, pairs).items() if key != "token_type_ids"}
    return diagnose(model, {**batch, "labels": labels}, BCE)


def nan_label() -> Finding | None:
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = peer(torch.float32)
    pairs, labels = texts()
    labels[5] = math.nan
    return diagnose(model, (pairs, labels), BinaryCrossEntropyLoss(model))


def half_listmle(scores: Tensor, labels: Tensor) -> Tensor:
    """ListMLE as it was common: exp, cumulative sum and log in the scores' own format."""
    ordered = scores[labels.argsort(descending=True)]
    sums = ordered.exp().flip(0).cumsum(0).flip(0)
    return (sums.log() - ordered).mean()


def listwise_in_half() -> Finding | None:
    model = peer(torch.float16)
    with torch.no_grad():
        model.model.classifier.bias.fill_(12.0)  # exp(12) is beyond float16
    pairs, labels = texts()
    return diagnose(model, (pairs, labels), half_listmle)


SITUATIONS: dict[str, tuple[Cause, Callable[[], Finding | None]]] = {
    "float16 CrossEncoder and fit: NaN": (Cause.SECOND_MOMENT_UNDERFLOW, lambda: fit_in(torch.float16)),
    "bfloat16 CrossEncoder that does not learn": (Cause.UPDATE_LOST, lambda: fit_in(torch.bfloat16)),
    "mask of -1e9 in float16, row fully masked": (Cause.MASKED_ROW, masked_row),
    "sigmoid in bfloat16: everything is 1.0": (Cause.SCORE_TIES, sigmoid_ties),
    "yes minus no in bfloat16: ties": (Cause.SCORE_TIES, yes_no),
    "config's pad id is not the tokenizer's": (Cause.PAD_TOKEN, wrong_pad),
    "NaN label": (Cause.LABEL, nan_label),
    "listwise loss in half precision": (Cause.LOSS_OVERFLOW, listwise_in_half),
}


def main() -> None:
    options = arguments(__doc__ or "")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    rows: dict[str, dict[str, Any]] = {}
    for name, (cause, situation) in SITUATIONS.items():
        finding = situation()
        rows[name] = {
            "expected": cause.value,
            "found": None if finding is None else finding.cause.value,
            "replayed": None if finding is None else finding.replayed,
            "text": str(finding),
        }
        print(f"{'named ' if rows[name]['found'] == cause.value else 'MISSED'}  {name}\n        {finding}")
    named = sum(row["found"] == row["expected"] for row in rows.values())
    bars = {"8 of 8 situations named": named == len(rows) == 8}
    finish("diagnose_reported", options.quick, {"rows": rows}, bars, f"{named} of {len(rows)} named")


if __name__ == "__main__":
    main()
