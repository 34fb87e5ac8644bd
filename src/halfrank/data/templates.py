"""Pairs through a chat template: how instructed rerankers read a query and a document.

Query and document are messages of those two roles, an instruction is the system's. The tokens after the document ask
the question, so a pair that is too long loses the end of its document and never those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfrank.data.tokens import Rows, Tokens, described, in_chunks, joined, private_copy
from halfrank.errors import DataError

FILLERS = ("0", "1 2 3 4")  # they share no token, so what two texts with them end on alike is the template's
PROBES = (("alpha", "beta"), ("gamma", "beta"), ("alpha", "gamma"))


@dataclass(frozen=True)
class Template:
    """Which of a tokenizer's chat templates to use and how to call it.

    `arguments` go to `apply_chat_template`: `chat_template` (a name or the text), `add_generation_prompt` and whatever
    else the template asks for. `structured` templates read texts as lists of parts.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False

    def text(self, tokenizer: Any, pair: tuple[str, str], instruction: str = "") -> str:
        """The pair as the model reads it."""
        return self.texts(tokenizer, [pair], instruction)[0]

    def texts(self, tokenizer: Any, pairs: Sequence[tuple[str, str]], instruction: str = "") -> list[str]:
        """Each pair as the model reads it."""
        opening = [self._message("system", instruction)] if instruction else []
        chats = [[*opening, self._message("query", a), self._message("document", b)] for a, b in pairs]
        return tokenizer.apply_chat_template(chats, tokenize=False, **self.arguments)

    def fault(self, tokenizer: Any) -> str | None:
        """Why this template cannot carry a query and a document, None where it can; found by using it."""
        try:
            base, other_query, other_document = self.texts(tokenizer, PROBES)
        except Exception as error:  # a template is a program of the folder's: it raises what it likes
            return f"it raises {type(error).__name__}: {str(error)[:120]}"
        lost = [role for role, text in (("query", other_query), ("document", other_document)) if text == base]
        return f"the {' and the '.join(lost)} do not reach the text" if lost else None

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}


class TemplateTokenizer:
    """Tokenizes pairs through a template to at most `max_length` tokens; only documents are cut.

    Where a document leaves no room even when it is gone, the end of the query goes too. The tokenizer is copied, as
    PairTokenizer does, and gives the same tokens as transformers' `apply_chat_template`.
    """

    def __init__(self, tokenizer: Any, max_length: int, template: Template, *, instruction: str = "") -> None:
        self.max_length = max_length
        self.instruction = instruction
        self._template = template
        self._typed = "token_type_ids" in tokenizer.model_input_names
        self._fast, self._twin = private_copy(tokenizer)
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.no_truncation()
        self._tails: dict[tuple[str, str], list[int]] = {}
        self._document_last = False
        own = len(self._ids([template.text(self._twin, ("", ""), instruction)])[0])
        if max_length <= own:
            raise DataError(
                f"max_length counts the {own} tokens of the model's template and must leave room for text; "
                f"got {max_length}."
            )
        self._document_last = self._tail("a b c", instruction) == self._tail("d", instruction)

    def encode(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Tokens of `pairs`; `progress` is called with the number of pairs done since the last call.

        `instruction`, the model's own by default, stands where the template puts the system's message; an empty one
        leaves that place to the template. Raises DataError, naming the pair, for what is not text.
        """
        return joined(self.stream(pairs, instruction=instruction), self._typed, progress)

    def stream(self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None) -> Iterator[Tokens]:
        """Tokens of `pairs` as `encode` gives them, some pairs at a time; no more of them are asked for at once."""
        system = self.instruction if instruction is None else instruction
        return in_chunks(pairs, lambda chunk: self._encode(chunk, system), self._typed)

    @property
    def identity(self) -> str:
        """All that decides its tokens: tokenizer, template and length."""
        shown = self._template.texts(self._twin, PROBES, self.instruction)
        template = [repr(self._template), self._twin.chat_template, shown]
        tokens = [described(self._fast, self._twin), self.max_length, self._typed, self.instruction]
        return json.dumps([*tokens, *template])

    def _encode(self, chunk: list[tuple[str, str]], instruction: str) -> Rows:
        for pair in chunk:
            if not all(isinstance(text, str) for text in pair):
                raise TypeError("texts must be str")  # a template would write a number out as if it were text
        rows = self._ids(self._template.texts(self._twin, chunk, instruction))
        long = [index for index, ids in enumerate(rows) if len(ids) > self.max_length]
        for index in long:
            tail = self._tail(chunk[index][0], instruction)[-self.max_length :]
            rows[index] = rows[index][: self.max_length - len(tail)] + tail
        types = [[0] * len(ids) for ids in rows] if self._typed else []
        return Rows(rows, types, [len(ids) for ids in rows], long)

    def _tail(self, query: str, instruction: str) -> list[int]:
        """The tokens that follow the document: the same whatever the document is."""
        key = (FILLERS[0] if self._document_last else query, instruction)
        if key not in self._tails:
            texts = self._template.texts(self._twin, [(key[0], filler) for filler in FILLERS], instruction)
            first, second = self._ids(texts)
            shared = 0
            while shared < min(len(first), len(second)) and first[-1 - shared] == second[-1 - shared]:
                shared += 1
            if len(self._tails) >= 1024:  # templates that put the query last have a tail for each query
                self._tails.clear()
            self._tails[key] = first[len(first) - shared :]
        return self._tails[key]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._fast is not None:
            return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        return self._twin(texts, add_special_tokens=False, padding=False, verbose=False)["input_ids"]
