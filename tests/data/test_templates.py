"""Pairs through chat templates: transformers' own tokens, and never the question after the document is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from halfrank.data.templates import Template, TemplateTokenizer
from halfrank.errors import DataError
from tiny import PAIRS, byte_tokenizer

ROLES = (
    '{% set q = (messages | selectattr("role", "eq", "query") | first).content %}'
    '{% set d = (messages | selectattr("role", "eq", "document") | first).content %}'
    '{% set s = messages | selectattr("role", "eq", "system") | map(attribute="content") | first %}'
)
ASKING = ROLES + "{{ '<|im_start|>' ~ (s or 'Judge.') ~ ' Q: ' ~ q ~ ' D: ' ~ d ~ '\\nRelevant? <|im_end|>answer' }}"
DOCUMENT_FIRST = ROLES + "{{ 'D: ' ~ d ~ ' Q: ' ~ q ~ ' Relevant?' }}"
STRUCTURED = (
    '{% for m in messages %}{{ m.role ~ ": " }}{% for part in m.content %}{{ part.text }}{% endfor %}; {% endfor %}end'
)


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rows(tokens: Any) -> list[list[int]]:
    return [tokens.input_ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


@pytest.mark.parametrize("instruction", ["", "Find facts."])
@pytest.mark.parametrize(("template", "structured"), [(ASKING, False), (DOCUMENT_FIRST, False), (STRUCTURED, True)])
def test_tokens_are_those_of_transformers(template: str, structured: bool, instruction: str) -> None:
    tokenizer = tokenizer_with(template)
    made = TemplateTokenizer(tokenizer, 512, Template({}, structured)).encode(PAIRS, instruction=instruction)
    content = (lambda text: [{"type": "text", "text": text}]) if structured else (lambda text: text)
    for (query, document), ids in zip(PAIRS, rows(made), strict=True):
        chat = [{"role": "system", "content": content(instruction)}] if instruction else []
        chat += [{"role": "query", "content": content(query)}, {"role": "document", "content": content(document)}]
        assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
    assert made.truncated == 0


@pytest.mark.parametrize("template", [ASKING, DOCUMENT_FIRST])
def test_only_the_document_is_cut(template: str) -> None:
    tokenizer = tokenizer_with(template)
    query, document = "what is it", "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    (whole,) = rows(TemplateTokenizer(tokenizer, 512, Template()).encode([(query, document)]))
    before, after = tokenizer.decode(whole).split(document)
    for cut in (1, 5, 20):
        made = TemplateTokenizer(tokenizer, len(whole) - cut, Template()).encode([(query, document), (query, "a")])
        assert made.truncated == 1
        (ids, short) = rows(made)
        assert len(ids) == len(whole) - cut
        text = tokenizer.decode(ids)
        assert text.startswith(before)
        assert text.endswith(after)
        assert document.startswith(text[len(before) : -len(after)])
        assert tokenizer.decode(short) == f"{before}a{after}"


def test_a_query_that_fills_all_room_is_cut_after_the_document() -> None:
    tokenizer = tokenizer_with(ASKING)
    own = len(tokenizer(Template().text(tokenizer, ("", "")))["input_ids"])
    made = TemplateTokenizer(tokenizer, own + 12, Template()).encode([("very " * 40, "never seen")])
    (ids,) = rows(made)
    assert len(ids) == own + 12
    assert tokenizer.decode(ids).endswith("\nRelevant? <|im_end|>answer")
    assert "never" not in tokenizer.decode(ids)


def test_without_the_rust_tokenizer_the_tokens_are_the_same() -> None:
    tokenizer = tokenizer_with(ASKING)
    fast = TemplateTokenizer(tokenizer, 40, Template())
    slow = copy.copy(fast)
    slow._fast, slow._tails = None, {}
    assert rows(slow.encode(PAIRS)) == rows(fast.encode(PAIRS))


def test_what_is_no_text_is_named() -> None:
    made = TemplateTokenizer(tokenizer_with(ASKING), 64, Template())
    with pytest.raises(DataError, match=r"pair 1 \(counted from 0\) holds what is not valid text"):
        made.encode([("a", "b"), ("a", 3)])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"pair 1 \(counted from 0\) holds what is not valid text"):
        made.encode([("a", "b"), ("a", "\ud800")])
    assert len(made.encode([])) == 0


def test_max_length_must_hold_the_template() -> None:
    with pytest.raises(DataError, match=r"tokens of the model's template and must leave room for text; got 8"):
        TemplateTokenizer(tokenizer_with(ASKING), 8, Template())


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ROLES + "{{ q }}", "the document do not reach"),
        ("{{ messages | length }}", "the query and the document do not reach"),
        ("{{ raise_exception('only users') }}", "it raises TemplateError: only users"),
        (ASKING, None),
    ],
)
def test_a_template_that_loses_a_text_is_found(template: str, why: str | None) -> None:
    fault = Template().fault(tokenizer_with(template))
    assert (fault is None) if why is None else why in (fault or "")
