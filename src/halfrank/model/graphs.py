"""A scorer as one file of another runtime: ONNX or OpenVINO IR, float32 or with 8-bit weights.

The graph takes what a padded call of the model takes (input_ids, attention_mask and, where the model reads them,
token_type_ids, each (B, M) with any B and M) and gives the float32 logits (B, L), before any activation.
Shapes: B pairs, M tokens of the longest, D hidden size, H heads, S head size, L labels.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfrank.data.packing import pack
from halfrank.errors import ModelError
from halfrank.model import folder
from halfrank.model.backends import format_named, needed
from halfrank.model.last_layer import last_layer
from halfrank.model.modular import Modular
from halfrank.model.scorer import PROBES, Scorer

OUTPUT = "logits"
OPSET = 18
ONE_FILE = 1 << 30  # bytes of weights: protobuf ends at 2 GiB, above this they lie in a file beside the graph


def refuse_unexportable(scorer: Scorer) -> None:
    """Raise ModelError for a model that no graph of one padded call holds."""
    if scorer.engine is not None:
        raise ModelError(f"This model runs in {scorer.engine.name} already: export the folder with its torch weights.")
    if isinstance(scorer.model, Modular):
        raise ModelError(
            "A model whose score is made by steps after the body (a modular folder, or a causal one without a "
            "sequence-classification class) cannot be exported: others would read the body's output as its score. "
            "Use backend='torch'."
        )
    if not scorer.pads:
        raise ModelError(
            f"{type(scorer.model).__name__} scores a padded pair differently, and a graph takes padded pairs. "
            "Use backend='torch'."
        )


def write_graph(scorer: Scorer, stage: Path, kind: str, *, int8: bool = False) -> Path:
    """Write the graph of `scorer`, residuals joined, into a folder in format `kind`; the file it wrote.

    With `int8` the matrices of its products are rounded to 8 bits a row; products round their inputs as they come.
    """
    found = format_named(kind)
    for package in found.packages:
        needed(package, found.name)
    refuse_unexportable(scorer)
    target = stage / found.file
    target.parent.mkdir(parents=True, exist_ok=True)
    wrapped, inputs = _wrapped(scorer, "eager" if kind == "onnx" else "sdpa")
    with _silent(), torch.no_grad():
        try:
            (_write_onnx if kind == "onnx" else _write_openvino)(wrapped, inputs, target, int8)
        except Exception as error:  # whatever a tracer meets in a class that it does not know
            raise ModelError(
                f"{type(scorer.model).__name__} cannot be exported to {kind} ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}). Use backend='torch'."
            ) from error
    return target


class _Logits(nn.Module):
    """A model's forward as a function of its padded inputs alone."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), **self.more).logits


def _wrapped(scorer: Scorer, attention: str) -> tuple[_Logits, dict[str, Tensor]]:
    """The model as its class has it, in float32 and with nothing of ours around it, and inputs of three pairs."""
    batch = pack(scorer.pairs.encode(PROBES), range(len(PROBES)))
    inputs = scorer.padded_inputs(batch)
    kind: Any = type(scorer.model)
    with torch.random.fork_rng(devices=[]):
        try:
            plain = kind._from_config(copy.deepcopy(scorer.config), attn_implementation=attention, dtype=torch.float32)
        except ValueError:  # a class that has one attention of its own
            plain = kind._from_config(copy.deepcopy(scorer.config), dtype=torch.float32)
    weights = {name: t.cpu() for name, t in folder.exported_weights(scorer, torch.float32).items()}
    plain.load_state_dict(weights, assign=True)
    plain.eval()
    if scorer.one_token and (layer := last_layer(plain.base_model)) is not None:
        _keep_first_token(layer)
    return _Logits(plain, tuple(inputs)), inputs


def _keep_first_token(layer: Any) -> None:
    """Let the last layer compute the first token of each pair alone; the head has been proven to read no other."""
    layer.forward = partial(_first_token, layer)


def _first_token(layer: Any, hidden_BMD: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    own, first_B1D = layer.attention.self, hidden_BMD[:, :1]
    query, key, value = (
        part.view(*part.shape[:2], own.num_attention_heads, own.attention_head_size).transpose(1, 2)
        for part in (own.query(first_B1D), own.key(hidden_BMD), own.value(hidden_BMD))
    )
    scores_BH1M = query @ key.transpose(2, 3) * own.scaling
    if mask is not None:
        mask_B11M = mask[:, :, :1]
        bias = mask_B11M if mask.is_floating_point() else torch.where(mask_B11M, 0.0, torch.finfo(torch.float32).min)
        scores_BH1M = scores_BH1M + bias
    mixed_B1D = (scores_BH1M.softmax(-1) @ value).transpose(1, 2).flatten(2)
    attended = layer.attention.output(mixed_B1D, first_B1D)
    return layer.output(layer.intermediate(attended), attended)


def _write_onnx(wrapped: _Logits, inputs: dict[str, Tensor], target: Path, int8: bool) -> None:
    plain = target.with_name("float32.onnx") if int8 else target
    size = sum(p.numel() * p.element_size() for p in wrapped.parameters())
    torch.onnx.export(
        wrapped,
        tuple(inputs.values()),
        plain,
        input_names=list(inputs),
        output_names=[OUTPUT],
        dynamic_shapes=(tuple({0: "batch", 1: "length"} for _ in inputs),),
        opset_version=OPSET,
        dynamo=True,  # tracing fixes the shapes of masks at those of the example, and scores are silently wrong
        external_data=size > ONE_FILE,
        verbose=False,
    )
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Seven bits and a sign: with eight, a processor without VNNI saturates its sums of products.
        quantize_dynamic(
            plain, target, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"], use_external_data_format=size > ONE_FILE,
        )  # fmt: skip
        for rest in target.parent.glob("float32.onnx*"):
            rest.unlink()


def _write_openvino(wrapped: _Logits, inputs: dict[str, Tensor], target: Path, int8: bool) -> None:
    import openvino

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        wrapped, tuple(inputs.values()), dynamic_shapes=(tuple({0: dynamic, 1: dynamic} for _ in inputs),)
    )
    graph = openvino.convert_model(program)
    for port, name in zip(graph.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    graph.outputs[0].get_tensor().set_names({OUTPUT})
    if int8:
        import nncf

        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(graph, target, compress_to_fp16=False)  # its default rounds weights to float16 unasked


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporters' own messages and bars away."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
