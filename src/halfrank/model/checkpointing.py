"""Activations kept only at the borders of layers: each layer is computed again when its gradients are due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_layers(body: nn.Module) -> Iterator[nn.Module]:
    """The layers that a body repeats: outermost members of module lists that have modules of their own.

    A list of lists is entered; a layer that a body uses several times (ALBERT's) comes once.
    """
    for child in body.children():
        if isinstance(child, nn.ModuleList):
            for member in child:
                if isinstance(member, nn.ModuleList):
                    yield from repeated_layers(nn.ModuleList([member]))
                elif next(member.children(), None) is not None:
                    yield member
        else:
            yield from repeated_layers(child)


def recompute(body: nn.Module) -> Callable[[], None]:
    """Let every repeated layer of `body` keep its inputs alone while training; returns what undoes it.

    The same bits come out: the second pass repeats the first one's random numbers. It needs nothing of the class, so
    that ALBERT and MPNet, which transformers refuses, are no exception.
    """
    layers = list(dict.fromkeys(repeated_layers(body)))
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)

    def undo() -> None:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward

    return undo


def _forward(layer: nn.Module, plain: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return plain(*args, **inputs)
    return checkpoint(partial(plain, **inputs), *args, use_reentrant=False)
