"""Formats are chosen by facts: the products of a 16-bit model are 16-bit exactly where the hardware has them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from halfrank import CrossEncoder, precision
from halfrank.precision import Facts, Hardware, choose, detect
from tiny import PAIRS, make_folder

PLAIN = Hardware("cpu", False, False, "CPU with no 16-bit arithmetic")
BRAIN = Hardware("cpu", False, True, "CPU with amx_bf16, avx512_bf16")
BOTH = Hardware("cuda", True, True, "CUDA capability 9.0")


@pytest.mark.parametrize(
    ("arrived", "hardware", "compute"),
    [
        (torch.float32, PLAIN, "float32"),
        (torch.float32, BRAIN, "float32"),
        (torch.bfloat16, PLAIN, "float32"),
        (torch.bfloat16, BRAIN, "bfloat16"),
        (torch.float16, PLAIN, "float32"),
        (torch.float16, BRAIN, "float32"),  # fewer mantissa bits than the weights have
        (torch.float16, BOTH, "float16"),
    ],
)
def test_products_of_a_small_model(arrived: torch.dtype, hardware: Hardware, compute: str) -> None:
    found = choose(Facts(22_000_000, arrived, hardware))
    assert found.compute.name == compute
    assert found.storage is arrived
    assert hardware.why in found.reason or compute == "float32"


@pytest.mark.parametrize(
    ("flags", "half", "brain"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, False, True),
        ({"avx512_bf16": True}, False, True),
        ({"avx512_fp16": True}, True, False),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False, False),
    ],
)
def test_flags_of_a_processor(flags: dict[str, bool], half: bool, brain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert (detect().float16_products, detect().bfloat16_products) == (half, brain)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # oneDNN then has neither
    assert not detect().float16_products
    assert not detect().bfloat16_products


def test_bfloat16_weights_compute_as_the_processor_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder("bert", tmp_path / "source", dtype=torch.bfloat16)
    for flags, wanted in (({"amx_bf16": True}, "bfloat16"), ({}, "float32")):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: set(flags))
        model = CrossEncoder(source, device="cpu")
        assert f"{wanted} products" in repr(model)
        exact = CrossEncoder(source, compute="float32", device="cpu").predict(PAIRS)
        error = abs(model.predict(PAIRS) - exact).max()
        assert error < 0.01
        assert bool(error > 1e-6) == (wanted == "bfloat16")


@pytest.mark.skipif(not detect().bfloat16_products, reason="this processor has no bfloat16 products")
def test_bfloat16_products_are_faster_where_auto_chooses_them() -> None:
    torch.set_num_threads(1)
    inputs, weight = torch.randn(1024, 768), torch.randn(3072, 768)

    def seconds(dtype: torch.dtype) -> float:
        a, b = inputs.to(dtype), weight.to(dtype)
        best = float("inf")
        for _ in range(6):
            started = time.thread_time()  # other processes count for nothing
            torch.nn.functional.linear(a, b)
            best = min(best, time.thread_time() - started)
        return best

    assert seconds(torch.bfloat16) < seconds(torch.float32)
