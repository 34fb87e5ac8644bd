"""Tiny random models of each family with a real tokenizer, saved as ordinary folders: made here, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "How many people live in Berlin?",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "A man is playing a large flute, and two boys on a couch are watching him.",
    "The quick brown fox jumps over the lazy dog while it rains in the mountains.",
    "Rounding to nearest loses small updates; stochastic rounding keeps them on average.",
    "what is the capital of france", "Paris is the capital and most populous city of France.",
    "I am happy", "I am sad", "One.", "A woman measures another woman's ankle with a yellow tape.",
]  # fmt: skip
PAIRS = [(SENTENCES[i % 11], SENTENCES[(3 * i + 1) % 11]) for i in range(24)]
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 64, "max_position_embeddings": 96},
    "roberta": {"intermediate_size": 64, "max_position_embeddings": 96, "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": {"intermediate_size": 64, "max_position_embeddings": 96, "type_vocab_size": 1, "pad_token_id": 1},
    "albert": {"intermediate_size": 64, "max_position_embeddings": 96, "embedding_size": 16},
    "llama": {"intermediate_size": 64, "max_position_embeddings": 96, "num_key_value_heads": 2},
    "mpnet": {"intermediate_size": 64, "max_position_embeddings": 96, "pad_token_id": 1},
    "deberta-v2": {
        "intermediate_size": 64, "max_position_embeddings": 96, "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    },
}  # fmt: skip
# Families of some tests only: each test of all of `SIZES` would take them too.
MORE_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 64, "max_position_embeddings": 96},
    "electra": {"intermediate_size": 64, "max_position_embeddings": 96, "embedding_size": 16},
    "modernbert": {
        "intermediate_size": 64, "max_position_embeddings": 96, "local_attention": 8, "global_attn_every_n_layers": 2,
        "pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2,
    },
}  # fmt: skip

BERT_LIKE = ("bert", "albert", "deberta-v2", "distilbert", "electra", "modernbert")  # [CLS] a [SEP] b [SEP]
UNTYPED = ("distilbert", "modernbert")  # whose tokenizers number no segments


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """A small WordPiece tokenizer trained on `SENTENCES`, with the special tokens of the family."""
    first, last = ("[CLS]", "[SEP]") if family in BERT_LIKE else ("<s>", "</s>")
    padding = "[PAD]" if family in BERT_LIKE else "<pad>"
    # Families with pad_token_id 1 expect the start token at 0.
    special = (
        [padding, first, last, "[UNK]"] if _sizes(family).get("pad_token_id") != 1 else [first, padding, last, "[UNK]"]
    )
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    ids = [(token, raw.token_to_id(token)) for token in (first, last)]
    if family == "llama":
        raw.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=ids
        )
    else:
        middle = last if family in BERT_LIKE else f"{last} {last}"
        second = ":1" if family in BERT_LIKE else ":0"
        tail = " ".join(f"{part}{second}" for part in ("$B", last))
        raw.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {middle} {tail}", special_tokens=ids
        )
    names = ["input_ids", "attention_mask"] + (
        ["token_type_ids"] if family in BERT_LIKE and family not in UNTYPED else []
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=None if family == "llama" else padding, unk_token="[UNK]", cls_token=first,
        sep_token=last, bos_token=first, eos_token=last, model_max_length=64, model_input_names=names,
    )  # fmt: skip


def make_folder(family: str, folder: Path, *, num_labels: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Save a two-layer, 32-wide model of `family` with seeded random weights large enough to make scores differ."""
    tokenizer = tokenizer_for(family)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_labels=num_labels, **_sizes(family),
    )  # fmt: skip
    if family == "llama":
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    else:
        config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(config)
    _spread(model)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with ChatML's special tokens, and yes and no as tokens of their own."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        )
    )  # fmt: skip
    raw.add_tokens(["yes", "no", "Yes", "No"])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<bos>", model_max_length=512
    )


def make_causal_folder(
    family: str, folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32,
    chat_template: str | dict[str, str] | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """Save a two-layer, 32-wide causal language model with seeded random weights, as transformers does."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        tie_word_embeddings=tied, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, **settings,
    )  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    _spread(model)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_body_folder(family: str, folder: Path) -> Path:
    """Save a tiny body without any head, as modular folders are made from."""
    tokenizer = tokenizer_for(family if family in SIZES else "bert")
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        **SIZES.get(family, {"intermediate_size": 64, "max_position_embeddings": 96}),
    )  # fmt: skip
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(7)
    model = AutoModel.from_config(config)
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _sizes(family: str) -> dict[str, Any]:
    return SIZES[family] if family in SIZES else MORE_SIZES[family]


def _spread(model: torch.nn.Module) -> None:
    # Large enough that scores differ.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
