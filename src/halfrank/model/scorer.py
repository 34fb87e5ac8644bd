"""A cross-encoder ready to compute: batch of packed pairs in, float32 logits out.

Shapes: P pairs, L labels, T tokens of all pairs in one row, M tokens of the longest pair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halfrank.data.branches import Branches, branched
from halfrank.data.packing import Batch, pack
from halfrank.data.templates import Template, TemplateTokenizer
from halfrank.data.tokens import NONE, Encoder, PairTokenizer, Tokens, starts
from halfrank.errors import ModelError, NonFiniteWeightError
from halfrank.model import attention, storage
from halfrank.model.adapters import Adapters, Origin
from halfrank.model.backends import Engine
from halfrank.model.checkpointing import recompute
from halfrank.model.families import (
    Layout,
    accept_rows,
    head_modules,
    inputs_of,
    layouts,
    row_of,
    row_of_branches,
    without_cache,
)
from halfrank.model.modular import Model
from halfrank.numerics.formats import dtype_name, largest
from halfrank.numerics.rounding import join
from halfrank.precision import Compute, Precision, compute_named

log = logging.getLogger("halfrank")
# Largest |packed - padded| over the largest |logit|: float32 sums in another order stay below, a wrong mask above.
PACKING_TOLERANCE = 1e-4
PADDING_TOLERANCE = 1e-6  # the same sums in the same order: what is masked adds exact zeros
# What a class raises that does not take the inputs it is given.
MISFITS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)
IDENTITY = "torch.nn.modules.linear.Identity"
BEGINNING = 12  # tokens of the beginning that probes share
PROBES = [
    ("what does a probe ask", "It asks whether packed pairs and padded pairs score alike, whatever their lengths are."),
    ("short", "one"),
    ("another question of a middle length", "An answer that is neither the longest nor the shortest of the three."),
]


class Scorer:
    """A sequence-classification model, its tokenizer and its precision; it *has* a model and never subclasses one.

    With an `engine` a graph computes the logits, and the model is a shape without weights, for its names and settings.
    With a `template` pairs are read through the tokenizer's chat template. The `instruction` is what the model is told
    about the task unless a call says otherwise: the system's message of a template, else a text before each query.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        precision: Precision,
        *,
        max_length: int,
        template: Template | None = None,
        instruction: str = "",
        engine: Engine | None = None,
    ) -> None:
        self.model = model
        self.engine = engine
        self.tokenizer = tokenizer
        self.precision = precision
        self.notes: list[str] = []
        self._residuals = storage.Residuals()
        self._islands: tuple[str, ...] = ()
        self.untrained_head = False
        self.adapters: Adapters | None = None  # of model/adapters.py, which puts them here
        self.origin: Origin | None = None
        self._max_length = max_length
        self._detach: Callable[[], None] = lambda: None
        self._undo_recompute: Callable[[], None] | None = None
        self.template = template
        self.pairs = self._pairs(instruction)
        self.activation = "torch.nn.modules.activation.Sigmoid" if self.num_labels == 1 else IDENTITY
        self.compute_in(compute_named("float32"))
        # A graph is padded as it is; its model here has no weights, only names and settings.
        self._layout, self._pads = self._proven_path() if engine is None else (None, True)
        self.compute_in(precision.compute)

    @property
    def packed(self) -> bool:
        """True where pairs run end to end in one row, without padding."""
        return self._layout is not None

    @property
    def one_token(self) -> bool:
        """True where the head has been proven to read the first token of each pair alone."""
        return self._layout is not None and self._layout.one_token

    @property
    def pads(self) -> bool:
        """True where pairs of different lengths may share a batch: packed, or padded and proven to ignore padding."""
        return self._pads

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def residuals(self) -> storage.Residuals:
        """Int8 tensors by parameter name: what 16-bit rounding dropped in training, part of the weights that train."""
        return self._residuals

    @residuals.setter
    def residuals(self, values: Mapping[str, Tensor]) -> None:
        # The modules hold this very dictionary, so it is filled anew and not replaced.
        kept = dict(values)
        self._residuals.clear()
        self._residuals.update(kept)

    @property
    def islands(self) -> tuple[str, ...]:
        """Names of the modules that compute in float32 because a narrow format overflows there."""
        return self._islands

    @islands.setter
    def islands(self, names: Iterable[str]) -> None:
        before, self._islands = self._islands, ()
        try:
            self.widen(names)
        except ValueError:
            self._islands = before
            raise

    def widen(self, names: Iterable[str]) -> None:
        """Make modules, whole blocks too, compute in float32 from now on, whatever the compute format.

        Raises ValueError for a name that is no module of the model.
        """
        known = dict(self.model.named_modules())
        wanted = list(self._islands)
        for name in names:
            self.needs_weights("An island")
            if not name or name not in known:
                raise ValueError(
                    f"An island is the name of a module of this {type(self.model).__name__}; got {name!r}. "
                    f"model.model.named_modules() lists them, for example {next(name for name in known if name)!r}."
                )
            if not storage.within(name, wanted):
                wanted.append(name)
        self.set_islands(wanted)

    def set_islands(self, names: Iterable[str]) -> None:
        """Make exactly these modules compute in float32; `widen` adds some and checks them."""
        self._islands = tuple(names)
        self.compute_in(self._compute)

    def wide_products(self) -> list[str]:
        """Names of the plain Linear modules within the islands."""
        return storage.linear_modules(self.model, self._islands)

    @property
    def checkpointing(self) -> bool:
        """Whether layers keep only their inputs in training and are computed again for their gradients."""
        return self._undo_recompute is not None

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        if self._undo_recompute is not None:
            self._undo_recompute()
        self._undo_recompute = recompute(self.model.base_model) if wanted else None

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device if self.engine is None else torch.device("cpu")

    @property
    def max_length(self) -> int:
        """Longest pair in tokens; longer ones are truncated."""
        return self._max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self._max_length = value
        self.pairs = self._pairs(self.instruction)

    @property
    def instruction(self) -> str:
        """What the model is told about its task; empty for nothing."""
        return self.pairs.instruction

    @instruction.setter
    def instruction(self, value: str) -> None:
        self.pairs.instruction = value

    def _pairs(self, instruction: str) -> Encoder:
        if self.template is None:
            return PairTokenizer(self.tokenizer, self._max_length, instruction=instruction)
        return TemplateTokenizer(self.tokenizer, self._max_length, self.template, instruction=instruction)

    @property
    def compute(self) -> Compute:
        return self.precision.compute

    @property
    def active_compute(self) -> Compute:
        """The format that products run in now; another than `compute` inside `computing_in`."""
        return self._compute

    def note(self, text: str) -> None:
        """Announce a fact that the user should know, once, and keep it for reports."""
        self.notes.append(text)
        log.warning(text)

    def compute_in(self, compute: Compute) -> None:
        """Switch the compute format; weights stay as they are stored. A graph computes in the one it was opened in."""
        if self.engine is not None:
            self._compute = self.precision.compute
            return
        self._detach()
        self._compute = compute
        self._detach = storage.attach(self.model, compute, head_modules(self.model), self.residuals, self._islands)

    @contextmanager
    def computing_in(self, name: str) -> Iterator[None]:
        """Compute in another format for a while."""
        before = self._compute
        self.compute_in(compute_named(name))
        try:
            yield
        finally:
            self.compute_in(before)

    def needs_weights(self, what: str) -> None:
        """Raise ModelError where a graph computes the scores: there is nothing to train, store or convert then."""
        if self.engine is not None:
            raise ModelError(
                f"{what} needs torch weights, and this model is a graph that {self.engine.name} runs "
                f"('{self.engine.path}'). Load the model that it was exported from, with backend='torch'."
            )

    def adopt(self, precision: Precision) -> None:
        """Change storage and compute, in place; raises NonFiniteWeightError for weights beyond the new range."""
        self.needs_weights("Another storage format")
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
        if torch.device(device).type != "cpu":
            self.needs_weights(f"The device {device}")
        if self.engine is None:
            self.model.to(device)

    @cached_property
    def branches(self) -> bool:
        """True where pairs that begin alike may share that beginning: causal, and three pairs score as alone."""
        if self._layout is None or self._layout.pooled != "last":
            return False
        first, *rests = (np.array(ids[-BEGINNING:]) for ids in self.pairs.encode([PROBES[0], *PROBES]).ids())
        pairs = [np.concatenate([first, rest]) for rest in rests]
        lengths = starts([len(pair) for pair in pairs])
        tokens = Tokens(np.concatenate(pairs), None, lengths, NONE)
        (row,) = branched(tokens, [range(len(pairs))], int(lengths[-1]), pad=self.config.pad_token_id)
        if not row.families[0].beginning:
            return False
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.computing_in("float32"):
                alone = self.logits(pack(tokens, row.rows))
                return _agree(self.logits(row), alone)
        except MISFITS as error:
            log.debug("%s does not share beginnings: %s", type(self.model).__name__, error)
            return False
        finally:
            self.model.train(training)

    def logits(self, batch: Batch | Branches) -> Tensor:
        """Float32 logits (P, L) in the batch's order, before any activation; non-finite values are not hidden.

        Pairs share their beginnings only where `branches` says that they may.
        """
        batch = batch.to(self.device)
        if isinstance(batch, Branches):
            assert self._layout is not None
            runs = attention.runs_of_families(batch.families, self._compute.rounds_to)
            row, head = row_of_branches(batch, self.model, self._layout, runs)
            return self.model(**head, packed_row=row).logits.float()
        if self.engine is not None:
            return self.engine.logits(batch, self.tokenizer.pad_token_id or 0)
        if self._layout is not None:
            return self._packed_logits(batch, self._layout).float()
        return (self._padded_logits(batch) if self._pads else self._unpadded_logits(batch)).float()

    def _packed_logits(self, batch: Batch, layout: Layout) -> Tensor:
        row, head = row_of(batch, self.model, layout, attention.runs_of(batch.lengths, self._compute.rounds_to))
        return self.model(**head, packed_row=row).logits

    def padded_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model's own forward takes for a batch, padded on the right, in the batch's order."""
        rows = batch.input_ids.split(batch.lengths)
        inputs = {"input_ids": _padded(rows, self.tokenizer.pad_token_id or 0)}
        inputs["attention_mask"] = _mask(rows)
        if batch.token_type_ids is not None and "token_type_ids" in inputs_of(self.model):
            inputs["token_type_ids"] = _padded(batch.token_type_ids.split(batch.lengths), 0)
        return inputs

    def _padded_logits(self, batch: Batch) -> Tensor:
        inputs: dict[str, Any] = dict(self.padded_inputs(batch))
        return self.model(**inputs, **without_cache(self.model)).logits

    def _unpadded_logits(self, batch: Batch) -> Tensor:
        """Pairs of equal length together and nothing else: right for every class, whatever it makes of padding."""
        return torch.cat([self._padded_logits(part) for part in batch.runs()])

    def _proven_path(self) -> tuple[Layout | None, bool]:
        """How batches are scored: in one packed row, padded, or by length; the first that scores three pairs as alone.

        Raises ModelError for a model that does not score a pair of texts at all.
        """
        training = self.model.training
        self.model.eval()
        batch = pack(self.pairs.encode(PROBES), range(len(PROBES))).to(self.device)
        with torch.no_grad():
            try:
                alone = self._unpadded_logits(batch).float()
            except MISFITS as error:
                raise ModelError(
                    f"{type(self.model).__name__} does not score pairs of texts "
                    f"({type(error).__name__}: {str(error).strip()[:200]}). Give a sequence-classification model."
                ) from error
            layout = self._proven_layout(batch, alone)
            pads = layout is not None or self._ignores_padding(batch, alone)
        self.model.train(training)
        if not pads:
            self.note(
                f"{type(self.model).__name__} scores a padded pair differently: pairs are batched by equal length."
            )
        return layout, pads

    def _ignores_padding(self, batch: Batch, alone: Tensor) -> bool:
        """Whether padded pairs score as alone, and exactly alike whatever the padding's embeddings are."""
        padded = self._padded_logits(batch)
        there = _mask(batch.input_ids.split(batch.lengths)).bool()

        def disturb(_: torch.nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor:
            # A leak of a few parts in 100,000 hides in rounding; one that answers to this does not.
            # Some classes pad further, to a multiple of their window.
            real = torch.nn.functional.pad(there, (0, embedded.shape[1] - there.shape[1]))
            # Not the same for all dimensions: a LayerNorm would take that away again.
            slope = torch.linspace(-1, 1, embedded.shape[-1], device=embedded.device)
            return torch.where(real[..., None], embedded, embedded + slope * embedded.abs().max())

        try:
            embedding = self.model.get_input_embeddings()
        except NotImplementedError:  # a model that hashes characters
            embedding = None
        if not isinstance(embedding, torch.nn.Embedding):
            return False  # nothing to disturb, so nothing is proven
        handle = embedding.register_forward_hook(disturb)
        try:
            disturbed = self._padded_logits(batch)
        except RuntimeError:  # embeddings laid out in a way of the class's own
            return False
        finally:
            handle.remove()
        return _agree(padded, alone) and _agree(disturbed, padded, PADDING_TOLERANCE)

    def _proven_layout(self, batch: Batch, alone: Tensor) -> Layout | None:
        candidates = list(layouts(self.model))
        if not candidates:
            return None
        usual = self.model.config._attn_implementation
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        accept_rows(self.model)
        for layout in candidates:
            try:
                if _agree(self._packed_logits(batch, layout), alone):
                    return layout
            except MISFITS as error:
                # A class that declares the interface and does not follow it takes the padded path, which is proven too.
                log.debug("%s does not take a packed row: %s", type(self.model).__name__, error)
        self.model.set_attn_implementation(usual)
        self.note(
            "Packed scores of three probe pairs differ from those of each alone: this model takes the padded path."
        )
        return None


def refuse_out_of_range(model: Model, dtype: torch.dtype) -> None:
    """Raise NonFiniteWeightError, naming each tensor, if `dtype` cannot hold a weight that is to rest in it."""
    limit = torch.finfo(dtype).max
    beyond = {
        name: f"'{name}' has {int((p.detach().abs() > limit).sum())} values above {limit:g} (max {largest(p):g})"
        for name, p in model.named_parameters()
        if largest(p) > limit
    }
    if beyond:
        shown = "; ".join(list(beyond.values())[:5])
        raise NonFiniteWeightError(
            f"{dtype_name(dtype)} cannot hold these weights: {shown}. Use bfloat16 or float32.",
            tensors=list(beyond),
            out_of_range=True,
        )


def _agree(scores: Tensor, alone: Tensor, tolerance: float = PACKING_TOLERANCE) -> bool:
    if scores.shape != alone.shape:
        return False
    allowed = tolerance * max(alone.abs().max().item(), 1e-3)
    return (scores - alone).abs().max().item() <= allowed


def _padded(rows: list[Tensor] | tuple[Tensor, ...], filler: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)


def _mask(rows: tuple[Tensor, ...]) -> Tensor:
    return _padded([torch.ones_like(row) for row in rows], 0)
