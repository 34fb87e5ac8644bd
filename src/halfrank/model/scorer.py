"""A cross-encoder ready to compute: batch of packed pairs in, float32 logits out.

Shapes: P pairs, L labels, T tokens of all pairs in one row, M tokens of the longest pair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfrank.data.packing import Batch, pack
from halfrank.data.tokens import PairTokenizer
from halfrank.errors import NonFiniteWeightError
from halfrank.model import attention, storage
from halfrank.model.families import family_of, head_modules, position_offset
from halfrank.numerics.formats import dtype_name
from halfrank.numerics.rounding import join
from halfrank.precision import Compute, Precision, compute_named

log = logging.getLogger("halfrank")
# Largest |packed - padded| over the largest |logit|: float32 sums in another order stay below, a wrong mask above.
PACKING_TOLERANCE = 1e-4
IDENTITY = "torch.nn.modules.linear.Identity"
PROBES = [
    ("what does a probe ask", "It asks whether packed pairs and padded pairs score alike, whatever their lengths are."),
    ("short", "one"),
    ("another question of a middle length", "An answer that is neither the longest nor the shortest of the three."),
]


class Scorer:
    """A sequence-classification model, its tokenizer and its precision; it *has* a model and never subclasses one."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: Precision, *, max_length: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.notes: list[str] = []
        self._residuals: dict[str, Tensor] = {}
        self.untrained_head = False
        self._max_length = max_length
        self._detach: Callable[[], None] = lambda: None
        self.pairs = PairTokenizer(tokenizer, max_length)
        self.activation = "torch.nn.modules.activation.Sigmoid" if self.num_labels == 1 else IDENTITY
        self.family = family_of(model)
        self.compute_in(compute_named("float32"))
        if self.family is not None:
            self._prove_packing()
        self.compute_in(precision.compute)

    @property
    def packed(self) -> bool:
        """True where pairs run end to end in one row, without padding."""
        return self.family is not None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def residuals(self) -> dict[str, Tensor]:
        """Int8 tensors by parameter name: what 16-bit rounding dropped in training, part of the weights that train."""
        return self._residuals

    @residuals.setter
    def residuals(self, values: dict[str, Tensor]) -> None:
        # The modules hold this very dictionary, so it is filled anew and not replaced.
        kept = dict(values)
        self._residuals.clear()
        self._residuals.update(kept)

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Longest pair in tokens; longer ones are truncated."""
        return self._max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self._max_length = value
        self.pairs = PairTokenizer(self.tokenizer, value)

    @property
    def compute(self) -> Compute:
        return self.precision.compute

    def note(self, text: str) -> None:
        """Announce a fact that the user should know, once, and keep it for reports."""
        self.notes.append(text)
        log.warning(text)

    def compute_in(self, compute: Compute) -> None:
        """Switch the compute format; weights stay as they are stored."""
        self._detach()
        self._compute = compute
        self._detach = storage.attach(self.model, compute, head_modules(self.model), self.residuals)

    @contextmanager
    def computing_in(self, name: str) -> Iterator[None]:
        """Compute in another format for a while."""
        before = self._compute
        self.compute_in(compute_named(name))
        try:
            yield
        finally:
            self.compute_in(before)

    def adopt(self, precision: Precision) -> None:
        """Change storage and compute, in place; raises NonFiniteWeightError for weights beyond the new range."""
        if precision.storage is torch.float32:
            self._join_residuals()
        refuse_out_of_range(self.model, precision.storage)
        storage.narrow_storage(self.model, precision.storage, head_modules(self.model))
        self.precision = precision
        self.residuals.clear()
        self.compute_in(precision.compute)

    def _join_residuals(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.residuals:
                parameter.data = join(parameter.detach(), self.residuals[name])

    def to(self, device: str | torch.device) -> None:
        """Move weights to another device, in place."""
        self.model.to(device)

    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits (P, L) in the batch's order, before any activation; non-finite values are not hidden."""
        batch = batch.to(self.device)
        return (self._packed_logits(batch) if self.packed else self._padded_logits(batch)).float()

    def _packed_logits(self, batch: Batch) -> Tensor:
        assert self.family is not None
        lengths = torch.tensor(batch.lengths, device=self.device)
        starts = lengths.cumsum(0) - lengths
        positions = torch.arange(int(lengths.sum()), device=self.device) - starts.repeat_interleave(lengths)
        inputs: dict[str, Any] = {"position_ids": (positions + position_offset(self.model, self.family))[None]}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[None]
        if self.family.pooled == "last":
            inputs["use_cache"] = False  # a decoder would otherwise keep every key and value of the row
        hidden_TD = self.model.base_model(
            input_ids=batch.input_ids[None],
            attention_mask=None,
            packed_runs=attention.runs_of(batch.lengths, self._compute.rounds_to),
            **inputs,
        ).last_hidden_state[0]
        pooled = starts if self.family.pooled == "first" else starts + lengths - 1
        return self.family.head(self.model, hidden_TD[pooled])

    def _padded_logits(self, batch: Batch) -> Tensor:
        rows = batch.input_ids.split(batch.lengths)
        inputs = {"input_ids": _padded(rows, self.tokenizer.pad_token_id or 0)}
        inputs["attention_mask"] = _padded([torch.ones_like(row) for row in rows], 0)
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = _padded(batch.token_type_ids.split(batch.lengths), 0)
        return self.model(**inputs).logits

    def _prove_packing(self) -> None:
        """Take the packed path only if it scores three pairs of different lengths as the padded path does."""
        usual = self.model.config._attn_implementation
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        batch = pack(self.pairs.encode(PROBES), range(len(PROBES))).to(self.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            packed, padded = self._packed_logits(batch), self._padded_logits(batch)
        self.model.train(training)
        allowed = PACKING_TOLERANCE * max(padded.abs().max().item(), 1e-3)
        if not (packed - padded).abs().max().item() <= allowed:
            self.family = None
            self.model.set_attn_implementation(usual)
            self.note("Packed and padded scores of three probe pairs differ: this model takes the padded path.")


def refuse_out_of_range(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise NonFiniteWeightError, naming each tensor, if `dtype` cannot hold a weight that is to rest in it."""
    largest = torch.finfo(dtype).max
    beyond = [
        f"'{name}' has {int((p.detach().abs() > largest).sum())} values above {largest:g} "
        f"(max {p.detach().abs().max():g})"
        for name, p in model.named_parameters()
        if p.detach().abs().max() > largest
    ]
    if beyond:
        raise NonFiniteWeightError(
            f"{dtype_name(dtype)} cannot hold these weights: {'; '.join(beyond[:5])}. Use bfloat16 or float32."
        )


def _padded(rows: list[Tensor] | tuple[Tensor, ...], filler: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)
