"""AdamW whose state follows the storage of each parameter: 16-bit matrices keep 3 bytes of state an element.

float32 parameters are updated as torch's AdamW does. 16-bit parameters with two or more dimensions keep an int8
residual, an int8 m and a uint8 v. Smaller 16-bit parameters (norms, biases) keep a float32 master and float32 moments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from halfrank.errors import MissingExtraError, NonFiniteUpdateError
from halfrank.numerics import update
from halfrank.numerics.formats import NARROW_DTYPES, dtype_name, largest_of_each, magnitude
from halfrank.numerics.moments import blocks
from halfrank.numerics.noise import keys
from halfrank.numerics.rounding import join
from halfrank.numerics.rows import moved_parts, update_rows
from halfrank.numerics.scaling import values_of
from halfrank.numerics.update import Coefficients, Stored, coefficients

BACKENDS = ("auto", "torch", "numba")
LARGEST_UPDATE = 100.0  # in units of lr, for usual settings: |m| / sqrt(v) is below 8 however the moments are rounded
MARGIN = LARGEST_UPDATE / 7.3  # times the bound of exact moments
LEAST = 2.0**-149  # the smallest float32 above 0
LARGEST_GRADIENT = 1e18  # its square and ten thousand such squares are still finite in float32
PORTION, GPU_PORTION = 1 << 20, 1 << 26  # elements of float32 gradients that are unscaled at a time
Update = Callable[[Stored, Tensor, Coefficients, tuple[int, int]], None]


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) for float32, float16 and bfloat16 parameters alike.

    Sparse gradients, the rows of a table, give the update of the dense ones they stand for.

    `params` are tensors, (name, tensor) pairs or parameter groups; `seed` and the step decide all rounding noise, so
    a run repeats to the bit. `backend` "numba" needs the extra [fast] and gives the same bits as "torch".
    Raises ValueError for settings out of range; `step` raises NonFiniteUpdateError before anything is stored.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler then leaves unscaling to `step`

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be 0 or more and finite; got {lr!r}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1); got {betas!r}.")
        if not np.float32(eps) > 0:
            raise ValueError(f"eps must be above 0 in float32, where it acts; got {eps!r}.")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more; got {weight_decay!r}.")
        self._seed = seed
        self._update = _backend(backend)
        self._sizes: dict[Tensor, tuple[int, float]] = {}  # a bound of each largest weight, and the version it is of
        self._moved: dict[Tensor, tuple[Tensor, tuple[int, int], list[bool]]] = {}  # its m, versions, moved parts
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for index, (_, parameter) in enumerate(self._members()):
            if parameter.dtype not in (torch.float32, *NARROW_DTYPES):
                raise ValueError(
                    f"'{self._name(index)}' is {dtype_name(parameter.dtype)}; halfrank.AdamW takes float32, float16 "
                    "and bfloat16 parameters."
                )

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_divisor: float | Tensor = 1.0,
        gradient_norm: float = math.nan,
        largest: Mapping[Tensor, float] | None = None,
    ) -> Any:
        """Update every parameter that has a gradient, in place.

        Gradients are divided by `grad_divisor` (loss scale over clip factor) in float32, inside the update. Who knows
        the norm of all of them as they lie, which no element exceeds, gives it and saves a pass over them; who has read
        `unknown_sizes` since weights were last written to gives the numbers as `largest`, and no GPU is waited for.
        Neither is checked: a number that is too small may take a weight out of its format.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = getattr(self, "found_inf", None)  # set by torch's GradScaler
        if found is not None and float(found) > 0:
            return loss
        scale = getattr(self, "grad_scale", None)
        divisor = _checked_divisor(float(grad_divisor) * (1.0 if scale is None else float(scale)))
        todo = [entry for entry in enumerate(self._members()) if entry[1][1].grad is not None]
        for _, (_, parameter) in todo:
            _lay_out(parameter)
        sizes = self._check(todo, divisor, gradient_norm, largest or {})
        self._step_wide([entry for entry in todo if not _is_packed(entry[1][1])], divisor)
        for index, (group, parameter) in todo:
            if _is_packed(parameter):
                self._step_packed(index, group, parameter, self._state_of(parameter), divisor)
        for (_, (group, parameter)), size in zip(todo, sizes, strict=True):
            if parameter.dtype is torch.float32:
                self._sizes[parameter] = (parameter._version, _reach(group, size))
        return loss

    def unknown_sizes(self) -> dict[Tensor, Tensor]:
        """The largest magnitude of each parameter with a gradient that `step` has to look up: float32 0-d, not read."""
        members = [(group, parameter) for group, parameter in self._members() if parameter.grad is not None]
        return {
            parameter: magnitude(parameter)
            for (_, parameter), known in zip(members, self._known(members), strict=True)
            if not known
        }

    def allocate(self) -> None:
        """Make the state of every trainable parameter that has none: later steps only write into it."""
        for _, parameter in self._members():
            if parameter.requires_grad:
                self._state_of(parameter)

    @property
    def noise(self) -> tuple[int, int]:
        """What decides the rounding noise of the next step: the seed, and how many steps 16-bit weights have seen."""
        return self._seed, max((int(state["step"]) for state in self.state.values() if "residual" in state), default=0)

    def certain(self) -> bool:
        """Whether no update at the present rates can leave its format, whatever the gradients are."""
        members = [(group, parameter) for group, parameter in self._members() if parameter.requires_grad]
        return all(_far_inside(*member, size) for member, size in zip(members, self._bounds(members, {}), strict=True))

    @torch.no_grad()
    def step_one(self, parameter: Tensor, *, grad_divisor: float = 1.0) -> None:
        """Update one parameter in place by its gradient, dense or rows: the bits that `step` gives.

        The caller knows that all gradients of the step are finite, and that `certain` holds.
        """
        index, group = self._places()[id(parameter)]
        _checked_divisor(grad_divisor)
        _lay_out(parameter)
        if _is_packed(parameter):
            self._step_packed(index, group, parameter, self._state_of(parameter), grad_divisor)
        else:
            self._step_wide([(index, (group, parameter))], grad_divisor)

    def exact(self, parameter: Tensor) -> Tensor:
        """The float32 value that a parameter and its state stand for."""
        state = self.state.get(parameter, {})
        if "residual" in state:
            return join(parameter.detach(), state["residual"].view_as(parameter))
        return state["master"].clone() if "master" in state else parameter.detach().float().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state to the bit: torch's own loader would cast the codes to the parameters' dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        members = [parameter for _, parameter in self._members()]
        for index, entry in state_dict["state"].items():
            parameter = members[int(index)]
            expected = _fresh(torch.empty_like(parameter, device="meta"))  # its keys only: nothing is allocated
            if entry.keys() != expected.keys() or entry.get("format") != expected.get("format"):
                raise ValueError(
                    f"The state of '{self._name(int(index))}' was made by another optimizer or for another format "
                    f"({_kind(entry)}); this one is {_kind(expected)}. Start with a fresh optimizer."
                )
            for key, value in expected.items():
                if isinstance(value, Tensor) and value.ndim and entry[key].shape != value.shape:
                    raise ValueError(
                        f"The state of '{self._name(int(index))}' was made for another shape: its {key} is "
                        f"{tuple(entry[key].shape)}, this one's {tuple(value.shape)}. Start with a fresh optimizer."
                    )
            self.state[parameter] = {
                key: value.to(parameter.device).clone() if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle of the optimizer holds; what is only remembered is looked up again."""
        return {**super().__getstate__(), "_seed": self._seed, "_update": self._update}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sizes, self._moved = {}, {}
        super().__setstate__(state)

    def _members(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]

    def _places(self) -> dict[int, tuple[int, dict[str, Any]]]:
        return {id(parameter): (index, group) for index, (group, parameter) in enumerate(self._members())}

    def _name(self, index: int) -> str:
        names = [
            name for group in self.param_groups for name in group.get("param_names", [None] * len(group["params"]))
        ]
        return names[index] or f"parameter {index}"

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state.update(_fresh(parameter))
        elif state.get("format") != _format(parameter):
            raise ValueError(
                f"A parameter is {dtype_name(parameter.dtype)} now and was {state.get('format', 'float32')} when its "
                "optimizer state was made. Make a new optimizer after changing a model's format."
            )
        return state

    def _known(self, members: list[tuple[dict[str, Any], Tensor]]) -> list[bool]:
        """Of which parameters the last update left a bound of the largest weight.

        Of float32 alone: its edge is so far that a write past torch's count of versions does no harm.
        """
        known = []
        for group, parameter in members:
            version, size = self._sizes.get(parameter, (-1, math.nan))
            known.append(version == parameter._version and _far_inside(group, parameter, size))
        return known

    def _bounds(self, members: list[tuple[dict[str, Any], Tensor]], largest: Mapping[Tensor, float]) -> list[float]:
        """What no weight of each parameter exceeds: known, among the `largest` that were read, or looked up."""
        bounds = dict(largest) | {
            parameter: self._sizes[parameter][1]
            for (_, parameter), known in zip(members, self._known(members), strict=True)
            if known
        }
        missing = [parameter for _, parameter in members if parameter not in bounds]
        bounds |= zip(missing, largest_of_each(missing), strict=True)
        return [bounds[parameter] for _, parameter in members]

    def _check(
        self,
        todo: list[tuple[int, tuple[dict[str, Any], Tensor]]],
        divisor: float,
        norm: float,
        largest: Mapping[Tensor, float],
    ) -> list[float]:
        """Bounds of the weights before the update; raise unless it is certain to be finite and within its format."""
        gradients = [values_of(parameter.grad) for _, (_, parameter) in todo if parameter.grad is not None]
        enough = norm / divisor <= LARGEST_GRADIENT  # not for NaN
        reaches = [norm / divisor] * len(todo) if enough else [r / divisor for r in largest_of_each(gradients)]
        sizes = self._bounds([member for _, member in todo], largest)
        for (index, (group, parameter)), reach, size in zip(todo, reaches, sizes, strict=True):
            if not reach <= LARGEST_GRADIENT:
                raise NonFiniteUpdateError(
                    f"The gradient of '{self._name(index)}' reaches {reach:g}: nothing of this step was stored. "
                    "Lower the loss scale, or look for the pair that caused it."
                )
            if not _far_inside(group, parameter, size) and not self._tried(index, group, parameter, divisor):
                raise NonFiniteUpdateError(
                    f"The update takes '{self._name(index)}' beyond {torch.finfo(parameter.dtype).max:g}, the largest "
                    f"{dtype_name(parameter.dtype)} number (its largest weight is {abs(size):g}): nothing of this step "
                    "was stored. Lower the learning rate."
                )
        return sizes

    def _tried(self, index: int, group: dict[str, Any], parameter: Tensor, divisor: float) -> bool:
        """Whether the update stays finite, tried on copies: the rare case near the edge of the format."""
        copy = parameter.detach().clone()
        copy.grad = None if parameter.grad is None else parameter.grad.to_dense()
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.state.get(parameter, {}).items()}
        if _is_packed(parameter):
            self._step_packed(index, group, copy, state or _fresh_packed(copy), divisor)
        else:
            _wide_update([copy], [state or _fresh_wide(copy)], group, divisor)
        return bool(copy.isfinite().all())

    def _step_wide(self, entries: list[tuple[int, tuple[dict[str, Any], Tensor]]], divisor: float) -> None:
        for group in self.param_groups:
            members = [parameter for _, (owner, parameter) in entries if owner is group]
            dense = [parameter for parameter in members if parameter.grad is not None and not parameter.grad.is_sparse]
            _wide_update(dense, [self._state_of(parameter) for parameter in dense], group, divisor)
            for parameter in dense:
                self._moved.pop(parameter, None)  # torch's count of versions passes over its fused kernel
            for parameter in members:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, parameter.grad, group, divisor)

    def _step_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], divisor: float) -> None:
        state = self._state_of(parameter)
        m, v = state["m"], state["v"]
        of, versions, moved = self._moved.get(parameter, (m, (-1, -1), []))
        if of is not m or versions != (m._version, v._version):  # the first step, or someone wrote to the moments
            moved = moved_parts(m, v)

        def one(target: Tensor, dense: Tensor, m: Tensor, v: Tensor) -> None:
            _torch_update([_Piece(target, dense, m, v, state["step"].clone())], 1.0, group)

        decay = float(group["lr"]) * group["weight_decay"]
        update_rows(parameter.detach(), gradient, m, v, moved, divisor=divisor, decay=decay, update=one)
        state["step"] += 1
        self._moved[parameter] = (m, (m._version, v._version), moved)

    def _step_packed(
        self, index: int, group: dict[str, Any], parameter: Tensor, state: dict[str, Any], divisor: float
    ) -> None:
        assert parameter.grad is not None
        state["step"] += 1
        numbers = coefficients(
            state["step"], lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], divisor=divisor,
        )  # fmt: skip
        weight = parameter.detach()
        flat = weight.contiguous().view(-1)
        parts = Stored(flat, state["residual"].view(-1), state["m"], state["v"], state["v_scale"])
        apply = self._update if parameter.device.type == "cpu" else update.update_
        apply(parts, parameter.grad.detach().contiguous().view(-1), numbers, keys(self._seed, state["step"], index))
        if not weight.is_contiguous():
            weight.copy_(flat.view_as(weight))


def _backend(name: str) -> Update:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}.")
    if name == "torch" or (name == "auto" and find_spec("numba") is None):
        return update.update_
    if find_spec("numba") is None:
        raise MissingExtraError("The numba backend needs the extra [fast]: pip install 'halfrank[fast]'.")
    from halfrank.numerics import compiled  # compiled on first use: half a second at import

    return compiled.update_


def _checked_divisor(divisor: float) -> float:
    if not abs(divisor) > 1.0 / torch.finfo(torch.float32).max:
        raise ValueError(f"grad_divisor must be so far from 0 that 1 over it is a float32 number; got {divisor!r}.")
    return divisor


def _lay_out(parameter: Tensor) -> None:
    """Give a parameter's gradient the layout that its update reads: rows for a float32 table on a CPU, else dense."""
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return
    table = parameter.dtype is torch.float32 and parameter.ndim == 2 and gradient.sparse_dim() == 1
    rows = table and parameter.device.type == "cpu" and parameter.is_contiguous()
    parameter.grad = gradient.coalesce() if rows else gradient.to_dense()


def _is_packed(parameter: Tensor) -> bool:
    return parameter.dtype in NARROW_DTYPES and parameter.ndim >= 2


def _format(parameter: Tensor) -> str | None:
    return dtype_name(parameter.dtype) if parameter.dtype in NARROW_DTYPES else None


def _fresh(parameter: Tensor) -> dict[str, Any]:
    return _fresh_packed(parameter) if _is_packed(parameter) else _fresh_wide(parameter)


def _fresh_packed(parameter: Tensor) -> dict[str, Any]:
    count, device = parameter.numel(), parameter.device
    return {
        "step": 0,
        "format": _format(parameter),
        "residual": torch.zeros(parameter.shape, dtype=torch.int8, device=device),
        "m": torch.zeros(count, dtype=torch.int8, device=device),
        "v": torch.zeros(count, dtype=torch.uint8, device=device),
        "v_scale": torch.zeros(blocks(count), dtype=torch.float32, device=device),
    }


def _fresh_wide(parameter: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.float32),
        "m": torch.zeros_like(parameter, dtype=torch.float32),
        "v": torch.zeros_like(parameter, dtype=torch.float32),
    }
    if parameter.dtype in NARROW_DTYPES:
        state["master"] = parameter.detach().float()
        state["format"] = _format(parameter)
    return state


def _far_inside(group: dict[str, Any], parameter: Tensor, size: float) -> bool:
    return _reach(group, size) < torch.finfo(parameter.dtype).max


def _reach(group: dict[str, Any], size: float) -> float:
    """What a weight of `size` may come to in one update."""
    return float(size + group["lr"] * (_largest_update(*group["betas"], group["eps"]) + group["weight_decay"] * size))


@cache
def _largest_update(beta1: float, beta2: float, eps: float) -> float:
    """What an update may come to in units of lr; without a bound where m outlives v.

    |m| / sqrt(v) is at most (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), by the Cauchy-Schwarz inequality. Where v is too
    small for float32, m over eps is left.
    """
    if beta1 and beta1**2 >= beta2:
        return math.inf
    ratio = (1 - beta1) / math.sqrt((1 - beta2) * (1 - (beta1**2 / beta2 if beta1 else 0.0)))
    vanished = math.sqrt(LEAST / (1 - beta2)) / ((1 - beta1) * eps)
    return max(LARGEST_UPDATE, MARGIN * ratio, MARGIN * vanished)


@dataclass(frozen=True)
class _Piece:
    """A part of a float32 parameter, or of a master, with what belongs to it; all of one shape."""

    target: Tensor
    gradient: Tensor
    m: Tensor
    v: Tensor
    step: Tensor  # its own: the fused kernel counts it up

    @property
    def fusible(self) -> bool:
        """The fused kernel walks memory: it is right only where all four tensors lie alike."""
        alike = {tensor.stride() for tensor in (self.target, self.gradient, self.m, self.v)}
        return len(alike) == 1 and self.target.device.type in ("cpu", "cuda")


def _portion(device: torch.device, divisor: float) -> int:
    """How many elements are updated at a time: any number where nothing is made of the gradients first."""
    if divisor == 1.0:
        return sys.maxsize
    return PORTION if device.type == "cpu" else GPU_PORTION


def _pieces(target: Tensor, gradient: Tensor, state: dict[str, Any], divisor: float) -> Iterator[_Piece]:
    """All of a tensor, in portions where it lies in one row: what is made of a small one stays in the cache."""
    tensors = (target, gradient, state["m"], state["v"])
    portion = _portion(target.device, divisor)
    cut: Iterable[tuple[Tensor, ...]] = [tensors]
    if target.numel() > portion and all(tensor.is_contiguous() for tensor in tensors):
        cut = zip(*(tensor.view(-1).split(portion) for tensor in tensors), strict=True)
    for part, given, m, v in cut:
        yield _Piece(part, given, m, v, state["step"].to(target.device, copy=True))


def _in_portions(pieces: Iterable[_Piece], divisor: float) -> Iterator[list[_Piece]]:
    """Neighbours of one device and one kind together, as many elements at a time as a portion has."""
    taken: list[_Piece] = []
    count, of = 0, None
    for piece in pieces:
        kind, elements = (piece.target.device, piece.fusible), piece.target.numel()
        if taken and (kind != of or count + elements > _portion(piece.target.device, divisor)):
            yield taken
            taken, count = [], 0
        taken.append(piece)
        count, of = count + elements, kind
    if taken:
        yield taken


def _kind(state: dict[str, Any]) -> str:
    return f"{state.get('format', 'float32 or unknown')} with {', '.join(sorted(state)) or 'nothing'}"


def _wide_update(parameters: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], divisor: float) -> None:
    """AdamW in float32 by torch's fused kernel, on the parameters or on their masters."""
    for parameter, state in zip(parameters, states, strict=True):
        if "master" in state:
            # Weights that someone wrote over since the last step (a loaded state, a reset) are the ones to train.
            written = state["master"].to(parameter.dtype) != parameter.detach()
            state["master"] = torch.where(written, parameter.detach().float(), state["master"])
    todo = [
        (state.get("master", parameter).detach(), parameter.grad, state)
        for parameter, state in zip(parameters, states, strict=True)
        if parameter.grad is not None
    ]
    for here in _in_portions((piece for each in todo for piece in _pieces(*each, divisor)), divisor):
        _torch_update(here, divisor, group)
    for parameter, state in zip(parameters, states, strict=True):
        state["step"] += 1
        if "master" in state:
            parameter.detach().copy_(state["master"])


def _torch_update(pieces: list[_Piece], divisor: float, group: dict[str, Any]) -> None:
    """AdamW of pieces that are alike, by torch's fused kernel where it can."""
    torch_adamw(
        [piece.target for piece in pieces],
        [_unscaled(piece.gradient, divisor) for piece in pieces],
        [piece.m for piece in pieces],
        [piece.v for piece in pieces],
        [],
        [piece.step for piece in pieces],
        foreach=False,
        fused=pieces[0].fusible,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _unscaled(gradient: Tensor, divisor: float) -> Tensor:
    """The float32 gradient; a new tensor where it is scaled: the caller's stay as they are."""
    wide = gradient.detach().float()
    return wide * (1.0 / divisor) if divisor != 1.0 else wide
