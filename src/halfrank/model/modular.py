"""Modular folders of sentence-transformers: a body, then steps (pooling, dense layers, norms) that make its score.

The steps compute in float32 and are called as there, on named features; their weights keep the names of their files.
Shapes: P pairs, M tokens of the longest pair, D hidden size, L labels.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from halfrank.errors import ModelError
from halfrank.model.activation import activation_named
from halfrank.model.pieces import Source, write_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENS, POOLED, SCORES = "token_embeddings", "sentence_embedding", "scores"
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """One step as a folder names it: its name there, where its files are, its class and its settings."""

    name: str
    path: str
    type: str
    config: Mapping[str, Any]


class Pooling(nn.Module):
    """Hidden states (P, M, D) of each pair to one or more vectors side by side, float32."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        old = tuple(mode for name, mode in OLD_POOLING.items() if config.get(name))
        given = config.get("pooling_mode", old or "mean")
        self.modes = (given,) if isinstance(given, str) else tuple(given)
        unknown = [mode for mode in self.modes if mode not in OLD_POOLING.values()]
        if unknown:
            raise ModelError(f"The pooling {unknown[0]!r} is not one of {', '.join(OLD_POOLING.values())}.")
        if config.get("include_prompt") is False:
            raise ModelError("A pooling that leaves the prompt out (include_prompt: false) is not supported.")

    def forward(self, features: Features) -> None:
        """Read the tokens and their mask (P, M), write the pooled vectors."""
        hidden_PMD, mask_PM = features[TOKENS].float(), features["attention_mask"]
        features[POOLED] = torch.cat([pooled(mode, hidden_PMD, mask_PM) for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """A linear layer with an activation, and perhaps a residual connection."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        inputs, outputs = config["in_features"], config["out_features"]
        self.linear = nn.Linear(inputs, outputs, bias=config.get("bias", True))
        self.activation_function = activation_named(
            config.get("activation_function") or "torch.nn.modules.activation.Tanh"
        )
        self.source = config.get("module_input_name") or POOLED
        self.target = config.get("module_output_name") or self.source
        self.adds = bool(config.get("use_residual"))
        if self.adds and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)

    def forward(self, features: Features) -> None:
        """Read one feature and write another."""
        x = features[self.source]
        out = self.activation_function(self.linear(x))
        if self.adds:
            out = out + (self.residual(x) if hasattr(self, "residual") else x)
        features[self.target] = out


class LayerNorm(nn.Module):
    """A norm of the pooled vectors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config["dimension"])

    def forward(self, features: Features) -> None:
        """Norm the pooled vectors in place of themselves."""
        features[POOLED] = self.norm(features[POOLED])


class Normalize(nn.Module):
    """Vectors to length 1."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.source = config.get("module_input_name") or POOLED
        self.target = config.get("module_output_name") or self.source

    def forward(self, features: Features) -> None:
        """Read one feature and write another."""
        features[self.target] = F.normalize(features[self.source], dim=-1)


class Dropout(nn.Module):
    """Dropout of the pooled vectors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dropout_layer = nn.Dropout(config.get("dropout", 0.2))

    def forward(self, features: Features) -> None:
        """Drop in training, nothing otherwise."""
        features[POOLED] = self.dropout_layer(features[POOLED])


STEPS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "Pooling": Pooling, "Dense": Dense, "LayerNorm": LayerNorm, "Normalize": Normalize, "Dropout": Dropout,
}  # fmt: skip


def pooled(mode: str, hidden_PMD: Tensor, mask_PM: Tensor) -> Tensor:
    """One vector (P, D) of each pair, of the tokens where the mask is not 0."""
    there_PM1 = mask_PM[..., None].to(hidden_PMD.dtype)
    rows = torch.arange(len(mask_PM), device=mask_PM.device)
    if mode == "cls":
        return hidden_PMD[rows, mask_PM.argmax(1)]
    if mode == "lasttoken":
        places = torch.arange(mask_PM.shape[1], device=mask_PM.device)
        return hidden_PMD[rows, (places * mask_PM).argmax(1)]
    if mode == "max":
        return hidden_PMD.masked_fill(there_PM1 == 0, float("-inf")).amax(1)
    if mode == "weightedmean":
        there_PM1 = there_PM1 * there_PM1.cumsum(1)
    count_P1 = there_PM1.sum(1)
    return (hidden_PMD * there_PM1).sum(1) / (count_P1.sqrt() if mode == "mean_sqrt_len_tokens" else count_P1)


class Modular(nn.Module):
    """A transformers body and the steps after it; called and asked as a sequence-classification model is.

    The last step that writes `scores` says how many labels there are.
    """

    base_model_prefix = "body"

    def __init__(self, body: PreTrainedModel, specs: Iterable[Spec]) -> None:
        super().__init__()
        self.body = body
        self.specs = tuple(specs)
        self.head = nn.ModuleDict({spec.name: STEPS[kind_of(spec)](spec.config) for spec in self.specs})
        labels = [s.config["out_features"] for s in self.specs if s.config.get("module_output_name") == SCORES]
        if not labels:
            raise ModelError("No dense layer of this modular folder writes 'scores': it is no cross-encoder.")
        self.config.num_labels = labels[-1]
        self._known = frozenset(inspect.signature(type(body).forward).parameters)

    @property
    def base_model(self) -> PreTrainedModel:
        """The body."""
        return self.body

    @property
    def config(self) -> Any:
        """The body's configuration; `num_labels` is that of the head."""
        return self.body.config

    @property
    def dtype(self) -> torch.dtype:
        """The format of the body's weights."""
        return self.body.dtype

    def num_parameters(self) -> int:
        """Parameters of body and head."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Module:
        """The body's embedding table."""
        return self.body.get_input_embeddings()

    def is_backend_compatible(self) -> bool:
        """Whether the body's class takes another attention."""
        return self.body.is_backend_compatible()

    def set_attn_implementation(self, name: str) -> None:
        """Choose the body's attention."""
        self.body.set_attn_implementation(name)

    def gradient_checkpointing_enable(self, arguments: Mapping[str, Any] | None = None) -> None:
        """Let the body compute its activations again in the backward pass."""
        self.body.gradient_checkpointing_enable(arguments)

    def tie_weights(self) -> None:
        """Nothing is tied to a head of steps; the body ties its own."""
        self.body.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        packed_row: Any = None,
    ) -> SequenceClassifierOutput:
        """Logits (P, L) of padded pairs, or of the row that `model/families.py` lays out."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and "token_type_ids" in self._known:
            given["token_type_ids"] = token_type_ids
        if packed_row is not None:
            given["packed_row"] = packed_row
        hidden_PMD = self.body(**given).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden_PMD.shape[:2], dtype=torch.long, device=hidden_PMD.device)
        features = {TOKENS: hidden_PMD, "attention_mask": attention_mask}
        for step in self.head.values():
            step(features)
        return SequenceClassifierOutput(logits=features[SCORES])

    def write_steps(self, folder: Path, sources: Mapping[str, Source]) -> None:
        """Write configuration and weights of the steps as sentence-transformers does; `sources` are of the whole."""
        for spec in self.specs:
            place, prefix = Path(folder) / spec.path, f"head.{spec.name}."
            place.mkdir(parents=True, exist_ok=True)
            (place / CONFIG).write_text(json.dumps(dict(spec.config), indent=2) + "\n", encoding="utf-8")
            own = {key.removeprefix(prefix): source for key, source in sources.items() if key.startswith(prefix)}
            if own:
                write_file(place / WEIGHTS, own, metadata={"format": "pt"})


Model: TypeAlias = PreTrainedModel | Modular


def kind_of(spec: Spec) -> str:
    """The name in `STEPS` of a step's class; raises ModelError for others."""
    name = spec.type.rpartition(".")[2]
    if not spec.type.startswith("sentence_transformers.") or name not in STEPS:
        raise ModelError(
            f"The folder's step {spec.type!r} is not one of {', '.join(STEPS)}: halfrank runs no foreign code from a "
            "folder."
        )
    return name


def load_steps(model: Modular, file_of: Callable[[str], str | None]) -> None:
    """Fill the head's weights, in float32; `file_of` finds a file of the folder. Raises ModelError for missing ones."""
    for spec in model.specs:
        step = model.head[spec.name]
        if not step.state_dict():
            continue
        path = file_of(f"{spec.path}/{WEIGHTS}")
        if path is None:
            raise ModelError(f"'{spec.path}' holds no {WEIGHTS}, the weights of {spec.type.rpartition('.')[2]}.")
        stored = load_file(path)
        wanted = {name: tensor.shape for name, tensor in step.state_dict().items()}
        if {name: tensor.shape for name, tensor in stored.items()} != wanted:
            raise ModelError(
                f"'{spec.path}/{WEIGHTS}' does not hold what its config.json says: expected "
                f"{ {name: tuple(shape) for name, shape in wanted.items()} }."
            )
        step.load_state_dict({name: tensor.float() for name, tensor in stored.items()})


def last_token_head(features: int, *, bias: bool) -> tuple[Spec, Spec]:
    """Steps that score the last token with one row, for classes without a head of their own."""
    dense = {
        "in_features": features, "out_features": 1, "bias": bias, "module_input_name": POOLED,
        "module_output_name": SCORES, "activation_function": "torch.nn.modules.linear.Identity",
    }  # fmt: skip
    pooling = {"embedding_dimension": features, "pooling_mode": "lasttoken", "include_prompt": True}
    return (
        Spec("1", "1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling", pooling),
        Spec("2", "2_Dense", "sentence_transformers.base.modules.dense.Dense", dense),
    )


def blueprint(model: Model) -> tuple[type[PreTrainedModel], Any, tuple[Spec, ...] | None]:
    """What `built` makes the same model of, without its weights; it pickles."""
    if isinstance(model, Modular):
        return type(model.body), model.config, model.specs
    return type(model), model.config, None


def built(plan: tuple[type[PreTrainedModel], Any, tuple[Spec, ...] | None]) -> Model:
    """A model with random weights, as `blueprint` said."""
    kind, config, specs = plan
    return kind(config) if specs is None else Modular(kind(config), specs)
