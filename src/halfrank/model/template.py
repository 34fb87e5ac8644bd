"""Which chat template a folder means for a pair of texts: its own, or that of a published kind of reranker.

A template text is part of a checkpoint like its weights: the wording below is what these models were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfrank.data.templates import Template
from halfrank.errors import ModelError

PLAIN = "plain"
OWN_NAME = "reranker"  # under which a built-in template is kept beside a tokenizer's own
SIZES = (
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "restore_suffix",
)  # of the peer, no template's business

_PAIR = """\
{%- set asked = (messages | selectattr("role", "eq", "query") | first).content -%}
{%- set text = (messages | selectattr("role", "eq", "document") | first).content -%}
{%- set told = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}
"""


@dataclass(frozen=True)
class Kind:
    """A published kind of yes/no reranker: its template, its answers, and what its folders are called."""

    template: str
    yes: str
    no: str | None
    called: str


KINDS = {
    "qwen3": Kind(
        _PAIR
        + """\
{{- '<|im_start|>system\\nJudge whether the Document meets the requirements based on the Query and the Instruct \
provided. Note that the answer can only be "yes" or "no".<|im_end|>\\n<|im_start|>user\\n<Instruct>: ' -}}
{{- told or 'Given a web search query, retrieve relevant passages that answer the query' -}}
{{- '\\n<Query>: ' ~ asked ~ '\\n<Document>: ' ~ text -}}
{{- '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}
""",
        "yes",
        "no",
        "qwen3-reranker",
    ),
    "mxbai": Kind(
        _PAIR
        + """\
{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n\
<|im_start|>user\\n' -}}
{{- ('instruction: ' ~ told ~ '\\n') if told else '' -}}
{{- 'query: ' ~ asked ~ '\\ndocument: ' ~ text -}}
{{- '\\nYou are a search relevance expert who evaluates how well documents match search queries. For each \
query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance \
judgment (0 for not relevant, 1 for relevant).\\nRelevance:<|im_end|>\\n<|im_start|>assistant\\n' -}}
""",
        "1",
        "0",
        "mxbai-rerank",
    ),
    "bge": Kind(
        _PAIR
        + """\
{{- bos_token ~ 'A: ' ~ asked ~ '\\nB: ' ~ text ~ '\\n' -}}
{{- told or "Given a query A and a passage B, determine whether the passage contains an answer to the query by \
providing a prediction of either 'Yes' or 'No'." -}}
""",
        "Yes",
        None,
        "bge-reranker-v2-gemma",
    ),
}


def check_name(name: str | None) -> None:
    """Raise ValueError for a template that is not built in."""
    if name is not None and name != PLAIN and name not in KINDS:
        raise ValueError(f"template must be {', '.join(KINDS)} or {PLAIN}; got {name!r}.")


def stored_template(settings: Mapping[str, Any], modular: bool, tokenizer: Any) -> Template | None:
    """The template that a folder means, None where pairs are read without one.

    `settings` is what stands in sentence_bert_config.json, `modular` whether there is a modules.json: a folder without
    one means its chat template if that carries a query and a document. Raises ModelError for a template that does not.
    """
    if not modular:
        return inferred_template(tokenizer)
    message = settings.get("modality_config", {}).get("message")
    if message is None:
        return None
    given = settings.get("processing_kwargs", {}).get("chat_template", {})
    arguments = {name: value for name, value in given.items() if name not in SIZES}
    layouts = {"structured": [True], "flat": [False]}.get(message.get("format", "auto"), [False, True])
    candidates = [Template(arguments, structured) for structured in layouts]
    faults = [template.fault(tokenizer) for template in candidates]
    if None not in faults:
        raise ModelError(
            f"The folder's chat template cannot carry a pair: {faults[0]}. It must put out the content of the messages "
            "with the roles query and document; mend chat_template.jinja."
        )
    return candidates[faults.index(None)]


def inferred_template(tokenizer: Any) -> Template | None:
    """The tokenizer's chat template if it carries a query and a document."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    candidates = (Template({}, structured) for structured in (False, True))
    return next((template for template in candidates if template.fault(tokenizer) is None), None)


def built_in(name: str, tokenizer: Any) -> Template:
    """Make a built-in template one of `tokenizer`'s, in place, beside those that it has."""
    text, before = KINDS[name].template, tokenizer.chat_template
    if not before:
        tokenizer.chat_template = text
        return Template()
    others = before if isinstance(before, dict) else {"default": before}
    tokenizer.chat_template = {**others, OWN_NAME: text}
    return Template({"chat_template": OWN_NAME})


def published_kind(source: str) -> str | None:
    """The kind that a folder or repository is called after, whatever its case."""
    return next((name for name, kind in KINDS.items() if kind.called in source.lower()), None)


def answer_ids(tokenizer: Any, yes: str, no: str | None) -> tuple[int, int | None]:
    """Places of the answers in the vocabulary; raises ModelError for a word that is no token of its own."""
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in (yes, no) if word is not None and word not in vocabulary]
    if missing:
        raise ModelError(
            f"The vocabulary has no token {missing[0]!r}, which a yes/no score reads. Choose the template of another "
            "kind (template='mxbai' answers 1 and 0), or pass num_labels=1 for a new score head."
        )
    return vocabulary[yes], None if no is None else vocabulary[no]
