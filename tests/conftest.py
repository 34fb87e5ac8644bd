"""Every test starts from the same seed, on one thread, without network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HALFRANK_MAX_TOKENS"] = "4096"  # nothing is read from or written to the cache of who runs the tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
