"""Weights at rest in 16 bits, products in any compute format: what each leaf module stores and how it computes.

Shapes: x is (..., I) for a Linear of O outputs and I inputs; T stands for all leading dimensions together.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfrank.model.dropout import module_dropout
from halfrank.model.gelu import is_gelu, module_gelu
from halfrank.numerics.dither import dithered_
from halfrank.numerics.noise import Keys, keys
from halfrank.numerics.rounding import join
from halfrank.numerics.widen import widen_
from halfrank.precision import Compute

NARROW = (torch.float16, torch.bfloat16)
WIDE = "_halfrank_wide"  # marks the modules of an island: attention, which is no leaf, asks for it
ROWS = "_halfrank_rows"  # marks the embedding tables whose gradients come as rows
TRAINED = "_halfrank_trained"  # marks modules that are trained beside frozen weights: float32 whatever the storage
LARGE_TABLE = 2**25  # elements of a 16-bit table: below, a dense gradient is no burden
WIDE_TABLE = 2**20  # of a float32 one, whose update takes rows as they are
_FLOAT32 = Compute("float32", torch.float32)


class _Buffers(threading.local):
    """Of each thread its own: two that score at once would write over what the other is about to multiply with."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_buffers = _Buffers()


class Residuals(dict[str, Tensor]):
    """Int8 tensors by parameter name: what 16-bit rounding dropped of the weights that are trained.

    Products in float32 add them to the weights. Products in 16 bits have no room for them: within `felt` they take the
    weight's neighbour instead, as often as makes the mean right.
    """

    _noise: tuple[int, int] | None = None

    @contextmanager
    def felt(self, noise: tuple[int, int] | None) -> Iterator[None]:
        """For the forward and backward passes of one training step; `noise` is its seed and number."""
        self._noise = noise
        try:
            yield
        finally:
            self._noise = None

    def keys_of(self, name: str) -> Keys | None:
        """Of the rounding noise of a weight; None outside of `felt`."""
        return None if self._noise is None else keys(*self._noise, zlib.crc32(name.encode()))


class _Round(torch.autograd.Function):
    """Round to a narrow format and back, overflow to infinity included, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: torch.dtype) -> Tensor:
        ctx.narrow = narrow
        return x.to(narrow).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.narrow).to(grad.dtype), None


def rounded(x: Tensor, narrow: torch.dtype) -> Tensor:
    """`x` rounded to `narrow` and back, and its gradient likewise: what a narrow format would have kept."""
    return _Round.apply(x, narrow)


class _WidenedLinear(torch.autograd.Function):
    """A float32 product with a 16-bit weight; only the 16-bit weight is kept for the backward pass.

    The residual is added to it or, with `noise`, decides which of its neighbours is taken.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        narrow: torch.dtype | None,
        residual_OI: Tensor | None,
        noise: Keys | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.narrow, ctx.residual, ctx.noise, ctx.has_bias = narrow, residual_OI, noise, bias_O is not None
        return F.linear(x, _widened(weight_OI, narrow, residual_OI, noise), bias_O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, weight_OI = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ _widened(weight_OI, ctx.narrow, ctx.residual, ctx.noise)).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            # The widened weight is not needed any more, so its buffer takes the float32 gradient.
            wide = _buffer(weight_OI, torch.float32)
            grad_weight = torch.mm(grad_TO.t(), x.reshape(-1, x.shape[-1]), out=wide).to(weight_OI.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_TO.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


class _DitheredLinear(torch.autograd.Function):
    """A 16-bit product with a weight or its neighbour; which one is found again for the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_OI: Tensor, noise: Keys
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.residual, ctx.noise, ctx.has_bias = residual_OI, noise, bias_O is not None
        return F.linear(x, _dithered(weight_OI, residual_OI, noise).to(x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight_OI = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ _dithered(weight_OI, ctx.residual, ctx.noise).to(x.dtype)).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_TO.t() @ x.reshape(-1, x.shape[-1])).to(weight_OI.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_TO.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


class _GatheredRows(torch.autograd.Function):
    """Rows of an embedding table in float32; the gradients of a token seen often are summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        ids: Tensor,
        padding_idx: int | None,
        residual_VD: Tensor | None,
        sparse: bool,
        noise: Keys | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sparse = sparse
        ctx.shape, ctx.dtype, ctx.padding_idx = weight_VD.shape, weight_VD.dtype, padding_idx
        rows = F.embedding(ids, weight_VD)  # gathered first: only the rows read are widened
        if residual_VD is None:
            return rows.float()
        codes = residual_VD[ids]
        return join(rows, codes) if noise is None else dithered_(torch.empty_like(rows), rows, codes, noise).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        ids_T, grad_TD = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        seen, position = ids_T.unique(return_inverse=True) if ctx.sparse else _places(ids_T, ctx.shape[0])
        sums = grad.new_zeros(seen.numel(), grad.shape[-1]).index_add_(0, position, grad_TD)
        if ctx.padding_idx is not None:
            sums.masked_fill_((seen == ctx.padding_idx)[:, None], 0.0)
        rows = sums.to(ctx.dtype)
        if ctx.sparse:
            found = torch.sparse_coo_tensor(
                seen[None], rows, ctx.shape, is_coalesced=True, check_invariants=False
            )  # `seen` is sorted and has no token twice
            return found, None, None, None, None, None
        dense = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
        return dense.index_add_(0, seen, rows), None, None, None, None, None  # rows that stand for no token are 0


def _places(ids_T: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """What `unique` with its inverse gives, filled up to T entries with any tokens: a GPU is not asked how many."""
    ordered, order = ids_T.sort(stable=True)
    begins = torch.ones_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    position = torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)
    return (torch.arange(len(ids_T), device=ids_T.device) % tokens).scatter_(0, position, ids_T.long()), position


def narrow_storage(model: nn.Module, storage: torch.dtype, head: set[str]) -> None:
    """Give matrices of the body `storage` and everything else float32, in place.

    Everything else: norms, biases, the score head, adapters, and parameters of modules that are not Linear or
    Embedding, because only those two know how to widen what they store.
    """
    wide = {*head, *(name for name, module in model.named_modules() if getattr(module, TRAINED, False))}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            keeps = type(module) in (nn.Linear, nn.Embedding) and key == "weight" and not within(name, wide)
            parameter.data = parameter.data.to(storage if keeps else torch.float32)
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                # Loading in 16 bits has rounded Gemma's embedding scale already; the module remembers the exact one.
                exact = getattr(module, f"scalar_{key}", None)
                module._buffers[key] = buffer.float() if exact is None else torch.full_like(buffer.float(), exact)


def attach(
    model: nn.Module,
    compute: Compute,
    head: set[str],
    residuals: Residuals | None = None,
    islands: Collection[str] = (),
) -> Callable[[], None]:
    """Make every leaf module compute in `compute`, those under `head` or `islands` in float32; returns what undoes it.

    `residuals` may fill up later: in training, a product takes a 16-bit weight together with its residual, so that
    gradients are those of the weight that is being trained and not of its rounding.
    """
    held = Residuals() if residuals is None else residuals
    handles: list[Any] = []
    patched: list[nn.Module] = []
    stores_narrow = next(narrow_parameters(model), None) is not None
    wide = {*head, *islands}
    marked = [module for name, module in model.named_modules() if within(name, islands)]
    for module in marked:
        setattr(module, WIDE, True)
    for name, module in leaves(model):
        own = _FLOAT32 if within(name, wide) else compute
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module, own, held, f"{name}.weight")  # type: ignore[method-assign]
            patched.append(module)
        elif type(module) is nn.Embedding:
            module.forward = partial(_embedding, module, own, held, f"{name}.weight")  # type: ignore[method-assign]
            patched.append(module)
        elif (stand_in := _stand_in(module)) is not None:
            module.forward = partial(stand_in, module)
            patched.append(module)
            handles += _cast_around(module, own) if compute.narrow is not None else []
        elif compute.narrow is not None or (stores_narrow and _has_parameters(module)):
            handles += _cast_around(module, own)

    def detach() -> None:
        for handle in handles:
            handle.remove()
        for module in patched:
            del module.forward
        for module in marked:
            delattr(module, WIDE)

    return detach


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules without children, with their names; a model that is itself one is none of them."""
    return [(name, module) for name, module in model.named_modules() if name and next(module.children(), None) is None]


def linear_modules(model: nn.Module, roots: Collection[str]) -> list[str]:
    """Names of the plain Linear modules at or below `roots`."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and within(name, roots)]


def narrow_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that rest in 16 bits, with their names."""
    return ((name, p) for name, p in model.named_parameters() if p.dtype in NARROW)


def _linear(module: nn.Linear, compute: Compute, residuals: Residuals, name: str, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    bias: Tensor | None = module.bias
    residual, noise = _trained(module, compute, residuals, name)
    if compute.arithmetic is not torch.float32:
        narrow = compute.arithmetic
        x, bias = x.to(narrow), None if bias is None else bias.to(narrow)
        if residual is not None and noise is not None:
            return _DitheredLinear.apply(x, weight, bias, residual, noise)
        return F.linear(x, weight.to(narrow), bias)
    x = x.float()
    if compute.rounds_to is not None:
        x = rounded(x, compute.rounds_to)
        bias = None if bias is None else rounded(bias, compute.rounds_to)
    if weight.dtype in NARROW:
        out = _WidenedLinear.apply(x, weight, bias, compute.rounds_to, residual, noise)
    else:
        out = F.linear(x, weight if compute.rounds_to is None else rounded(weight, compute.rounds_to), bias)
    return out if compute.rounds_to is None else rounded(out, compute.rounds_to)


def _embedding(module: nn.Embedding, compute: Compute, residuals: Residuals, name: str, ids: Tensor) -> Tensor:
    residual, noise = _trained(module, compute, residuals, name)
    sparse = getattr(module.weight, ROWS, False)
    rows = _GatheredRows.apply(module.weight, ids, module.padding_idx, residual, sparse, noise).to(compute.arithmetic)
    return rows if compute.rounds_to is None else rounded(rows, compute.rounds_to)


def _trained(module: nn.Module, compute: Compute, residuals: Residuals, name: str) -> tuple[Tensor | None, Keys | None]:
    """The residual of a weight, where it counts, and in 16-bit products the keys of the noise that rounds their sum."""
    if not module.training:
        return None, None
    if compute.narrow is None:
        return residuals.get(name), None
    noise = residuals.keys_of(name)
    return (None, None) if noise is None else (residuals.get(name), noise)


def _stand_in(module: nn.Module) -> Callable[..., Tensor] | None:
    if type(module) is nn.Dropout:
        return module_dropout
    return module_gelu if is_gelu(module) else None


def _cast_around(module: nn.Module, compute: Compute) -> list[Any]:
    """Hooks for a leaf without a product of its own: norms, activations, dropout."""
    wide = compute.rounds_to is not None or _has_parameters(module)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Norms hold float32 parameters and square their input: they compute in float32 whatever surrounds them.
        return tuple(_cast(value, torch.float32 if wide else compute.arithmetic, compute.rounds_to) for value in args)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, compute.arithmetic, compute.rounds_to)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _cast(value: Any, dtype: torch.dtype, rounds_to: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    value = value.to(dtype)
    return value if rounds_to is None else rounded(value, rounds_to)


def _widened(weight: Tensor, narrow: torch.dtype | None, residual: Tensor | None, noise: Keys | None) -> Tensor:
    if residual is not None and noise is not None:
        weight, residual = _dithered(weight, residual, noise), None
    source = weight if narrow is None or narrow is weight.dtype else weight.to(narrow)
    return widen_(_buffer(weight, torch.float32), source, residual)


def _dithered(weight: Tensor, residual: Tensor, noise: Keys) -> Tensor:
    return dithered_(_buffer(weight, weight.dtype), weight, residual, noise)


def _buffer(like: Tensor, dtype: torch.dtype) -> Tensor:
    # One buffer per device and format, as large as the largest weight: a fresh one each time costs memory, not time.
    held = _buffers.held.get((like.device, dtype))
    if held is None or held.numel() < like.numel():
        held = _buffers.held[like.device, dtype] = torch.empty(like.numel(), dtype=dtype, device=like.device)
    return held[: like.numel()].view(like.shape)


@contextmanager
def row_gradients(model: nn.Module, *, narrow: bool) -> Iterator[None]:
    """While it lasts, gradients of large embedding tables are sparse: the rows of the tokens that were seen.

    Those of 16-bit tables only with `narrow`: their update needs a dense one. On a GPU the same holds of float32. A
    float32 table with hooks keeps a dense one, which is what they were written for.
    """
    weights = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Embedding}
    tables = [
        table
        for table in weights.values()  # once, however many modules share it
        if comes_as_rows(table.numel(), table.dtype, table.device, narrow=narrow)
        and not (table.dtype is torch.float32 and (table._backward_hooks or table._post_accumulate_grad_hooks))
    ]
    for table in tables:
        setattr(table, ROWS, True)
    try:
        yield
    finally:
        for table in tables:
            delattr(table, ROWS)


def comes_as_rows(elements: int, dtype: torch.dtype, device: torch.device, *, narrow: bool) -> bool:
    """Whether `row_gradients` makes the gradient of such a table sparse."""
    if dtype is torch.float32 and device.type == "cpu":
        return elements > WIDE_TABLE
    return narrow and elements > LARGE_TABLE


@contextmanager
def other_buffers() -> Iterator[None]:
    """Use float32 buffers of one's own for a while, and none of them afterwards."""
    kept, _buffers.held = _buffers.held, {}
    try:
        yield
    finally:
        _buffers.held = kept


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def within(name: str, roots: Collection[str]) -> bool:
    """Whether the module `name` is one of `roots` or inside one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)
