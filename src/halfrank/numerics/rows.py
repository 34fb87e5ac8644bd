"""AdamW of a float32 embedding table whose gradient is rows: the bits of a dense gradient, without its memory.

The table goes through torch's fused kernel a part at a time, with a dense gradient of that part alone, in the cache.
Parts that no gradient has reached have moments of 0: an update leaves them, apart from their decay.
Shapes: V rows of D elements, P parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PART = 1 << 20  # elements: weight, moments and gradient of a part stay in the cache
VECTOR = 16  # elements of the widest vector of a CPU


def moved_parts(m_VD: Tensor, v_VD: Tensor) -> list[bool]:
    """Which parts an update without a gradient would still move."""
    size = _size(m_VD)
    return [
        bool(m.count_nonzero()) or bool(v.count_nonzero())
        for m, v in zip(m_VD.split(size), v_VD.split(size), strict=True)
    ]


def update_rows(
    weight_VD: Tensor,
    gradient: Tensor,
    m_VD: Tensor,
    v_VD: Tensor,
    moved: list[bool],
    *,
    divisor: float,
    decay: float,
    update: Callable[[Tensor, Tensor, Tensor, Tensor], None],
) -> None:
    """Update weight, moments and `moved` in place by coalesced rows over `divisor`.

    `update` takes weight, dense gradient and both moments of a part; a part without moments loses its share `decay`.
    """
    size = _size(weight_VD)
    parts = list(zip(*(tensor.split(size) for tensor in (weight_VD, m_VD, v_VD)), strict=True))
    ids, rows = gradient.indices()[0], gradient.values()
    rows = rows if divisor == 1.0 else rows * (1.0 / divisor)
    ends = torch.searchsorted(ids, torch.arange(1, len(parts) + 1) * size).tolist()
    spare = torch.zeros_like(parts[0][0])
    for number, (weight, m, v) in enumerate(parts):
        here = slice(0 if number == 0 else ends[number - 1], ends[number])
        moved[number] = moved[number] or bool(rows[here].any())
        if not moved[number]:
            if decay:
                weight.mul_(1 - decay)
            continue
        dense, places = spare[: len(weight)], ids[here] - number * size
        dense.index_copy_(0, places, rows[here])
        update(weight, dense, m, v)
        dense.index_fill_(0, places, 0.0)


def _size(table_VD: Tensor) -> int:
    # Whole vectors: the last elements beyond them would be rounded by the kernel's other code.
    return max(PART // max(table_VD.shape[1], 1) // VECTOR, 1) * VECTOR
