"""GELU for training on CPUs: with numba one pass over memory forward and one back.

Two thirds of the time of torch's own. Only while a model trains: who scores would wait longer for the kernels to
compile than they save.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.activations import GELUActivation

from halfrank.model.dropout import COMPILED
from halfrank.numerics.widen import has_numba


def is_gelu(module: nn.Module) -> bool:
    """Whether a module is the exact GELU, with the normal distribution itself and no approximation of it."""
    if type(module) is GELUActivation:
        return module.act is F.gelu
    return type(module) is nn.GELU and module.approximate == "none"


def module_gelu(module: nn.Module, x: Tensor) -> Tensor:
    """What stands in for the forward of a module that `is_gelu`."""
    return _Gelu.apply(x) if module.training and _own(x) else F.gelu(x)


def use_once(dtype: torch.dtype) -> None:
    """Compile what compiles when it is first used."""
    x = torch.zeros(1, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        (_Gelu.apply(x) if _own(x) else F.gelu(x)).backward()


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        from halfrank.numerics import compiled_gelu

        return compiled_gelu.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # Torch's own has a gradient too, where somebody asks for a second one.
        if torch.is_grad_enabled() or not (_own(x) and _own(grad)):
            return torch.ops.aten.gelu_backward(grad, x)
        from halfrank.numerics import compiled_gelu

        return compiled_gelu.gelu_back(grad, x)


def _own(x: Tensor) -> bool:
    """Whether kernels of our own do it; who watches torch's operations, or has shapes alone, would not see numba's."""
    known = type(x) is Tensor and x.device.type == "cpu" and x.dtype in COMPILED
    there = known and torch._C._has_storage(x) and not x.is_neg()  # its own numbers lie at its address
    return there and has_numba() and not is_in_torch_dispatch_mode()
