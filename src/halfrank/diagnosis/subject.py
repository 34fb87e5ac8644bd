"""What is diagnosed, whoever made it: a model, one batch, a loss; computed again the same way as often as needed.

Shapes: P pairs, L labels, M tokens of the longest pair.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfrank.data.packing import Batch, pack
from halfrank.diagnosis.finding import PairReference
from halfrank.diagnosis.recorder import Recording, record
from halfrank.model.families import head_modules
from halfrank.model.scorer import Scorer

TEXT_LENGTH = 80
IGNORED = -100  # the class that torch's losses leave out
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores (P, L), labels (P,), groups (P,) -> scalar


class Part(Protocol):
    """One forward and backward pass of a step; `share` is its part of the whole batch's mean."""

    @property
    def batch(self) -> Batch: ...

    @property
    def labels_P(self) -> Tensor: ...

    @property
    def groups_P(self) -> Tensor: ...

    @property
    def share(self) -> float: ...


@dataclass(frozen=True)
class Labelled:
    """A part made here."""

    batch: Batch
    labels_P: Tensor
    groups_P: Tensor
    share: float


@dataclass(frozen=True)
class Subject:
    """A batch that can be computed again: `scores` (P, L) and, from them, the scalar loss."""

    model: nn.Module
    scores: Callable[[], Tensor]
    loss: Callable[[Tensor], Tensor] | None = None
    labels: Tensor | None = None
    head: frozenset[str] = frozenset()
    check_labels: Callable[[Tensor], None] | None = None  # raises ValueError for labels that the loss cannot take
    rows: tuple[int, ...] = ()  # of each pair in the caller's order
    text_of: Callable[[int], str] = lambda index: ""  # of a pair in this batch
    source_of: Callable[[int], str] = lambda row: ""  # where a row comes from: its file and line
    only: Callable[[Sequence[int]], Subject] | None = None  # the same with some of its pairs
    wide: Callable[[], Any] | None = None  # a context that yields this subject in float32
    scorer: Scorer | None = None
    inputs: Mapping[str, Tensor] | None = None  # padded inputs (P, M), where there are some
    pad_token_id: int | None = None
    true_pad_token_id: int | None = None

    @property
    def narrow(self) -> torch.dtype | None:
        """The 16-bit format that activations take, real or emulated; None for float32."""
        if self.scorer is not None:
            return self.scorer.active_compute.narrow
        dtypes = {p.dtype for p in self.model.parameters() if p.ndim > 1}
        return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in dtypes), None)

    def record(self, *, scale: float = 1.0) -> Recording:
        """One pass under observation, with the random state that the first one had."""
        return record(self.model, self.scores, self.loss, scale=scale)

    def pair(self, index: int) -> PairReference:
        """The pair at `index` of this batch, as the caller counts it."""
        text = self.text_of(index)
        short = text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"
        row = self.rows[index] if self.rows else index
        return PairReference(row, short, self.source_of(row))


def of_scorer(
    scorer: Scorer,
    parts: Sequence[Part],
    loss: Loss | None = None,
    check_labels: Callable[[Tensor], None] | None = None,
    source_of: Callable[[int], str] = lambda row: "",
) -> Subject:
    """The batches of one training step, or of one prediction where there is no loss, through the scorer."""
    repeat = _repeater(scorer.device)

    def scores() -> Tensor:
        repeat()
        return torch.cat([scorer.logits(part.batch) for part in parts])

    def total(values: Tensor) -> Tensor:
        assert loss is not None
        sums = []
        for part, piece in zip(parts, values.split([len(part.batch.rows) for part in parts]), strict=True):
            device = piece.device
            sums.append(loss(piece, part.labels_P.to(device), part.groups_P.to(device)) * part.share)
        return torch.stack(sums).sum()

    def text_of(index: int) -> str:
        for part in parts:
            if index < len(part.batch.rows):
                ids = part.batch.input_ids.split(part.batch.lengths)[index]
                return str(scorer.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
            index -= len(part.batch.rows)
        return ""

    @contextmanager
    def wide() -> Iterator[Subject]:
        with scorer.computing_in("float32"):
            yield subject

    subject = Subject(
        scorer.model,
        scores,
        None if loss is None else total,
        labels=None if loss is None else torch.cat([part.labels_P for part in parts]),
        head=frozenset(head_modules(scorer.model)),
        check_labels=check_labels,
        rows=tuple(row for part in parts for row in part.batch.rows),
        text_of=text_of,
        source_of=source_of,
        only=lambda indices: of_scorer(scorer, _some(parts, indices), loss, check_labels, source_of),
        wide=wide,
        scorer=scorer,
        pad_token_id=scorer.config.pad_token_id,
        true_pad_token_id=scorer.tokenizer.pad_token_id,
    )
    return subject


def of_model(model: Any, batch: Any, loss_fn: Callable[..., Tensor] | None) -> Subject:
    """A batch of anybody's model: see `diagnose` for the forms that a batch has."""
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], Mapping):
        batch = {**batch[0], "labels": None if batch[1] is None else torch.as_tensor(batch[1])}
    if isinstance(batch, Mapping):
        if loss_fn is not None and batch.get("labels") is None:
            raise ValueError(
                "loss_fn(scores, labels) needs labels, and the batch has none: give (mapping, labels), or the mapping "
                'with a "labels" entry. Without loss_fn the scores alone are looked at.'
            )
        return _of_mapping(model, _normal(batch), loss_fn)
    owns_model = isinstance(getattr(loss_fn, "model", None), type(model))
    if owns_model and (lists := _lists(batch)) is not None:
        return _of_lists(model, *lists, loss_fn)
    pairs, labels = _texts(batch)
    if loss_fn is not None and labels is None:
        raise ValueError("loss_fn(scores, labels) needs labels, and the batch has none: give (pairs, labels).")
    if isinstance(scorer := getattr(model, "_scorer", None), Scorer):
        return _of_texts(scorer, pairs, labels, loss_fn)
    subject = _of_features(model, pairs, labels, loss_fn)
    if loss_fn is None or labels is None or not owns_model:
        return subject
    # A loss of sentence-transformers computes the scores itself.
    columns = [list(column) for column in zip(*pairs, strict=True)]
    return replace(
        subject,
        loss=_own_loss(model, loss_fn, columns, labels),
        only=lambda rows: of_model(model, _chosen(pairs, labels, rows), loss_fn),
    )


def _of_lists(
    model: Any, queries: list[str], documents: list[list[str]], labels: list[Tensor], loss_fn: Any
) -> Subject:
    """A listwise step of sentence-transformers: each query with its documents, and a label for each of these."""
    pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
    subject = _of_features(model, pairs, torch.cat(labels), loss_fn)
    return replace(subject, loss=_own_loss(model, loss_fn, [queries, documents], labels), only=None)


def _of_features(
    model: Any, pairs: list[tuple[str, str]], labels: Tensor | None, loss_fn: Callable[..., Tensor] | None
) -> Subject:
    if not hasattr(model, "preprocess"):
        raise TypeError(f"{type(model).__name__} takes no texts: give the batch as a mapping of its input tensors.")
    features = {key: value for key, value in model.preprocess(pairs).items() if isinstance(value, Tensor)}
    return _of_mapping(model, {**features, **({} if labels is None else {"labels": labels})}, loss_fn, pairs)


def _own_loss(model: nn.Module, loss_fn: Any, columns: list[Any], labels: Any) -> Callable[[Tensor], Tensor]:
    repeat = _repeater(_device(model))

    def whole(values: Tensor) -> Tensor:
        repeat()
        found: Tensor = loss_fn(columns, labels)
        return found

    return whole


def _of_texts(
    scorer: Scorer, pairs: list[tuple[str, str]], labels: Tensor | None, loss_fn: Callable[..., Tensor] | None
) -> Subject:
    batch = pack(scorer.pairs.encode(pairs), range(len(pairs)))
    ordered = torch.zeros(len(pairs)) if labels is None else torch.as_tensor(labels)[batch.rows]
    loss = None if loss_fn is None or labels is None else lambda s, y, g: loss_fn(s[:, 0] if s.shape[1] == 1 else s, y)
    subject = of_scorer(scorer, [Labelled(batch, ordered, torch.zeros(len(pairs), dtype=torch.int64), 1.0)], loss)
    checked = _label_check(loss_fn, scorer.num_labels)
    return replace(subject, check_labels=checked, text_of=lambda index: " | ".join(pairs[batch.rows[index]]))


def _of_mapping(
    model: nn.Module,
    batch: dict[str, Any],
    loss_fn: Callable[..., Tensor] | None,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Subject:
    labels = batch.get("labels")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    given = {**inputs, "labels": labels} if loss_fn is None and labels is not None and pairs is None else inputs
    repeat = _repeater(_device(model))
    last: list[Any] = []

    def scores() -> Tensor:
        repeat()
        output = model(dict(given)) if pairs is not None else model(**given)
        last[:] = [output]
        return _scores_of(output)

    def loss(values: Tensor) -> Tensor:
        if loss_fn is None:
            return last[0]["loss"]
        flat = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        return loss_fn(flat, labels)

    @contextmanager
    def wide() -> Iterator[Subject]:
        twin = copy.deepcopy(model).float()
        floats = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        yield _of_mapping(twin, floats, loss_fn, pairs)

    has_loss = labels is not None and (loss_fn is not None or pairs is None)
    config = getattr(model, "config", None)
    count = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)
    body = getattr(model, "base_model_prefix", None)
    return Subject(
        model,
        scores,
        loss if has_loss else None,
        labels=labels,
        head=frozenset(name for name, _ in model.named_children() if body and name != body),
        check_labels=_label_check(loss_fn, getattr(config, "num_labels", None)),
        rows=tuple(range(count)),
        text_of=(lambda index: " | ".join(pairs[index])) if pairs is not None else lambda index: "",
        only=lambda rows: _of_mapping(
            model, _rows_of(batch, rows, count), loss_fn, None if pairs is None else [pairs[row] for row in rows]
        ),
        wide=wide,
        inputs=inputs,
        pad_token_id=getattr(config, "pad_token_id", None),
        true_pad_token_id=getattr(getattr(model, "tokenizer", None), "pad_token_id", None),
    )


def _normal(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with tensors that a backward pass may read, also where they were made in inference mode."""
    return {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in batch.items()}


def _scores_of(output: Any) -> Tensor:
    for name in ("logits", "scores"):
        found = output.get(name) if hasattr(output, "get") else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, Tensor):
        return output
    raise TypeError(f"The model gives neither logits nor scores; got {type(output).__name__}.")


def _texts(batch: Any) -> tuple[list[tuple[str, str]], Tensor | None]:
    texts, labels = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, None)
    pairs: list[Any] = list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else []
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise TypeError(
            'A batch is a mapping of the model\'s input tensors with labels as its "labels", (mapping, labels), or '
            f"(pairs of texts, labels) for a cross-encoder; got {_described(batch)}."
        )
    found = None if labels is None else torch.as_tensor(labels)
    if found is not None and len(found) != len(pairs):
        raise ValueError(f"Every pair has one label; got {len(pairs)} pairs and {len(found)} labels.")
    return [(first, second) for first, second in pairs], found


def _lists(batch: Any) -> tuple[list[str], list[list[str]], list[Tensor]] | None:
    """((queries, documents of each), labels of each), as sentence-transformers' listwise losses take them."""
    columns, labels = batch if isinstance(batch, tuple) and len(batch) == 2 else ((), None)
    if not isinstance(columns, list | tuple) or len(columns) != 2 or labels is None:
        return None
    queries, documents = columns
    if isinstance(queries, str) or isinstance(documents, str) or not len(documents):
        return None
    if not all(isinstance(texts, list | tuple) for texts in documents) or not all(isinstance(q, str) for q in queries):
        return None
    each = [torch.as_tensor(one) for one in labels]
    sizes = [len(texts) for texts in documents]
    if len(queries) != len(sizes) or [len(one) for one in each] != sizes:
        raise ValueError(
            f"Every query has a list of documents and as many labels; got {len(queries)} queries, lists of {sizes} "
            f"documents and of {[len(one) for one in each]} labels."
        )
    return list(queries), [list(texts) for texts in documents], each


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _described(value: Any) -> str:
    inner = f" of {', '.join(type(each).__name__ for each in value)}" if isinstance(value, tuple) else ""
    return f"a {type(value).__name__}{inner}"


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _chosen(pairs: Sequence[tuple[str, str]], labels: Tensor, rows: Sequence[int]) -> Any:
    return [pairs[row] for row in rows], labels[list(rows)]


def _rows_of(batch: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    return {
        key: value[list(rows)] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for key, value in batch.items()
    }


def beyond(labels: Tensor, classes: int) -> Tensor:
    """Which labels (P,) are none of the classes from 0 on, and not left out either."""
    return (labels != IGNORED) & ((labels < 0) | (labels >= classes))


def _label_check(loss_fn: Any, num_labels: int | None) -> Callable[[Tensor], None] | None:
    """What the labels of a known kind of loss must be; None where the loss is not known."""
    if num_labels is not None and num_labels > 1:

        def classes(labels: Tensor) -> None:
            if labels.ndim == 1 and bool(beyond(labels, num_labels).any()):
                raise ValueError(f"the classes of this model are 0 to {num_labels - 1}")

        return classes
    name = str(getattr(loss_fn, "__name__", type(loss_fn).__name__)).lower().replace("_", "")
    if "binarycrossentropy" not in name and "bce" not in name:
        return None

    def probabilities(labels: Tensor) -> None:
        if bool(((labels < 0) | (labels > 1)).any()):
            raise ValueError("binary cross-entropy takes labels from 0 to 1")

    return probabilities


def _some(parts: Sequence[Part], indices: Sequence[int]) -> list[Part]:
    """The pairs at `indices`, counted through all parts, as parts of their own."""
    chosen: list[Part] = []
    start = 0
    for part in parts:
        count = len(part.batch.rows)
        own = sorted(index - start for index in indices if start <= index < start + count)
        start += count
        if own:
            chosen.append(Labelled(part.batch.select(own), part.labels_P[own], part.groups_P[own], part.share))
    return chosen


def _repeater(device: torch.device) -> Callable[[], None]:
    """A function that brings the random state of this moment back."""
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def repeat() -> None:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return repeat


def in_float32(subject: Subject) -> Any:
    """A context that yields the subject computed in float32."""
    return nullcontext(subject) if subject.wide is None else subject.wide()
