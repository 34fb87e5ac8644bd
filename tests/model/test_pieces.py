"""Weights in files: the bytes of safetensors' own writer, shards both ways, and no second copy in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from halfrank.data.packing import pack
from halfrank.errors import ModelError
from halfrank.model import folder
from halfrank.model.pieces import PIECE, Source, TensorFile, write_file
from halfrank.numerics.rounding import join
from tiny import PAIRS, make_folder, tokenizer_for

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20
SLACK = 24 * MIB  # pieces in flight, headers, the tokenizer


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "zeta": torch.randn(3, 5), "alpha": torch.randn(PIECE + 7).half(), "mé": torch.randn(2, 2).bfloat16(),
        "codes": torch.arange(-9, 9, dtype=torch.int8), "none": torch.zeros(0, 4), "step": torch.tensor(7.0),
        "ids": torch.arange(5), "bytes": torch.arange(9, dtype=torch.uint8), "flag": torch.tensor([True, False]),
    }  # fmt: skip


def test_the_bytes_are_those_of_the_formats_own_writer(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs", metadata={"format": "pt"})
    ours = {name: Source(tensor, tensor.dtype) for name, tensor in tensors().items()}
    write_file(tmp_path / "ours", ours, metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_read_is_what_was_written_converted_or_not(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "file")
    stored = TensorFile(tmp_path / "file")
    assert set(stored) == set(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(stored[name], tensor)
        if tensor.is_floating_point():
            assert torch.equal(stored.read(name, torch.bfloat16), tensor.to(torch.bfloat16))


def test_a_residual_is_joined_across_pieces(tmp_path: Path) -> None:
    weight = torch.randn(2, PIECE).half()
    residual = torch.randint(-127, 127, weight.shape, dtype=torch.int8)
    write_file(tmp_path / "file", {"w": Source(weight, torch.float32, residual)})
    assert torch.equal(load_file(tmp_path / "file")["w"], join(weight, residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shards_are_written_and_read(tmp_path: Path, dtype: torch.dtype) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(dtype=dtype, compute="float32"))
    folder.save(scorer, tmp_path / "one")
    folder.save(scorer, tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in load_file(tmp_path / "one/model.safetensors").values()
    )
    batch = pack(scorer.pairs.encode(PAIRS), range(len(PAIRS)))
    one, many = (folder.load(tmp_path / name, folder.LoadOptions(compute="float32")) for name in ("one", "many"))
    assert torch.equal(one.logits(batch), many.logits(batch))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "many")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor.float(), one.model.state_dict()[name].float())
    folder.save(scorer, tmp_path / "many")  # nothing of the shards is left
    assert sorted(p.name for p in (tmp_path / "many").glob("*.safetensors*")) == ["model.safetensors"]


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    scorer = folder.load(make_folder("bert", tmp_path / "bert"))
    folder.save(scorer, tmp_path / "many", max_shard_size="20KB")
    sorted((tmp_path / "many").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelError):
        folder.load(tmp_path / "many")


MEASURED = """
import sys, torch
from pathlib import Path
from halfrank import allocator
from halfrank.certify import saving
from halfrank.model import folder
source, warm, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), getattr(torch, sys.argv[4])
allocator.steady_allocator()
options = folder.LoadOptions(dtype=dtype, compute="float32", num_labels=1)
saving.save(folder.load(warm, options), out / "warm")  # what is imported or compiled on first use
def peak_of(act):
    Path("/proc/self/clear_refs").write_text("5")
    before = allocator.resident()
    kept = act()
    return kept, allocator.peak_resident() - before
scorer, loading = peak_of(lambda: folder.load(source, options))
held = sum(p.nbytes for p in scorer.model.parameters())
for p in scorer.model.parameters():
    p.data.mul_(1)  # a mapped weight is the process's own once it has been written to
same, saving_same = peak_of(lambda: saving.save(scorer, out / "same"))
_, saving_other = peak_of(lambda: saving.save(scorer, out / "other", dtype=getattr(torch, sys.argv[5])))
print(loading, held, saving_same, saving_other)
"""


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model of 60 million float32 weights, most of them in layers, and the bytes of its largest one in float16."""
    place = tmp_path_factory.mktemp("wide") / "model"
    tokenizer = tokenizer_for("bert")
    config = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), hidden_size=1024, num_hidden_layers=5, num_attention_heads=8,
        intermediate_size=4096, num_labels=1, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=96,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(place, max_shard_size="100MB")
    tokenizer.save_pretrained(place)
    return place, 2 * 1024 * 4096


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(("dtype", "other"), [("float16", "float32"), ("float32", "bfloat16")])
def test_neither_loading_nor_saving_holds_a_second_copy(
    wide_folder: tuple[Path, int], tmp_path: Path, dtype: str, other: str
) -> None:
    source, largest = wide_folder
    warm = make_folder("bert", tmp_path / "warm")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(warm), str(tmp_path), dtype, other],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loading, held, same, converted = (int(number) for number in done.stdout.split())
    width = 2 if dtype == "float16" else 4
    assert held > 60e6 * width
    assert loading <= held + largest * width // 2 + SLACK
    # A narrow copy of all weights would be 120 MB: what is held beside the model is the probes' pass over one layer.
    assert max(same, converted) <= 80e6, (same, converted)
