"""What a copy must share with its reference beside weights: architecture, labels, activation, tokenizer, pad token.

Read from the folders as other tools read them, before halfrank mends anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from halfrank.certify.certificate import Reason
from halfrank.model import folder
from halfrank.model.folder import quiet
from halfrank.model.scorer import Scorer

# Keys that say how a model is stored or made, not what it computes.
STORAGE_KEYS = {
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "keep_in_fp32_modules",
    "sentence_transformers", "sbert_ce_default_activation_function", "use_cache", "quantization_config",
    "problem_type", "_attn_implementation", "_attn_implementation_internal", "attn_implementation", "output_attentions",
    "output_hidden_states", "return_dict", "gradient_checkpointing", "max_length", "finetuning_task",
}  # fmt: skip
APART = {"id2label", "label2id", "num_labels", "pad_token_id"}  # compared by rules of their own
SPECIAL = ("pad_token", "cls_token", "sep_token", "unk_token", "bos_token", "eos_token", "mask_token")
SHOWN = 4


def differing(
    reference: Scorer, copy: Scorer, folders: tuple[str, str], texts: Sequence[tuple[str, str]]
) -> Iterator[Reason]:
    """Everything beside weights that makes the copy score differently; `folders` are the reference's and copy's."""
    with quiet():
        places = [folder.base_of(place) for place in folders]
        configs = [AutoConfig.from_pretrained(place).to_dict() for place in places]
        tokenizers = [
            AutoTokenizer.from_pretrained(own if (Path(own) / "tokenizer_config.json").exists() else base)
            for own, base in zip(folders, places, strict=True)
        ]
    yield from _configurations(*configs)
    yield from _labels(*(_named(c, s.num_labels) for c, s in zip(configs, (reference, copy), strict=True)))
    yield from _pad_tokens(configs, tokenizers)
    yield from _tokenizers(*tokenizers)
    yield from _tokens(reference, copy, texts)
    if reference.activation != copy.activation:
        yield Reason(
            "activation",
            "config_sentence_transformers.json",
            f"The copy's activation is {_last(copy.activation)}, the reference's {_last(reference.activation)}. "
            "Set activation_fn to the reference's.",
        )
    if reference.max_length != copy.max_length:
        yield Reason(
            "max-length",
            "tokenizer_config.json",
            f"The copy cuts pairs at {copy.max_length} tokens, the reference at {reference.max_length}.",
        )
    lost = [name for name in reference.islands if name not in copy.islands]
    if lost and copy.precision.storage.itemsize < 4:
        yield Reason(
            "islands",
            lost[0],
            f"The reference keeps {_listed(lost)} in float32 and the copy does not: record them again "
            "(halfrank certify --repair does).",
        )


def _configurations(reference: dict[str, Any], copy: dict[str, Any]) -> Iterator[Reason]:
    keys = sorted((reference.keys() | copy.keys()) - STORAGE_KEYS - APART)
    apart = [key for key in keys if reference.get(key) != copy.get(key)]
    if apart:
        said = "; ".join(f"{key} is {copy.get(key)!r:.60}, not {reference.get(key)!r:.60}" for key in apart[:SHOWN])
        yield Reason("architecture", "config.json", f"The copy computes something else: {said}.")


def _named(config: dict[str, Any], count: int) -> dict[int, str]:
    """The names of the labels that there are: a causal config names two, whatever its yes/no score is."""
    return {int(key): str(name) for key, name in (config.get("id2label") or {}).items() if int(key) < count}


def _labels(wanted: dict[int, str], found: dict[int, str]) -> Iterator[Reason]:
    if wanted == found:
        return
    same = sorted(wanted.values()) == sorted(found.values())
    what = "the same labels in another order" if same else "other labels"
    yield Reason(
        "labels", "config.json", f"The copy has {what}: {found} where the reference has {wanted} (label by column)."
    )


def _pad_tokens(configs: Sequence[dict[str, Any]], tokenizers: Sequence[Any]) -> Iterator[Reason]:
    stored, own = configs[1].get("pad_token_id"), tokenizers[1].pad_token_id
    wanted = tokenizers[0].pad_token_id
    if own is not None and stored != own and not (stored is None and configs[0].get("pad_token_id") is None):
        yield Reason(
            "pad-token",
            "config.json",
            f"The copy's config says pad_token_id {stored}, its tokenizer {own}: others would read padding as text.",
        )
    if wanted is not None and own != wanted:
        yield Reason("pad-token", "tokenizer_config.json", f"The copy's tokenizer pads with {own}, not {wanted}.")


def _tokenizers(reference: Any, copy: Any) -> Iterator[Reason]:
    wanted, found = reference.get_vocab(), copy.get_vocab()
    if wanted != found:
        absent = [token for token in wanted if token not in found]
        moved = sum(found.get(token, place) != place for token, place in wanted.items())
        yield Reason(
            "tokenizer",
            "tokenizer.json",
            f"The copy's vocabulary has {len(found)} tokens, the reference's {len(wanted)}: {len(absent)} are missing "
            f"({_listed(absent)}), {moved} have another number. Copy the reference's tokenizer files.",
        )
        return
    names = [n for n in SPECIAL if n != "pad_token" and getattr(reference, n, None) != getattr(copy, n, None)]
    if names:
        said = ", ".join(f"{n} {getattr(copy, n, None)!r} for {getattr(reference, n, None)!r}" for n in names)
        yield Reason("tokenizer", "tokenizer_config.json", f"The copy has other special tokens: {said}.")


def _tokens(reference: Scorer, copy: Scorer, texts: Sequence[tuple[str, str]]) -> Iterator[Reason]:
    if reference.max_length != copy.max_length:
        return  # said by its own rule
    wanted, found = reference.pairs.encode(texts), copy.pairs.encode(texts)
    same = np.array_equal(wanted.input_ids, found.input_ids) and (
        wanted.token_type_ids is None
        or found.token_type_ids is None
        or np.array_equal(wanted.token_type_ids, found.token_type_ids)
    )
    typed = (wanted.token_type_ids is None) == (found.token_type_ids is None)
    if not (same and typed):
        what = "reads the same texts as other tokens" if not same else "leaves out or adds segment numbers"
        yield Reason(
            "tokenizer", "tokenizer.json", f"The copy's tokenizer {what}. Copy the reference's tokenizer files."
        )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
