"""Weights converted while transformers reads them: a float32 file becomes a 16-bit model without a float32 copy.

transformers maps a file into memory and converts what it finds there. Every page that was looked at stays in the
process's memory until the whole model is read, so a float32 file costs 4 bytes a weight beside the 2 of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils

from halfrank.model.pieces import TensorFile

_one_at_a_time = threading.RLock()


@contextmanager
def converting_as_read() -> Iterator[None]:
    """While it lasts, transformers converts a piece at a time; tensors that keep their format are mapped, as usual."""
    with _one_at_a_time:
        usual = modeling_utils.safe_open

        def opened(path: Any, *args: Any, **settings: Any) -> _File:
            return _File(usual(path, *args, **settings), path)

        modeling_utils.safe_open = opened
        try:
            yield
        finally:
            modeling_utils.safe_open = usual


class _File:
    """What `safe_open` gives, with slices of our own."""

    def __init__(self, plain: Any, path: Any) -> None:
        self._plain, self._stored = plain, TensorFile(path)

    def __enter__(self) -> _File:
        self._plain.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._plain.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._plain.get_slice(name), self._stored, name)


class _Slice:
    """A tensor of a file, before it is read."""

    def __init__(self, plain: Any, stored: TensorFile, name: str) -> None:
        self._plain, self._stored, self._name = plain, stored, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def __getitem__(self, place: Any) -> Any:
        return _Unread(self._plain, self._stored, self._name) if place is Ellipsis else self._plain[place]


class _Unread:
    """All of a tensor, which is read when its format and device are known."""

    def __init__(self, plain: Any, stored: TensorFile, name: str) -> None:
        self._plain, self._stored, self._name = plain, stored, name

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        stored = self._stored.dtype(self._name)
        if (
            stored is None
            or dtype is None
            or stored is dtype
            or not (stored.is_floating_point and dtype.is_floating_point)
        ):
            return self._plain[...].to(device=device, dtype=dtype)
        return self._stored.read(self._name, dtype).to(device=device)
