"""What a plan says, against what is really held."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from typer.testing import CliRunner

from halfrank import CrossEncoder, InputExample, allocator, cli, memory, precision
from halfrank.cli import app
from halfrank.cross_encoder import face, fitting
from halfrank.data.packing import pack
from halfrank.data.pairs import Pair
from halfrank.errors import DoesNotFitError, MemoryExhaustedError, MemoryLimitError, ModelError, TrainingError
from halfrank.model import adapters, folder, storage
from halfrank.model.shadow import trace
from halfrank.precision import Hardware
from halfrank.score import score
from halfrank.train import planning
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from tiny import MORE_SIZES, PAIRS, SIZES, make_folder

LENGTHS = [40, 31, 30, 12]


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 * 2**30), ("500 MB", 500 * 10**6), ("1.5g", 15 * 10**8), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "12 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 16GiB"):
        memory.parse_size(text)


@pytest.mark.parametrize("scheme", ["float32", "float16", "bfloat16"])
def test_weights_residual_and_moments_are_those_of_a_real_run(scheme: str, tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    scorer = folder.load(path, folder.LoadOptions(dtype=getattr(torch, scheme), compute="float32"))
    examples = from_pairs([Pair(q, d, 1.0) for q, d in PAIRS], scorer.pairs)
    optimizer = train(scorer, examples, TrainConfig(steps=1)).optimizer
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    kept = sum(t.nbytes for t in state if t.ndim) + sum(p.nbytes for p in scorer.model.parameters())
    need = memory.need(memory.describe(path), memory.Way(scheme), LENGTHS)
    blocks = 4 * len(state)  # the last block of a tensor is not full
    assert need.weights + need.residual + need.moments == pytest.approx(kept, abs=blocks)


@pytest.mark.parametrize("few", [False, True])
def test_gradients_of_float32_tables_are_planned_as_what_they_are(
    few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")
    scorer = folder.load(path, folder.LoadOptions(compute="float32"))
    words = scorer.model.get_input_embeddings()
    monkeypatch.setattr(words, "weight", torch.nn.Parameter(words.weight.detach().repeat(50, 1)))  # a larger table
    monkeypatch.setattr(storage, "WIDE_TABLE", words.weight.numel() - few)
    tokens = scorer.pairs.encode(PAIRS[:2])
    with storage.row_gradients(scorer.model, narrow=False):
        scorer.logits(pack(tokens, range(2))).sum().backward()
    gradients = [p.grad for p in scorer.model.parameters() if p.grad is not None]
    held = sum(g.coalesce().values().nbytes if g.is_sparse else g.nbytes for g in gradients)
    described = memory.describe(path)
    larger = words.weight.numel() - words.weight.numel() // 50
    sizes = dataclasses.replace(
        described.sizes, narrow=described.sizes.narrow + larger, embeddings=described.sizes.embeddings + larger,
        largest_embedding=words.weight.numel(),
    )  # fmt: skip
    need = memory.need(dataclasses.replace(described, sizes=sizes), memory.Way("float32"), tokens.lengths.tolist())
    if few:  # planned as if no token came twice
        assert held <= need.gradients <= held + sum(tokens.lengths) * words.weight.shape[1] * 4 < words.weight.nbytes
    else:
        assert need.gradients == held


def test_beside_adapters_the_head_alone_is_counted_as_trained(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    scorer = folder.load(path, folder.LoadOptions(dtype=torch.float16, compute="float32"))
    adapters.add(scorer, adapters.settings(scorer.model, 2))
    examples = from_pairs([Pair(q, d, 1.0) for q, d in PAIRS], scorer.pairs)
    optimizer = train(scorer, examples, TrainConfig(steps=1)).optimizer
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    kept = sum(t.nbytes for t in state if t.ndim) + sum(p.nbytes for p in scorer.model.parameters())
    need = memory.need(memory.describe(path), memory.Way("lora-float16", lora_rank=2), LENGTHS)
    assert need.weights + need.residual + need.moments == kept
    assert need.gradients == sum(p.nbytes for p in scorer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", [*SIZES, *MORE_SIZES])
def test_the_files_of_every_family_fit_their_config(family: str, tmp_path: Path) -> None:
    assert memory.describe(make_folder(family, tmp_path / family)).sizes.parameters > 0


def test_each_scheme_is_planned_with_the_products_that_training_would_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "detect", lambda _device: Hardware("cpu", False, True, "CPU with bfloat16"))
    described = memory.describe(make_folder("bert", tmp_path / "bert", dtype=torch.bfloat16))
    rows = memory.plan(described, [LENGTHS], limit=10**12, compute="auto").rows
    chosen = {row.way.scheme: row.compute for row in rows}
    assert chosen == {
        "float32": "float32", "mixed-bfloat16": "bfloat16", "bfloat16": "bfloat16", "lora-bfloat16": "bfloat16"
    }  # fmt: skip
    plain = memory.need(described, memory.Way("bfloat16"), LENGTHS).peak
    narrow = next(row for row in rows if row.way == memory.Way("bfloat16")).need
    assert narrow.peak == memory.need(described, memory.Way("bfloat16"), LENGTHS, compute="bfloat16").peak != plain


@pytest.mark.parametrize("family", ["bert", "mpnet", "llama"])
def test_activations_are_counted_on_the_models_own_code(family: str, tmp_path: Path) -> None:
    described = memory.describe(make_folder(family, tmp_path / family))
    once, twice = (memory.need(described, memory.Way("float32"), LENGTHS * n).activations for n in (1, 2))
    recomputed = memory.need(described, memory.Way("float32", checkpointing=True), LENGTHS * 2)
    assert 1.9 * once < twice < 2.1 * once
    assert recomputed.activations < 0.7 * twice


def test_the_fastest_way_that_fits_is_chosen(tmp_path: Path) -> None:
    described = memory.describe(make_folder("bert", tmp_path / "bert"))
    batches = [[30] * 40, [5] * 8]
    plenty = memory.plan(described, batches, limit=10**9, base=0)
    assert plenty.tokens == 1200
    assert plenty.chosen is not None
    assert plenty.chosen.way == memory.Way("float32")
    assert plenty.roomy
    assert "room for three times" in str(plenty)
    peaks = sorted({row.need.peak for row in plenty.rows})
    tight = memory.plan(described, batches, limit=peaks[1], base=0)
    assert tight.chosen is not None
    assert tight.chosen.need.peak <= peaks[1]
    assert not tight.roomy
    assert all(row.way.cost >= tight.chosen.way.cost for row in tight.rows if row.fits)
    assert "->" + str(tight.chosen.way) in str(tight)
    nothing = memory.plan(described, batches, limit=10, base=0)
    assert nothing.chosen is None
    assert "Nothing fits" in str(nothing)


def test_a_limit_is_kept() -> None:
    memory.require(0, None, "nothing")
    with pytest.raises(MemoryLimitError, match="a step needs"):
        memory.require(2**60, None, "a step")
    assert 0 < allocator.resident() <= allocator.peak_resident()


NEW_LENGTHS = """
import random, sys, torch
from torch.nn.functional import gelu
from halfrank import allocator
allocator.steady_allocator()
torch.set_num_threads(1)
draw, dtype = random.Random(0), getattr(torch, sys.argv[1])
up, down = torch.randn(64, 256, dtype=dtype), torch.randn(256, 64, dtype=dtype)
for step in range(600):
    held = [torch.randn(draw.randint(200, 600), 64, dtype=dtype)]
    for _ in range(6):
        wide = held[-1] @ up
        held += [wide, gelu(wide), gelu(wide) @ down]
    del held, wide
    if step == 99:
        before = allocator.resident()
print(allocator.resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_ever_new_lengths_leave_no_memory_behind(dtype: str) -> None:
    if dtype == "bfloat16" and not precision.detect().bfloat16_products:
        pytest.skip("this processor has no products of bfloat16, so none are compiled")
    done = subprocess.run([sys.executable, "-c", NEW_LENGTHS, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 2**20  # 34 and 283 MiB with the C library's and the caches' own settings


def test_scoring_keeps_freed_memory_from_pass_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("steady_allocator", "reusing_allocator", "give_back"):
        monkeypatch.setattr(allocator, name, lambda name=name: done.append(name))
    held = iter([900, 550, 600, 600, 619, 621, 500, *[600] * 10])  # 100 beyond the first 500 are usual
    monkeypatch.setattr(allocator, "resident", lambda: next(held))
    monkeypatch.setattr(allocator, "free_in_heap", lambda: 400)
    monkeypatch.setattr(allocator, "HOLES", 0)
    monkeypatch.setattr("halfrank.score.CHUNK", 2)
    scorer = folder.load(make_folder("bert", tmp_path / "bert"))
    score(scorer, [Pair(*pair) for pair in PAIRS[:11]], tmp_path / "out")  # six chunks of a pass each
    assert done == ["reusing_allocator", *["give_back"] * 2]  # when it had grown, and at the end
    with allocator.keeping() as passed:
        for _ in range(3):
            passed(1)
    assert done[3:] == ["reusing_allocator", "give_back"]


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    path = make_folder("bert", tmp_path / "bert")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"query": q, "document": d, "label": 1}) for q, d in PAIRS))
    done = CliRunner().invoke(app, ["plan", str(path), "--data", str(data), "--memory", "40GiB", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["batch_pairs"] == 16
    assert found["rows"][found["chosen"]]["fits"]
    refused = CliRunner().invoke(app, ["plan", str(path), "--memory", "1MB"])
    assert refused.exit_code == 1
    assert "does not fit" in refused.stdout


def test_fit_follows_its_plan_and_compares_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")
    loader = [[InputExample(texts=[q, d], label=1.0) for q, d in PAIRS]]
    seen: list[tuple[TrainConfig, int]] = []
    plain = face.train

    def spied(scorer: Any, examples: Any, config: TrainConfig, *, budget: Any, **more: Any) -> Any:
        seen.append((config, budget.tokens))
        return plain(scorer, examples, config, budget=budget, **more)

    monkeypatch.setattr(face, "train", spied)
    # Of any run: beside them the tiny model's own bytes would not be seen.
    for name in ("SCRATCH", "COMPILED_SCRATCH", "RUNTIME"):
        monkeypatch.setattr(memory, name, 0)
    lengths = folder.load(path).pairs.encode(PAIRS).lengths.tolist()
    whole = memory.need(memory.describe(path), memory.Way("float16"), lengths).peak
    for room in (10**12, whole * 2 // 3):  # below what the plainest way needs, something has to be saved
        model = CrossEncoder(str(path), model_kwargs={"torch_dtype": "float16"}, compute="float32")
        held = allocator.resident()
        weights = sum(p.nbytes for p in model.model.parameters())
        monkeypatch.setattr(planning, "limit_of_machine", lambda held=held, room=room: held + room)
        monkeypatch.setattr(fitting, "resident", lambda held=held, weights=weights: held + weights)
        with caplog.at_level("INFO", "halfrank"):
            model.fit(loader, epochs=1, warmup_steps=0, show_progress_bar=False)
        config, tokens = seen[-1]
        assert f"->{memory.Way('float16', config.checkpointing, config.release_gradients)} " in caplog.text
        assert (config.release_gradients or config.checkpointing or tokens < 16384) is (room < 10**12)
        assert "Memory above the library's own: planned" in caplog.text
        caplog.clear()
    monkeypatch.setattr(planning, "limit_of_machine", lambda: held + 10)
    with pytest.raises(TrainingError, match="does not fit"):
        model.fit(loader, epochs=1, warmup_steps=0, show_progress_bar=False)


def test_a_batch_that_a_users_loss_sees_is_never_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CrossEncoder(str(make_folder("bert", tmp_path / "bert")))
    calls = 0

    def refuse(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        raise MemoryError

    monkeypatch.setattr(model._scorer, "logits", refuse)
    loader = [[InputExample(texts=[q, d], label=1.0) for q, d in PAIRS]]
    with pytest.raises(MemoryExhaustedError, match=r"each batch whole(.|\n)*->float32"):
        model.fit(loader, epochs=1, loss_fct=torch.nn.MSELoss(), show_progress_bar=False)
    assert calls == 1


def test_auto_precision_reads_a_float32_file_straight_into_what_it_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")
    wanted = folder.load(path, folder.LoadOptions(dtype=torch.float16)).model.state_dict()
    asked: list[torch.dtype | None] = []
    plain = folder.load

    def load(source: Any, options: folder.LoadOptions) -> Any:
        asked.append(options.dtype)
        return plain(source, options)

    monkeypatch.setattr(folder, "load", load)
    reading = cli.Reading(None, None, None)
    assert cli._trainable(str(path), "auto", "float32", None, reading).precision.scheme == "float32"
    monkeypatch.setattr(precision, "SMALL_MODEL", 10)
    monkeypatch.setattr(precision, "LARGE_MODEL", 100)
    monkeypatch.setattr(precision, "detect", lambda device: Hardware("cpu", False, False, "plain CPU"))
    scorer = cli._trainable(str(path), "auto", "float32", None, reading)
    assert asked == [None, torch.float16]
    assert scorer.precision.scheme == "float16"
    assert "above 1 B" in scorer.precision.reason
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in scorer.model.state_dict().items())


@pytest.mark.parametrize(
    ("room", "asked", "instead"), [(70, "--precision float16", "float16"), (30, "--lora 16", None), (5, None, None)]
)
def test_a_run_that_does_not_fit_names_what_would(
    room: int, asked: str | None, instead: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")
    config = AutoConfig.from_pretrained(path, vocab_size=40_000, hidden_size=128)  # 83 MB of state in float32
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    monkeypatch.setattr(memory, "_to_import", lambda way: 0)  # as if all of it were there already
    scorer = folder.load(path, folder.LoadOptions(compute="float32"))
    examples = from_pairs([Pair(q, d, 1.0) for q, d in PAIRS], scorer.pairs)
    base = 10**9
    with pytest.raises(DoesNotFitError, match="Nothing fits: the smallest needs") as refused:
        planning.planned(scorer, examples, TrainConfig(), base=base, limit=base + memory.RUNTIME + room * 10**6)
    assert refused.value.instead == instead
    assert (f"\nWith {asked} it would: about" in str(refused.value)) is (asked is not None)


def test_auto_precision_takes_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_folder("bert", tmp_path / "bert")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"query": q, "document": d, "label": 1}) + "\n" for q, d in PAIRS))
    plain, tried = planning.planned, []

    def planned(scorer: Any, *args: Any, **options: Any) -> Any:
        tried.append(scorer.precision.scheme)
        if tried[-1] == "float32":
            raise DoesNotFitError("This run does not fit.", instead="float16")
        return plain(scorer, *args, **options)

    monkeypatch.setattr(planning, "planned", planned)
    words = ["train", str(data), "--model", str(path), "--steps", "1", "--out"]
    assert CliRunner().invoke(app, [*words, str(tmp_path / "auto")]).exit_code == 0
    assert tried == ["float32", "float16"]
    assert load_file(tmp_path / "auto" / "model.safetensors")["bert.embeddings.word_embeddings.weight"].dtype is (
        torch.float16
    )
    refused = CliRunner().invoke(app, [*words, str(tmp_path / "asked"), "--precision", "float32"])
    assert isinstance(refused.exception, DoesNotFitError)
    assert tried == ["float32", "float16", "float32"]


def test_adapters_are_asked_for_by_rank_and_not_by_a_precision(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="adapters: --lora RANK"):
        cli._trainable(str(tmp_path), "lora-float16", "auto", None, cli.Reading(None, None, None))


def test_what_cannot_be_planned_is_said_and_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder("bert", tmp_path / "bert")

    def looks(*args: Any, **more: Any) -> Any:
        raise RuntimeError("a value was asked for")

    monkeypatch.setattr(memory, "trace", looks)
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert isinstance(done.exception, ModelError)
    assert "does not run on shapes alone (RuntimeError: a value was asked for)" in str(done.exception)
    model = CrossEncoder(str(path))
    model.fit([[InputExample(texts=[q, d], label=1.0) for q, d in PAIRS]], epochs=1, show_progress_bar=False)
    assert any("not planned" in note for note in model._scorer.notes)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and counted on Linux")
def test_the_limit_knows_how_much_may_be_mapped() -> None:
    code = """
import resource
from halfrank import allocator, memory
space = allocator.size_of_process("VmSize") + 2**28
resource.setrlimit(resource.RLIMIT_AS, (space, space))
print(memory.limit_of_machine() - allocator.resident())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**27 < int(found.stdout) <= 2**28


def test_a_choice_that_does_not_exist_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    words = ["train", str(tmp_path / "none.jsonl"), "--model", "none", "--out", str(tmp_path / "out")]
    for name in ("--release-gradients", "--checkpointing"):
        ran = CliRunner().invoke(app, [*words, name, "maybe"])
        assert ran.exit_code != 0
        assert "must be auto, yes or no; got 'maybe'" in str(ran.exception)


def test_products_in_16_bits_over_new_lengths_need_kernels_beside_the_tensors(tmp_path: Path) -> None:
    described = memory.describe(make_folder("bert", tmp_path / "bert"))
    way = memory.Way("bfloat16")

    def beside(name: str, lengths: list[int]) -> int:
        return memory.need(described, way, lengths, compute=name).peak

    for name, added in (("bfloat16", memory.COMPILED), ("float32", 0), ("emulated-bfloat16", 0)):
        grown = beside(name, [30, 34]) - beside(name, [32, 32])
        assert abs(grown - added) < 10**6


def test_many_lengths_are_planned_as_few_with_the_same_bytes(tmp_path: Path) -> None:
    described = memory.describe(make_folder("bert", tmp_path / "bert"))
    lengths = list(range(8, 60, 2))
    few = memory.need(described, memory.Way("float32"), lengths)
    exact = trace(
        described.config, lengths, dtype=torch.float32, compute=precision.compute_named("float32")
    )  # every length by itself
    assert few.activations == pytest.approx(exact.forward, rel=0.01)
