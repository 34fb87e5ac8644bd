"""Texts are checked where they enter, with the place they came from."""

from __future__ import annotations

import pytest

import halfrank
from halfrank.data.pairs import InputExample, Pair, check_text, check_type
from halfrank.errors import DataError


@pytest.mark.parametrize("value", [None, 3, 2.5, float("nan"), b"bytes", ["a"]])
def test_what_is_not_text_is_refused(value):
    with pytest.raises(DataError, match=rf"^train.jsonl:3: expected text, got {type(value).__name__} "):
        check_type(value, "train.jsonl:3")


@pytest.mark.parametrize("value", ["", "  ", "\n\t", "\u00a0"])
def test_empty_text_is_refused_where_text_is_needed(value):
    assert check_type(value, "here") == value
    with pytest.raises(DataError, match=r"^train\.csv:9: the text is empty\. Remove the row or fill it in\.$"):
        check_text(value, "train.csv:9")


def test_text_stays_as_it_is():
    assert check_text("  two  spaces ", "here") == "  two  spaces "


def test_pairs_are_values():
    assert Pair("a", "b", 1) == Pair("a", "b", 1)
    with pytest.raises(AttributeError):
        Pair("a", "b").label = 2


def test_input_example_as_older_scripts_build_it():
    assert halfrank.InputExample is InputExample
    example = InputExample(texts=["a", "b"], label=0.5)
    assert (example.guid, example.texts, example.label) == ("", ["a", "b"], 0.5)
    assert InputExample("7", ["a"], 1).guid == "7"
