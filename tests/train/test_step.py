"""One training step: how often it reads a number back, which is how often it waits where the model is on a GPU."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfrank.data.pairs import Pair
from halfrank.losses import LOSSES
from halfrank.model import folder, storage
from halfrank.numerics import adamw, formats
from halfrank.numerics.scaling import LossScale
from halfrank.train import step
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs, micro_batches
from halfrank.train.loop import make_optimizer
from tiny import PAIRS, SIZES, make_folder

LABELLED = [Pair(query, document, float(i % 2)) for i, (query, document) in enumerate(PAIRS)]
# On a CPU the keys of dropout are drawn and read, which no GPU does.
STILL = {f"{name}_dropout_prob": 0.0 for name in ("hidden", "attention_probs", "classifier")}
# What needs numbers, or how many of them there are, before it can go on.
WAITS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal,
    torch.ops.aten.is_nonzero, torch.ops.aten._unique2, torch.ops.aten.unique_consecutive,
}  # fmt: skip


class Waiting(TorchDispatchMode):
    """Notes every operation that a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITS:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.found.append(f"{func} in {Path(frames[-2].filename).name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", sorted(SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_waits_once(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = folder.LoadOptions(dtype=dtype, compute="float32", config=STILL)
    scorer = folder.load(make_folder(family, tmp_path / family), options)
    parts = micro_batches(from_pairs(LABELLED, scorer.pairs), range(8), max_tokens=120, per_unit=False)
    assert len(parts) > 1
    optimizer, scale = make_optimizer(scorer, TrainConfig(lr=1e-3)), LossScale()
    optimizer._update = adamw._backend("torch")  # what a GPU takes
    reads: list[int] = []

    def read(numbers: Any) -> list[float]:
        reads.append(len(numbers))
        return formats.read_at_once(numbers)

    monkeypatch.setattr(step, "read_at_once", read)
    monkeypatch.setattr(storage, "comes_as_rows", lambda *_, **__: False)  # as on a GPU
    monkeypatch.setattr(adamw, "largest_of_each", lambda tensors: [1 / 0 for _ in tensors])  # another wait
    scorer.model.train()
    with Waiting() as waiting:
        results = [step.train_step(scorer, parts, LOSSES["bce"].function, optimizer, scale, clip=1.0) for _ in range(2)]
    assert all(result.stored for result in results)
    assert len(reads) == 2
    # Of a decoder transformers asks whether the row is packed, before anything is in the queue.
    assert [wait for wait in waiting.found if not wait.endswith("masking_utils.py")] == []
    narrow = sum(p.dtype is not torch.float32 for p in scorer.model.parameters())
    assert reads[1] == 2 + narrow  # loss, norm, and each weight whose edge is near; float32 is known by then
