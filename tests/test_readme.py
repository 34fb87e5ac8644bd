"""The README as a reader takes it: its example runs as it stands, its tree names every file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfrank import CrossEncoder
from tiny import make_folder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_example_runs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(family, tmp_path / "path" / "to" / "model")
    names: dict[str, object] = {}
    exec(compile(block("python"), "README.md", "exec"), names)
    assert "corpus_id" in capsys.readouterr().out
    pair = ("people in berlin", "It rains.")
    model = names["model"]
    assert isinstance(model, CrossEncoder)
    assert CrossEncoder("my-reranker").predict(pair) == pytest.approx(model.predict(pair), abs=2e-3)


def test_tree_names_every_file() -> None:
    tree = README[README.index("src/halfrank/\n") :].split("\ntests/ ")[0]
    listed, folder = set(), ""
    for line in tree.splitlines()[1:]:
        name = line.split()[0] if line.strip() else ""
        if line.startswith("  ") and not line.startswith("   "):
            folder = name if name.endswith("/") else ""
        if name.endswith(".py"):
            listed.add(folder + name)
    source = ROOT / "src" / "halfrank"
    assert listed == {str(p.relative_to(source)) for p in source.rglob("*.py") if p.name != "__init__.py"}


def test_every_claimed_script_and_page_exists() -> None:
    for link in re.findall(r"(?:benchmarks|docs)/[\w./-]+\.(?:py|md|json)", README):
        assert (ROOT / link).exists(), link


def test_the_table_of_speed_is_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "table.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
