"""How long a person waits before anything happens: whole processes, from the shell to the answer.

`halfrank --help`, `import halfrank`, the import of the class, and `halfrank rank` of ten documents with a local MiniLM.
Wall-clock time is what a person sees and what the bars are about; processor time says what a busy machine hides.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from common import arguments, finish, finished, minilm

HELP, IMPORT, RANK = 0.5, 2.5, 6.0  # seconds
DOCUMENTS = [
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "Berlin is well known for its museums.", "In 2014, the city state Berlin had 37,368 live births.",
    "The urban area of Berlin comprised about 4.1 million people in 2014.", "Paris is the capital of France.",
    "The quick brown fox jumps over the lazy dog.", "Berlin is subdivided into 12 boroughs.",
    "A woman measures another woman's ankle.", "It rains in the mountains.", "Two boys on a couch are watching him.",
]  # fmt: skip


def timed(words: list[str]) -> tuple[float, float]:
    """(wall-clock seconds, processor seconds) of a process of this Python."""
    done = finished([sys.executable, *words])
    return done.seconds, done.processor_seconds


def main() -> None:
    options = arguments(__doc__ or "")
    rounds = 3 if options.quick else 9
    with tempfile.TemporaryDirectory() as temporary:
        documents = Path(temporary) / "documents.txt"
        documents.write_text("\n".join(DOCUMENTS), encoding="utf-8")
        ask = ["rank", "how many people live in berlin", "--documents", str(documents), "--model", str(minilm())]
        runs = {
            "halfrank --help": ["-m", "halfrank", "--help"],
            "import halfrank": ["-c", "import halfrank"],
            "import of CrossEncoder": ["-c", "from halfrank import CrossEncoder"],
            "import of torch and transformers' model class": [
                "-c", "import torch; from transformers import PreTrainedModel"
            ],
            "halfrank rank, 10 documents": ["-m", "halfrank", *ask],
        }  # fmt: skip
        for words in runs.values():
            timed(words)  # files come into the system's cache
        times = {name: [timed(words) for _ in range(rounds)] for name, words in runs.items()}
    wall = {name: statistics.median(seconds for seconds, _ in found) for name, found in times.items()}
    work = {name: statistics.median(seconds for _, seconds in found) for name, found in times.items()}
    for name in runs:
        print(f"{name:46s} {wall[name]:6.2f} s, of the processor {work[name]:6.2f} s")
    bars = {
        f"halfrank --help: under {HELP} s": wall["halfrank --help"] < HELP,
        f"import halfrank: under {IMPORT} s": wall["import halfrank"] < IMPORT,
        f"halfrank rank of 10 documents: under {RANK} s": wall["halfrank rank, 10 documents"] < RANK,
    }
    asked, helped = wall["halfrank rank, 10 documents"], wall["halfrank --help"]
    figure = f"rank of 10 documents in {asked:.1f} s, --help in {helped:.2f} s"
    finish("startup", options.quick, {"seconds": wall, "processor_seconds": work}, bars, figure)


if __name__ == "__main__":
    main()
