"""The tokens of a pass are measured once, kept, never needed, and change no score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from halfrank.data.packing import Batch
from halfrank.data.pairs import Pair
from halfrank.model import folder, pace
from halfrank.model.pace import fastest, tokens_a_pass
from halfrank.model.scorer import Scorer
from halfrank.predict import predict
from halfrank.score import score
from tiny import PAIRS, make_folder

LONG = 10**9
CLOCK = {256: 1.0, 512: 3.0, 1024: 1.5}  # seconds a token that the clock of these tests shows, in 1,000ths


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    monkeypatch.delenv(pace.FIXED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(pace, "SIZES", tuple(CLOCK))
    monkeypatch.setattr(pace, "USUAL", 512)
    return folder.load(make_folder("bert", tmp_path / "bert"), folder.LoadOptions(compute="float32"))


@pytest.fixture
def passes(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every pass from now on; each takes the time that CLOCK says."""
    seen: list[int] = []
    now = [0.0]
    plain = scorer.logits

    def timed(batch: object) -> torch.Tensor:
        tokens = len(batch.input_ids)  # type: ignore[attr-defined]
        seen.append(tokens)
        now[0] += tokens * CLOCK[min(CLOCK, key=lambda size: abs(size - tokens))] / 1000
        return plain(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(scorer, "logits", timed)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return seen


def test_the_fastest_is_taken_and_kept(scorer: Scorer, passes: list[int], tmp_path: Path) -> None:
    scorer.model.train()
    assert tokens_a_pass(scorer, LONG) == 256
    assert scorer.model.training
    assert 0 < sum(passes) <= 256 + pace.ROUNDS * sum(CLOCK)
    assert all(abs(tokens - size) < 64 for tokens, size in zip(passes, [256, *list(CLOCK) * pace.ROUNDS], strict=True))
    passes.clear()
    pace._known.clear()  # another process
    assert tokens_a_pass(scorer, 0) == 256
    assert passes == []
    assert list(json.loads((tmp_path / "cache" / "halfrank" / "pace.json").read_text()).values()) == [256]


def test_short_jobs_are_not_measured_for(scorer: Scorer, passes: list[int], tmp_path: Path) -> None:
    assert tokens_a_pass(scorer, pace.WORTH * pace.ROUNDS * sum(CLOCK) - 1) == 512
    predict(scorer, PAIRS)
    assert max(passes) <= 512
    assert not (tmp_path / "cache").exists()


def test_a_long_job_takes_no_longer_passes_than_a_short_one(
    scorer: Scorer, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv(pace.FIXED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen: list[int] = []
    plain = scorer.logits

    def noted(batch: Batch) -> torch.Tensor:
        seen.append(len(batch.input_ids))
        return plain(batch)

    monkeypatch.setattr(scorer, "logits", noted)
    monkeypatch.setattr(pace, "_known", {})
    pace._write(pace._place(), pace._key(scorer), 2 * pace.USUAL)  # of a version that measured it
    assert tokens_a_pass(scorer, LONG) <= pace.USUAL
    assert seen
    assert max(seen) <= pace.USUAL


def test_another_format_or_model_is_measured_anew(scorer: Scorer, passes: list[int]) -> None:
    tokens_a_pass(scorer, LONG)
    passes.clear()
    with scorer.computing_in("emulated-float16"):
        tokens_a_pass(scorer, LONG)
    assert passes
    with scorer.computing_in("emulated-bfloat16"):
        assert tokens_a_pass(scorer, 0) == 512


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"), lambda path: path.write_text("[1]"), lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "many"))),
        lambda path: path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), -5))),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)  # fmt: skip
def test_a_damaged_cache_costs_the_measurement_alone(
    damage: Callable[[Path], object], scorer: Scorer, passes: list[int], tmp_path: Path
) -> None:
    tokens_a_pass(scorer, LONG)
    path = tmp_path / "cache" / "halfrank" / "pace.json"
    damage(path)
    pace._known.clear()
    passes.clear()
    assert tokens_a_pass(scorer, LONG) == 256
    assert passes
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_no_error(
    scorer: Scorer, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tokens_a_pass(scorer, LONG) == 256


def test_the_environment_switches_it_off(
    scorer: Scorer, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pace.FIXED, "128")
    assert tokens_a_pass(scorer, LONG) == 128
    predict(scorer, PAIRS)
    assert max(passes) <= 128
    assert not (tmp_path / "cache").exists()
    for wrong in ("many", "0", "-4", "4.5"):
        monkeypatch.setenv(pace.FIXED, wrong)
        with pytest.raises(ValueError, match="HALFRANK_MAX_TOKENS is the number of tokens"):
            predict(scorer, PAIRS)


def test_scores_do_not_depend_on_it(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in ("64", "512", "100000"):
        monkeypatch.setenv(pace.FIXED, size)
        found.append(predict(scorer, PAIRS).values)
    assert max(np.abs(values - found[0]).max() for values in found) <= 1e-6


def test_noise_does_not_move_it() -> None:
    assert fastest({2048: 1.0, 4096: 1.02, 8192: 1.5}, 4096) == 4096
    assert fastest({2048: 1.0, 4096: 1.04, 8192: 1.5}, 4096) == 2048
    assert fastest({2048: 1.0}, 4096) == 2048  # memory refused the others
    assert fastest({}, 4096) == 4096


def test_a_scoring_run_goes_on_as_it_began(
    scorer: Scorer, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfrank.score.CHUNK", 8)
    items = [Pair(query, document) for query, document in PAIRS]

    def cut_off() -> object:
        yield from items[:12]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(scorer, cut_off(), tmp_path / "out")
    monkeypatch.setenv(pace.FIXED, "40")  # another pace by now
    passes.clear()
    score(scorer, items, tmp_path / "out")
    assert len(passes) == 2  # chunks of 8 in a pass of 512 tokens each; 40 tokens would take many
