"""GELU for training on CPUs: with numba one pass over memory forward and one back.

Two thirds of the time of torch's own. Only while a model trains: who scores would wait longer for the kernels to
compile than they save.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from halfrank.model.dropout import suits_kernels


def is_gelu(module: nn.Module) -> bool:
    """Whether a module is the exact GELU, with the normal distribution itself and no approximation of it."""
    if type(module) is GELUActivation:
        return module.act is F.gelu
    return type(module) is nn.GELU and module.approximate == "none"


def module_gelu(module: nn.Module, x: Tensor) -> Tensor:
    """What stands in for the forward of a module that `is_gelu`."""
    return _Gelu.apply(x) if module.training and suits_kernels(x) else F.gelu(x)


def use_once(dtype: torch.dtype) -> None:
    """Compile what compiles when it is first used."""
    x = torch.zeros(1, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        (_Gelu.apply(x) if suits_kernels(x) else F.gelu(x)).backward()


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
        if torch.is_grad_enabled() or not (suits_kernels(x) and suits_kernels(grad)):
            return torch.ops.aten.gelu_backward(grad, x)
        from halfrank.numerics import compiled_gelu

        return compiled_gelu.gelu_back(grad, x)
