"""What is asked for early does not wait for what is heavy: help and the bare import know no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "scipy", "numba", "tokenizers")


@pytest.mark.parametrize(
    ("asked", "forbidden"),
    [
        ("import halfrank; dir(halfrank); halfrank.__version__", HEAVY),
        ("from halfrank import InputExample", HEAVY),
        ("import halfrank.cli as cli; sys.argv = ['halfrank', '--help']; cli.main()", HEAVY),
        ("import halfrank.cli as cli; sys.argv = ['halfrank', 'train', '--help']; cli.main()", HEAVY),
        ("from halfrank import CrossEncoder", ("numba", "sklearn", "datasets", "sentence_transformers", "peft")),
    ],
)
def test_nothing_heavy_is_imported(asked: str, forbidden: tuple[str, ...]) -> None:
    script = f"""
import sys
try:
    {asked}
except SystemExit as left:
    assert not left.code, left.code
print(*(name for name in {forbidden!r} if name in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []
