"""One pass under observation: which operation of which module first made a number that is not finite.

Modules are followed by hooks, operations by torch's dispatch mode, backward operations by labelling each autograd node
with the innermost module that made it. Everything is taken away again afterwards; results do not change.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from halfrank.model.storage import leaves
from halfrank.numerics.formats import all_finite

ATTENTION_NDIM = 4  # pairs, heads, queries, keys
MASKED = -1e4  # what stands for "do not look" in additive masks is at least this low
OVERWRITTEN = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")
UNINITIALISED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
MASKING = (
    "masked_fill",
    "where",
    "full",
    "full_like",
    "fill",
    "scalar_tensor",
    "tril",
    "triu",
    "new_full",
    "lift_fresh",
)
SUMS = ("add", "sub")
INVERTED = ("reciprocal", "rsqrt")  # they divide by their only input


@dataclass(frozen=True)
class Producer:
    """Who made a tensor."""

    operation: str
    module: str
    hidden: bool = False  # a sum of two tensors of one shape: how a residual stream is made


@dataclass(frozen=True)
class Event:
    """An operation whose inputs were finite and whose output is not."""

    phase: str  # forward, loss or backward
    module: str  # "" outside every module
    operation: str
    numbers: dict[str, float]
    producer: Producer | None = None  # where the operation narrowed its input: who made it
    consumer: str | None = None  # and the leaf that asked for it
    parameter: str | None = None  # the parameter that was narrowed
    masked_row: bool = False
    zero_divisors: int = 0  # how many zeros the operation divided by
    leaves_run: int | None = None  # in the model's own forward: how many leaves ran before


@dataclass
class Recording:
    """What a pass showed."""

    event: Event | None = None
    saturated: list[Event] = field(default_factory=list)  # softmaxes through which no gradient passed
    order: list[str] = field(default_factory=list)  # leaves in the order in which they ran
    scores: Tensor | None = None  # float32
    loss: float | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by parameter name, times the scale
    error: Exception | None = None


class Recorder(TorchDispatchMode):
    """Watches every operation between `start` and `stop`; see `record`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = Recording()
        self.phase = "forward"
        self._model = model
        self._stack: list[str] = [""]
        self._inputs: list[set[int]] = [set()]
        self._leaves = {name for name, _ in leaves(model)}
        self._parameters = {
            _place(tensor): name
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel() and tensor.device.type != "meta"
        }
        self._checked: dict[int, bool] = {}
        self._made: dict[int, Producer] = {}
        self._events: list[Event] = []
        self._taint: dict[int, int] = {}  # place of a tensor that is not finite -> the event that made it so
        self._masked: set[int] = set()  # places of tensors whose -inf mean "do not look"
        self._literals: set[int] = set()  # places of constants that are not finite: who puts one in made it
        self._labels: dict[Any, str] = {}
        self._ran: set[str] = set()
        self._leaves_run = 0
        self._handles: list[Any] = []

    @property
    def module(self) -> str:
        """The innermost module that is running, forward or backward; "" outside every module."""
        return self._stack[-1]

    def start(self) -> None:
        """Follow the model's modules."""
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True, always_call=True))

    def stop(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._labels.clear()

    def follow_backward(self, loss: Tensor) -> None:
        """From now on operations belong to the module that made the autograd node that runs."""
        self.phase = "backward"
        self._stack = [""]
        for node in _nodes(loss.grad_fn):
            name = self._labels.get(node, "")
            self._handles.append(node.register_prehook(self._running(name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = _read(name, args, kwargs)
        for tensor in inputs:
            self._meet(tensor, inputs)
        sources = {_place(tensor) for tensor in inputs}
        masked = sources & self._masked
        broken = [t for t in inputs if not (self._sound(t) or (_place(t) in masked and _only_masked(t)))]
        tainted = [self._taint[_place(t)] for t in broken if _place(t) in self._taint]
        before = _numbers(inputs) if name.endswith("_") and not broken else {}
        zero_divisors = _zero_divisors(name.rstrip("_"), args)
        out = func(*args, **kwargs)
        outputs = [tensor for tensor in tree_leaves(out) if _is_float(tensor)]
        masking = bool(masked) or name.rstrip("_") in MASKING
        # A view shares its place with what it shows, a finite part of something broken too: marks stay as they are.
        made = [t for t in outputs if name.endswith("_") or _place(t) not in sources]
        converted = name == "_to_copy"
        # The logarithms of a saturated softmax are 0 and -inf as well: in a loss they are no mask.
        shaped = not tainted and not (name.startswith("log") and self.phase == "loss")
        judged = [] if name.startswith(UNINITIALISED) else made
        bad = [tensor for tensor in judged if not self._accepted(tensor, masking, converted, shaped)]
        if bad and all(_place(t) in self._literals for t in broken):
            masked_row = any(_place(t) in masked and _has_masked_row(t) for t in inputs)
            event = self._event(name, inputs, outputs, before or _numbers(inputs), masked_row, zero_divisors)
            self._events.append(event)
            tainted = [len(self._events) - 1]
        if not inputs:
            self._literals.update(_place(tensor) for tensor in bad)
        for tensor in bad:
            if tainted:
                self._taint[_place(tensor)] = min(tainted)
        if self.phase == "backward":
            self._note_saturation(name, inputs, outputs, kwargs)
        producer = self._producer(name, inputs)
        self._made.update((_place(tensor), producer) for tensor in made)
        return out

    def _meet(self, tensor: Tensor, inputs: list[Tensor]) -> None:
        """Judge a tensor that no operation made and no module holds: a mask of the caller's, or a broken input."""
        place = _place(tensor)
        if place in self._parameters or place in self._made or place in self._taint or place in self._masked:
            return
        if all_finite(tensor):
            return
        if _only_masked(tensor):
            self._masked.add(place)
            return
        self._events.append(self._event("input", [tensor], inputs, _numbers([tensor]), False))
        self._taint[place] = len(self._events) - 1

    def _sound(self, tensor: Tensor) -> bool:
        """Whether an input is finite; a parameter, which no pass changes, is looked at once."""
        place = _place(tensor)
        if place not in self._parameters:
            return all_finite(tensor)
        if place not in self._checked:
            self._checked[place] = all_finite(tensor)
        return self._checked[place]

    def _accepted(self, output: Tensor, masking: bool, converted: bool, shaped: bool) -> bool:
        """Whether an output is fine: finite, or with -inf where a mask put them; such a place is remembered.

        `shaped`: it may be told for a mask by its values alone.
        """
        place = _place(output)
        self._masked.discard(place)
        self._literals.discard(place)
        self._taint.pop(place, None)
        if all_finite(output):
            return True
        if (masking and _only_masked(output)) or (shaped and _is_mask(output, converted)):
            self._masked.add(place)
            return True
        return False

    def origin(self, *results: Tensor) -> Event | None:
        """The event that made one of `results` not finite: the first of them; None where all are finite."""
        blamed = [self._taint[_place(t)] for t in results if not all_finite(t) and _place(t) in self._taint]
        if not blamed:
            return None
        event = self._events[min(blamed)]
        # What the model's own forward does after its last leaf is done to the scores: its own loss, for one.
        return replace(event, phase="loss") if event.leaves_run == self._leaves_run else event

    def _event(
        self,
        name: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        before: dict[str, float],
        masked_row: bool,
        zero_divisors: int = 0,
    ) -> Event:
        producer = consumer = parameter = None
        if name == "_to_copy" and inputs:
            place = _place(inputs[0])
            parameter = self._parameters.get(place)
            producer = self._made.get(place)
            consumer = self.module if place in self._inputs[-1] else None
        narrowest = min((torch.finfo(tensor.dtype).max for tensor in outputs), default=math.inf)
        if before.get("largest"):
            before["headroom bits"] = math.log2(narrowest / before["largest"])
        if zero_divisors:
            before["zeros divided by"] = float(zero_divisors)
        inside = len(self._stack) > 1
        phase = "loss" if self.phase == "forward" and not inside else self.phase
        own = phase == "forward" and not self.module
        if name.rstrip("_") in SUMS:
            producer = self._producer(name, inputs)
        return Event(
            phase, self.module, name, before, producer, consumer, parameter, masked_row, zero_divisors,
            self._leaves_run if own else None,
        )  # fmt: skip

    def _producer(self, name: str, inputs: list[Tensor]) -> Producer:
        return Producer(name, self.module, hidden=name.rstrip("_") in SUMS and _same_shape(inputs))

    def _note_saturation(self, name: str, inputs: list[Tensor], outputs: list[Tensor], kwargs: Any) -> None:
        if not outputs or "backward" not in name:
            return
        behind = outputs[:1]
        if "attention" in name:
            shares, needed = _shares(*inputs[1:3], scale=kwargs.get("scale"), mask=kwargs.get("attn_mask")), 1.0
            behind = outputs[:2]  # of queries and keys; the values' does not come through the softmax
        elif ("softmax" in name or "sigmoid" in name) and not bool(outputs[0].any()):
            shares, needed = inputs[1], 0.5  # rows of padding are spread evenly, and nothing reads them
        else:
            return
        hard = _hard_rows(shares)
        if bool(inputs[0].any()) and hard >= needed and (shares.shape[-1] > 1 or "sigmoid" in name):
            numbers = {
                "share of rows at 0 and 1": hard,
                "largest gradient before it": _numbers(inputs[:1])["largest"],
                "largest gradient behind it": _numbers(behind)["largest"],
            }
            self.found.saturated.append(Event("backward", self.module, name, numbers))

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            self._inputs.append({_place(tensor) for tensor in tree_leaves((args, kwargs)) if _is_float(tensor)})
            self._leaves_run += name in self._leaves and self.phase == "forward"
            if name in self._leaves and name not in self._ran:
                self._ran.add(name)
                self.found.order.append(name)

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._stack.pop()
            self._inputs.pop()
            if self.phase != "forward":
                return  # a layer that is computed again in the backward pass
            known = {tensor.grad_fn for tensor in tree_leaves((args, kwargs)) if _has_node(tensor)}
            for tensor in _tensors_of(output):
                if not _has_node(tensor):
                    continue
                for node in _nodes(tensor.grad_fn, known):
                    self._labels.setdefault(node, name)  # inner modules have left before

        return leave

    def _running(self, name: str) -> Callable[[Any], None]:
        def run(_: Any) -> None:
            self._stack[:] = [name]

        return run


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """A recorder that follows `model` for a while."""
    recorder = Recorder(model)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


def record(
    model: nn.Module,
    scores: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor] | None = None,
    *,
    scale: float = 1.0,
) -> Recording:
    """Run scores, loss and backward pass once and say what came of it; gradients and buffers are left as found.

    Gradients of everything that the loss depends on, whoever holds it; those of rows come back dense.
    """
    kept: list[tuple[Tensor, Tensor | None]] = [(parameter, parameter.grad) for parameter in model.parameters()]
    with kept_buffers(model), recording(model) as recorder:
        found = recorder.found
        try:
            for parameter, _ in kept:
                parameter.grad = None
            with torch.enable_grad() if loss is not None else torch.no_grad(), recorder:
                values = scores()
                found.scores = values.detach().float()
                found.event = recorder.origin(values)
                if loss is not None:
                    recorder.phase = "loss"
                    total = _scalar(loss(values))
                    found.loss = float(total.detach().float())
                    found.event = found.event or recorder.origin(total)
                    if not total.requires_grad:
                        raise ValueError(
                            "The loss does not depend on any weight that is trained: it was detached, or all weights "
                            "are frozen."
                        )
                    known = {id(parameter) for parameter, _ in kept}
                    others = [leaf for leaf in _leaves_of(total) if id(leaf) not in known]
                    kept += [(leaf, leaf.grad) for leaf in others]
                    for leaf in others:
                        leaf.grad = None
                    recorder.follow_backward(total)
                    (total * scale).backward()
                    found.gradients = {
                        name: p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
                        for name, p in model.named_parameters()
                        if p.grad is not None
                    }
                    found.event = found.event or recorder.origin(*found.gradients.values())
        except (RuntimeError, ValueError, IndexError) as error:  # a loss that checks its labels itself
            found.error = error
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
    return found


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that a pass changes, running statistics for example, have their values back afterwards."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


def _nodes(start: Any, outside: Set[Any] = frozenset()) -> list[Any]:
    """Autograd nodes reachable from `start`, without those `outside` and what lies behind them."""
    found, waiting, seen = [], deque([start]), set(outside)
    while waiting:
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _leaves_of(total: Tensor) -> list[Tensor]:
    """The tensors that get a gradient of `total`."""
    return [node.variable for node in _nodes(total.grad_fn) if hasattr(node, "variable")]


def _scalar(total: Any) -> Tensor:
    if isinstance(total, Tensor) and total.numel() == 1:
        return total.reshape(())
    came = f"a tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
    raise ValueError(f"A loss is one number, a tensor of one element; it gave {came}. Take the mean of its elements.")


def _tensors_of(output: Any) -> list[Any]:
    return (
        list(output.values()) if hasattr(output, "values") and not isinstance(output, Tensor) else tree_leaves(output)
    )


def _has_node(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _is_float(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.device.type != "meta"
        and value.layout is torch.strided  # another layout has no one place in memory
    )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _read(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation reads: not the one it overwrites, nor `out`."""
    given = args[1:] if name.endswith(OVERWRITTEN) else args
    named = {key: value for key, value in kwargs.items() if key != "out"}
    return [tensor for tensor in tree_leaves((given, named)) if _is_float(tensor)]


def _only_masked(tensor: Tensor) -> bool:
    """Whether what is not finite is -inf."""
    return not bool((tensor.isnan() | (tensor == math.inf)).any())


def _is_mask(tensor: Tensor, converted: bool) -> bool:
    """Whether a tensor is an additive mask: 0 where to look, -inf or a very low number elsewhere, and nothing else.

    A mask without any 0 is one only where a low number was converted into -inf: logarithms of 0 are none.
    """
    if tensor.numel() < 2 or not _only_masked(tensor):
        return False
    looks = tensor == 0
    alone = converted and tensor.ndim == ATTENTION_NDIM
    return bool((looks | (tensor < MASKED)).all()) and (alone or bool(looks.any()))


def _shares(query: Tensor, key: Tensor, *, scale: float | None, mask: Tensor | None) -> Tensor:
    """What a fused attention gives each key, without causality: exactly 0 and 1 there means so with it."""
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores.masked_fill(mask == -math.inf, -math.inf)).softmax(-1)


def _hard_rows(shares: Tensor) -> float:
    """The share of rows that are exactly 0 and 1."""
    return float(((shares == 0) | (shares == 1)).all(dim=-1).float().mean())


def _zero_divisors(operation: str, args: Any) -> int:
    """How many zeros an operation divides by."""
    power = operation == "pow" and isinstance(args[1], int | float) and args[1] < 0
    if operation != "div" and operation not in INVERTED and not power:
        return 0
    divisor = args[1] if operation == "div" else args[0]
    return int((divisor == 0).sum()) if isinstance(divisor, Tensor) else int(divisor == 0)


def _has_masked_row(scores: Tensor) -> bool:
    return bool((scores == -math.inf).all(dim=-1).any())


def _same_shape(inputs: list[Tensor]) -> bool:
    return len(inputs) == 2 and inputs[0].shape == inputs[1].shape and inputs[0].ndim > 1


def _numbers(inputs: list[Tensor]) -> dict[str, float]:
    values = [tensor.detach().float() for tensor in inputs if tensor.numel()]
    if not values:
        return {}
    finite = [value[value.isfinite()].abs() for value in values]
    largest = max((float(value.max()) for value in finite if value.numel()), default=0.0)
    zeros = sum(int((value == 0).sum()) for value in values) / sum(value.numel() for value in values)
    return {"largest": largest, "share of zeros": zeros}


def _clamped(value: Any) -> Any:
    masks = _is_float(value) and not all_finite(value) and _only_masked(value)
    return value.clamp(min=torch.finfo(value.dtype).min) if masks else value


class _ClampedMasks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not name.endswith("_"):  # a mask that the caller gave
            args, kwargs = tree_map(_clamped, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        masks = name.rstrip("_") in (*MASKING, "_to_copy", "mul", "sub", "add")
        if not masks or not isinstance(out, Tensor) or not _is_float(out) or all_finite(out):
            return out
        lowest = torch.finfo(out.dtype).min
        return out.masked_fill_(out == -math.inf, lowest) if name.endswith("_") else out.clamp(min=lowest)


def clamped_masks() -> TorchDispatchMode:
    """While it is active, masks hold the format's lowest number where they would hold -inf."""
    return _ClampedMasks()
