"""The doctor's time on MiniLM, and what it foresees for a real decoder on texts that it has not seen.

`halfrank doctor` examines MiniLM with docstring pairs as a process of its own: at most 40 s on 2 idle cores. For
gemma-3-270m (where it is cached) the modules that the built-in texts take out of float16's range are compared with
those that 200 pairs of DL 2019 take out of it: precision and recall of at least 0.95 over modules.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from common import ROOT, arguments, finish, minilm, ranking_data
from halfrank.data import docstrings, probes
from halfrank.doctor.checks import overflowing
from halfrank.doctor.modules import measure
from halfrank.model import folder

GEMMA = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank" / "gemma-3-270m"
SECONDS, SHARE = 40.0, 0.95
PAIRS = {True: 60, False: 200}


def examined(place: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of the verb, and what it found."""
    corpus = docstrings.collect(groups=200, queries=20)
    lines = [{"query": g.query, "docs": [{"text": d, "grade": int(r or 0)} for d, r in zip(g.documents, g.grades, strict=True)]} for g in corpus.train]  # fmt: skip # noqa: E501
    data = place / "docstrings.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = [sys.executable, "-m", "halfrank", "doctor", str(minilm()), "--data", str(data), "--num-labels", "1",
             "--max-length", "64", "--json", "--html", str(place / "doctor.html")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    started = time.perf_counter()
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if ran.returncode not in (0, 1):
        sys.exit(ran.stderr)
    return seconds, json.loads(ran.stdout)


def foreseen(count: int) -> dict[str, Any]:
    """Modules out of float16's range: by the built-in texts, and on `count` pairs of DL 2019."""
    scorer = folder.load(GEMMA, folder.LoadOptions(compute="float32", max_length=256))
    texts = [text for group in probes.groups() for text in group.texts]
    rows = ranking_data("dl19-bm25-top100.jsonl")
    unseen = [(row["query"], document["text"]) for row in rows for document in row["docs"][:5]][:count]
    found = []
    for pairs in (texts, unseen):
        modules, _, _ = measure(scorer, pairs, torch.zeros(len(pairs)), None)
        found.append((set(overflowing(modules, torch.float16)), set(modules)))
    (said, names), (shown, _) = found
    both = len(said & shown)
    return {
        "modules": len(names), "foreseen": sorted(said), "shown": sorted(shown),
        "precision": both / len(said) if said else 1.0, "recall": both / len(shown) if shown else 1.0,
    }  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__ or "")
    logging.getLogger("halfrank").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        seconds, report = examined(Path(temporary))
    print(f"MiniLM with {report['data']['pairs']} docstring pairs: {seconds:.1f} s, {len(report['checks'])} checks")
    bars = {f"MiniLM with docstring pairs within {SECONDS:g} s": seconds <= SECONDS}
    result: dict[str, Any] = {"seconds": seconds, "checks": report["checks"]}
    figure = f"{seconds:.1f} s"
    if GEMMA.exists():
        ahead = foreseen(PAIRS[options.quick])
        print(
            f"gemma-3-270m: {len(ahead['foreseen'])} of {ahead['modules']} modules foreseen out of range, "
            f"{len(ahead['shown'])} shown; precision {ahead['precision']:.3f}, recall {ahead['recall']:.3f}"
        )
        bars["precision and recall of foreseen overflow"] = min(ahead["precision"], ahead["recall"]) >= SHARE
        bars["something is out of range, and something is not"] = 0 < len(ahead["shown"]) < ahead["modules"]
        result |= {"gemma": ahead}
        figure += f", precision {ahead['precision']:.3f}, recall {ahead['recall']:.3f}"
    else:
        print(f"'{GEMMA}' is absent: what the doctor foresees for it is not measured.")
    finish("doctor", options.quick, result, bars, figure)


if __name__ == "__main__":
    main()
