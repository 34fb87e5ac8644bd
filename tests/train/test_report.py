"""The progress line within 80 columns, and a journal that is cut where its checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfrank.train.report import Journal, numbers, write_report

RECORD = {
    "loss": 0.693147, "gradient_norm": 1.234, "loss_scale": 65536.0, "skipped": 3, "tokens_per_second": 12345.0,
    "headroom_bits": 4.2, "headroom_module": "bert.encoder.layer.11.output.dense", "underflow_share": 0.012,
    "updates_lost": 0.31, "clamped_weights": 0,
}  # fmt: skip


def test_the_line_says_what_is_watched_and_drops_the_least_telling_first() -> None:
    assert numbers(RECORD, 200) == (
        "loss 0.693 |g| 1.2 2^16 skip 3 room 4 11.output.dense zero 1% lost 31% 12345 tok/s"
    )
    assert numbers(RECORD, 64) == "loss 0.693 |g| 1.2 2^16 skip 3 room 4 zero 1% lost 31%"
    assert numbers(RECORD, 20) == "loss 0.693 |g| 1.2"
    assert numbers(RECORD, 3) == "loss 0.693"
    plain = {k: RECORD[k] for k in ("loss", "gradient_norm", "tokens_per_second")} | {"loss_scale": 1.0, "skipped": 0}
    assert numbers(plain, 60) == "loss 0.693 |g| 1.2 12345 tok/s"
    assert "clamp 2" in numbers(RECORD | {"clamped_weights": 2}, 200)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 3e9, 123.0, 1e-7])
def test_any_norm_fits(norm: float) -> None:
    assert len(numbers(RECORD | {"gradient_norm": norm}, 62)) <= 62


def test_a_resumed_journal_keeps_the_lines_that_its_checkpoint_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    journal = Journal(path)
    for step in range(5):
        journal.write({"step": step, "loss": float("nan")})
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 5, "lo')  # cut off by a kill
    again = Journal(path, kept=3)
    again.write({"step": 9})
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 9]
    assert lines[0]["loss"] == "nan"
    assert again.lines == 4
    Journal(path)
    assert not path.exists()


def test_the_page_lists_the_pairs_that_were_left_out_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"event": "start", "step": 0}\n{"step": 1, "loss": 0.5}\n')
    assert "left out" not in write_report(tmp_path).read_text()
    records = [
        {
            "place": f"data.jsonl:{line}",
            "query": "<b>" * 60,
            "document": "d",
            "label": "nan",
            "reason": "its label is nan",
        }
        for line in range(1, 251)
    ]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report(tmp_path).read_text()
    assert "<td>data.jsonl:1</td>" in page
    assert "<td>data.jsonl:200</td>" in page
    assert "<td>data.jsonl:201</td>" not in page
    assert "And 50 more, in quarantine.jsonl" in page
    assert "<b>" not in page
