"""Several processes save to one folder, are killed while they do, and others read it: whole, and of one of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfrank import whole
from halfrank.cross_encoder import CrossEncoder
from halfrank.errors import SaveError
from tiny import make_folder

SAVES = 16
KILLS = 9


def save_often(source: Path, target: Path, writer: int, saves: int, started: Any) -> None:
    """Save a model whose every part says who wrote it."""
    model = CrossEncoder(str(source), prompts={"writer": str(writer)})
    torch.nn.init.constant_(model.model.classifier.bias, writer)
    model.config.writer = writer
    started.set()
    for number in range(saves):
        model.save(target, model_name=f"writer {writer}")
        time.sleep(random.Random(number + writer).random() / 100)


def writers(path: Path) -> set[int]:
    """Who wrote the parts of a folder, read as a newcomer does who knows no lock."""
    bias = load_file(path / "model.safetensors")["classifier.bias"].item()
    card = (path / "README.md").read_text().partition("# writer ")[2].split()[0]
    prompt = json.loads((path / "config_sentence_transformers.json").read_text())["prompts"]["writer"]
    return {int(bias), int(card), int(prompt), json.loads((path / "config.json").read_text())["writer"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["halfrank.cross_encoder", __name__])
    return found


def started(context: ForkServerContext, *arguments: Any) -> Any:
    event = context.Event()
    process = context.Process(target=save_often, args=(*arguments, event))
    process.start()
    assert event.wait(60)
    return process


@pytest.mark.parametrize("there", [False, True])
def test_the_folder_is_of_one_of_two_processes(
    context: ForkServerContext, source: Path, tmp_path: Path, there: bool
) -> None:
    target = tmp_path / "shared"
    if there:
        CrossEncoder(str(source)).save(target)
        (target / "mine.txt").write_text("mine")
    processes = [started(context, source, target, writer, SAVES) for writer in (1, 2)]
    seen = set()
    while any(process.is_alive() for process in processes):
        if target.exists() and (target / "config.json").exists():
            with whole.unchanged(target):
                found = writers(target) if "writer" in (target / "config.json").read_text() else {0}
            assert len(found) == 1
            seen |= found
            model = CrossEncoder(str(target))
            assert model.prompts.get("writer", "0") in ("0", "1", "2")
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert seen >= {1, 2}
    assert len(writers(target)) == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["shared"]
    assert [item.name for item in target.iterdir() if item.name.startswith(".")] == []
    assert (target / "mine.txt").exists() is there


def test_a_killed_writer_leaves_the_folder_whole(context: ForkServerContext, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    draw = random.Random(5)
    for number in range(KILLS):
        process = started(context, source, target, number + 1, 1000)
        time.sleep(draw.random() / 8)
        process.kill()
        process.join()
        if target.exists():
            whole.finish_interrupted(target)
            assert len(writers(target)) == 1
            CrossEncoder(str(target))
    save_often(source, target, 99, 1, context.Event())
    assert writers(target) == {99}
    assert [item.name for item in target.iterdir() if item.name.startswith(".")] == []


def test_a_save_that_died_while_moving_is_completed_by_the_next_reader(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "cut"
    CrossEncoder(str(source)).save(target)
    (target / "model-00001-of-00002.safetensors").touch()
    stage = target / f"{whole.STAGE}-dead"  # its model.safetensors has moved already
    stage.mkdir()
    (stage / "README.md").write_text("new")
    (stage / whole.COMPLETE).write_text("model-00001-of-00002.safetensors\npytorch_model.bin")
    unfinished = target / f"{whole.STAGE}-other"
    unfinished.mkdir()
    CrossEncoder(str(target))
    assert (target / "README.md").read_text() == "new"
    assert not (target / "model-00001-of-00002.safetensors").exists()
    assert not stage.exists()
    assert not unfinished.exists()


@pytest.mark.parametrize("after", range(1, 9))
def test_a_save_may_die_after_any_of_its_moves(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    target = tmp_path / "cut"
    model = CrossEncoder(str(source), prompts={"writer": "1"})
    model.config.writer = 1
    torch.nn.init.constant_(model.model.classifier.bias, 1)
    model.save(target, model_name="writer 1")
    model.prompts["writer"], model.config.writer = "2", 2
    torch.nn.init.constant_(model.model.classifier.bias, 2)
    moves, replace = [], os.replace

    def dying(old: Any, new: Any) -> None:
        moves.append(new)
        if len(moves) == after:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        model.save(target, model_name="writer 2")
    monkeypatch.undo()
    whole.finish_interrupted(target)
    assert writers(target) == {2}
    assert [item.name for item in target.iterdir() if item.name.startswith(".")] == []


def test_one_run_at_a_time_trains_into_a_folder(tmp_path: Path) -> None:
    with whole.only_run(tmp_path / "out"):
        with (
            pytest.raises(SaveError, match=r"Another run is writing to '.*out' at this moment"),
            whole.only_run(tmp_path / "out"),
        ):
            pass
        assert (tmp_path / "out").is_dir()
    assert list(tmp_path.iterdir()) == []  # a run that wrote nothing leaves nothing
    with whole.only_run(tmp_path / "out"):
        (tmp_path / "out" / "model").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
