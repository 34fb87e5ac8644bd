"""Every architecture that transformers registers for sequence classification, built tiny: packed, padded or refused?

Each is scored by halfrank and, from a second copy with the same weights, by transformers itself, one pair at a time
and so without any padding. "Right" is a largest difference of 1e-5 of the largest score, gradients alike.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

from common import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from halfrank.data.packing import pack
from halfrank.errors import HalfrankError
from halfrank.model.scorer import Scorer
from halfrank.precision import Facts, choose, detect
from tiny import PAIRS, tokenizer_for

BAR = 1e-5
LARGEST = 30_000_000  # parameters: what stays larger is not tiny and is counted as not built
# Names that configuration classes use for the same sizes.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner", "d_ff"], 64),
    **dict.fromkeys(["hidden_dim", "d_inner"], 64),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 96),
    **dict.fromkeys(["head_dim", "d_head", "d_kv", "rotary_dim"], 8),
    **dict.fromkeys(["pad_token_id", "decoder_start_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "cls_token_id"], 1),
    **dict.fromkeys(["eos_token_id", "sep_token_id"], 2),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 300,
    "num_labels": 1,
}
LATENT = {
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    "num_key_value_heads": 4,
    "head_dim": None,
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"], LATENT),
    "falcon": {"head_dim": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lilt": {"hidden_size": 48, "max_2d_position_embeddings": 96},
    "reformer": {"axial_pos_shape": [8, 12], "axial_pos_embds_dim": [16, 16]},
    "t5": {"decoder_start_token_id": 0},
    "xlnet": {"max_position_embeddings": None},
    "zamba": {"num_hidden_layers": None},
    "zamba2": {"num_hidden_layers": None},
}


@dataclass(frozen=True)
class Row:
    """One architecture: how it is scored, the errors found, and the reason where it is refused or not built."""

    name: str
    path: str  # packed, padded, by length, refused, not built
    scores: float = 0.0
    gradients: float = 0.0
    reason: str = ""

    @property
    def right(self) -> bool:
        return self.path in ("packed", "padded", "by length") and max(self.scores, self.gradients) <= BAR

    @property
    def wrong(self) -> bool:
        return self.path in ("packed", "padded", "by length") and not self.right


def built(name: str, labels: int = 1) -> PreTrainedModel:
    plain = AutoConfig.for_model(name)
    wanted = (
        {key: value for key, value in SMALL.items() if hasattr(plain, key)} | {"num_labels": labels} | OWN.get(name, {})
    )
    config = AutoConfig.for_model(name, **{key: value for key, value in wanted.items() if value is not None})
    if not hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = 0
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForSequenceClassification.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} M parameters even in its tiny form")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # larger weights: fresh ones score all pairs nearly alike
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02)
    return model


def gradient(model: PreTrainedModel, scores: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    scores.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def look(name: str) -> Row:
    try:
        model, reference = built(name), built(name)
    except Exception as error:  # whatever a foreign configuration raises is the row's reason
        return Row(name, "not built", reason=first_line(error))
    types = getattr(model.config, "type_vocab_size", 2)
    tokenizer = tokenizer_for("bert")
    if not isinstance(types, int) or types < 2:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    count = sum(p.numel() for p in model.parameters())
    precision = choose(Facts(count, torch.float32, detect("cpu")), scheme="float32", compute="float32")
    try:
        scorer = Scorer(model, tokenizer, precision, max_length=64)
    except HalfrankError as error:
        return Row(name, "refused", reason=first_line(error))
    path = "packed" if scorer.packed else "padded" if scorer.pads else "by length"
    batch = pack(scorer.pairs.encode(PAIRS), range(12))
    ours = scorer.logits(batch)
    alone = [reference(**tokenizer(*PAIRS[row], return_tensors="pt")).logits for row in batch.rows]
    theirs = torch.cat(alone)
    scores = float((ours - theirs).abs().max() / theirs.abs().max())
    try:
        a, b = gradient(model, ours), gradient(reference, theirs)
    except (AssertionError, RuntimeError) as error:
        return Row(name, path, scores, reason=f"gradients not compared: {first_line(error)}")
    return Row(name, path, scores, float((a - b).abs().max() / b.abs().max()) if a.shape == b.shape else float("inf"))


def first_line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:110]}"


def survey() -> list[Row]:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("halfrank").setLevel(logging.ERROR)
    return [look(name) for name in sorted(NAMES)]


def page(rows: list[Row]) -> str:
    """The table of `docs/families.md`."""
    counts = {path: sum(row.path == path for row in rows) for path in ("packed", "padded", "by length", "refused")}
    counts["not built"] = sum(row.path == "not built" for row in rows)
    lines = [
        "# Families",
        "",
        f"Every architecture that transformers {transformers.__version__} registers for sequence classification, built",
        "with tiny random weights and scored by halfrank and, one pair at a time, by transformers itself. Written by",
        "`benchmarks/packing.py`; do not edit.",
        "",
        f"{sum(row.right for row in rows)} are right, scores and gradients within {BAR:g} of the largest:",
        f"{counts['packed']} packed, {counts['padded']} padded, {counts['by length']} batched by equal length because",
        f"they do not ignore padding. {sum(row.wrong for row in rows)} are wrong. {counts['refused']} are refused with",
        f"a reason, {counts['not built']} do not build from a tiny configuration or need another package.",
        "",
        "| architecture | path | scores | gradients | reason |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        measured = f"{row.scores:.1e} | {row.gradients:.1e}" if row.path not in ("refused", "not built") else " | "
        lines.append(f"| {row.name} | {row.path} | {measured} | {row.reason} |")
    return "\n".join(lines) + "\n"
