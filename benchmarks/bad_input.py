"""Bad input through the command line, each case a process of its own: how it ends, what it says, what it leaves.

Every case must end within 20 s with exit code 1 or 2 (0 where long pairs are cut and counted), say the expected words
on standard error without a traceback, and leave the folder it ran in as it was. Where two processes write to one place,
one of them gives way and what is left is whole.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common import ROOT, arguments, finish

sys.path.insert(0, str(ROOT / "tests"))
from tiny import make_folder

SECONDS = 20
LEAST = {True: 30, False: 60}
GOOD = b'{"query": "a b", "document": "c d", "label": 1}\n{"query": "e", "document": "f", "label": 0}\n'
TRAIN = "train data.jsonl --model model --out out --steps 1"


@dataclass(frozen=True)
class Case:
    """Files beside a good model and good data, the command, and words of the message."""

    name: str
    words: str
    said: str
    files: dict[str, bytes]
    codes: tuple[int, ...] = (1, 2)
    change: Callable[[Path], None] | None = None
    leaves: tuple[str, ...] = ()
    largest: int | None = None  # bytes that a file may have: what a disk that fills up does to a writer
    together: Callable[[Path], str] | None = None  # the command runs twice at once; what is wrong with what is left


def data(name: str, content: bytes | str, said: str, *, file: str = "data.jsonl", more: str = "") -> Case:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return Case(name, TRAIN.replace("data.jsonl", file) + more, said, {file: raw})


def row(**values: object) -> str:
    return json.dumps(values) + "\n"


def model(name: str, change: Callable[[Path], None], said: str) -> Case:
    return Case(name, "score data.jsonl --model model --out out.jsonl", said, {}, change=change)


def command(name: str, words: str, said: str, **files: bytes) -> Case:
    return Case(name, words, said, {key.replace("_", "."): value for key, value in files.items()})


def cut(path: Path) -> None:
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def spoil(value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors["bert.encoder.layer.0.output.dense.weight"][0, 0] = value
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def drop_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def pickled(path: Path) -> None:
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def configured(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))

    return change


def shard_missing(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[: len(names) // 2]}
    save_file(first, path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    where = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def remote_code(path: Path) -> None:
    (path / "own.py").write_text("raise SystemExit('ran foreign code')\n")
    configured(auto_map={"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"})(path)
    configured(model_type="own_model")(path)


def other_head(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].repeat(3, 1)
    tensors["classifier.bias"] = tensors["classifier.bias"].repeat(3)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def one_whole_model(place: Path) -> str:
    """What is wrong with a folder into which two runs trained."""
    hidden = [path.name for path in (place / "out").rglob(".*")]
    weights = load_file(place / "out" / "model.safetensors")
    return "" if weights and not hidden else f"left {hidden}"


def one_whole_file(place: Path) -> str:
    lines = (place / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    wrong = [number for number, row in enumerate(rows) if row["query"] != f"a {number}"]
    return "" if len(rows) == MANY and not wrong else f"{len(rows)} lines, {len(wrong)} of them elsewhere"


def without(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink(missing_ok=True)

    return change


RUN = b"q Q0 d 1 1 x\n"
MANY = 30_000  # pairs that keep one process busy while the other starts
PAIR = {"query": "a", "document": "b", "label": 1}
GROUP = {"query": "a", "pos": ["b"], "neg": ["c"]}
CASES = [
    data("empty text", row(**PAIR) + row(**PAIR | {"document": ""}), "data.jsonl:2, 'document': the text is empty"),
    data("whitespace text", row(**PAIR) + row(**PAIR | {"query": " \t\n"}), "data.jsonl:2, 'query': the text is empty"),
    data("None for text", row(**PAIR | {"query": None}), "data.jsonl:1, 'query': expected text, got NoneType"),
    data("number for text", row(**PAIR) + row(**PAIR | {"document": 7}), "expected text, got int"),
    data("NaN label", row(**PAIR) + row(**PAIR | {"label": float("nan")}), "data.jsonl:2, 'label': expected a finite"),
    data("infinite label", row(**PAIR | {"label": float("inf")}), "expected a finite number, got inf"),
    data("label of 5,000 digits", '{"query": "a", "document": "b", "label": ' + "9" * 5000 + "}\n", "data.jsonl:1"),
    data("label out of range", row(**PAIR | {"label": 3}), "bce loss needs labels from 0 to 1"),
    data("text label", row(**PAIR) + row(**PAIR | {"label": "good"}), "expected a number, got the text 'good'"),
    data("list label", row(**PAIR) + row(**PAIR | {"label": [1]}), "expected a number, got list"),
    data("no label anywhere", row(query="a", document="b") * 2, "has no label"),
    data("label missing in a row", row(**PAIR) + row(query="a", document="b"), "has no label, but"),
    data("wrong columns", row(title="a", body="b", points=1), "no column is the query"),
    data("misspelt document", row(query="a", documnet="b", label=1), "no column is the document"),
    data("broken JSON", row(**PAIR) + '{"query": "a", \n', "data.jsonl:2: not JSON"),
    data("JSON over several lines", json.dumps([PAIR], indent=1), "runs over several lines"),
    data("a list for a row", "[1, 2]\n", "expected an object, got list"),
    data("Latin-1", row(**PAIR).encode() + '{"query": "caf\xe9"}\n'.encode("latin-1"), "data.jsonl:2: byte 0xe9"),
    data("lone surrogate", '{"query": "a", "document": "\\ud800", "label": 1}\n', "not valid text"),
    data("real UTF-16", row(**PAIR).encode("utf-16"), "the file is UTF-16"),
    data("empty file", "", "holds no rows"),
    data("blank lines only", "\n\n\n", "holds no rows"),
    data("pairs and groups", row(**PAIR) + row(**GROUP), "Keep them in separate files"),
    data("group without positives", row(**GROUP | {"pos": []}), "'pos' is empty"),
    data("groups that teach nothing", row(query="a", docs=[{"text": "b", "grade": 0}] * 2), "nothing to learn from"),
    data("negative grade", row(query="a", docs=[{"text": "b", "grade": -1}, {"text": "c", "grade": 1}]), "0 or more"),
    data("docs without text", row(query="a", docs=[{"body": "b"}]), "expected an object with 'text'"),
    data("docs empty", row(query="a", docs=[]), "at least one document"),
    data("scores of one side", row(**GROUP | {"pos_scores": [1.0]}), "only one of pos_scores and neg_scores"),
    data("too few scores", row(**GROUP | {"pos_scores": [1.0, 2.0], "neg_scores": [0.0]}), "2 numbers for 1 texts"),
    data("one-column CSV", "query\na\nb\n", "no column is the document", file="data.csv"),
    data("CSV without header", "a,b\nc,d\n", "neither a header", file="data.csv"),
    data("ragged CSV", "query,document,label\na,b,1\nc,d\n", "data.csv:3: 2 fields, expected 3", file="data.csv"),
    data("open quote", 'query,document,label\na,"b,1\n', "not CSV", file="data.csv"),
    data("label words in CSV", "query,document,label\na,b,yes\n", "the text 'yes'", file="data.csv"),
    data("ragged TSV", "query\tdocument\tlabel\na\tb\n", "data.tsv:2: 2 fields, expected 3", file="data.tsv"),
    data("broken Parquet", b"PAR1 and no more", "not a Parquet file", file="data.parquet"),
    data("unknown ending", row(**PAIR), "has the ending '.xlsx'", file="data.xlsx"),
    data("unknown role", row(**PAIR), "unknown role", more=" --column title=query"),
    data("column that is not there", row(**PAIR), "there is no column 'title'", more=" --column query=title"),
    data("loss for groups", row(**PAIR), "single pairs", more=" --loss softmax"),
    data("loss for classes", row(**PAIR), "cross-entropy loss needs", more=" --loss cross-entropy"),
    command("missing data", "train nothing.jsonl --model model --out out", "nothing.jsonl does not exist"),
    command("folder for data", "train model --model model --out out", "is a folder"),
    command("missing model", "score data.jsonl --model ./nothing --out o.jsonl", "no model folder at './nothing'"),
    command("hub id without network", "score data.jsonl --model me/nothing --out o.jsonl", "Cannot load 'me/nothing'"),
    command("unknown precision", TRAIN + " --precision float8", "float8"),
    command("unknown compute", TRAIN + " --compute float8", "float8"),
    command("unknown loss", TRAIN + " --loss hinge", "hinge"),
    command("unknown schedule", TRAIN + " --schedule steps", "schedule must be"),
    command("unknown option", TRAIN + " --learning-rate 1", "--learning-rate"),
    command("negative rate", TRAIN + " --lr -1", "lr must be"),
    command("NaN rate", TRAIN + " --lr nan", "lr must be"),
    command("no batch", TRAIN + " --batch-size 0", "batch_size must be"),
    command("negative patience", TRAIN + " --patience -1", "patience must be"),
    command("length beyond the model", TRAIN + " --max-length 5000", "max_length"),
    command("length of nothing", TRAIN + " --max-length 1", "max_length"),
    command("resume of nothing", TRAIN + " --resume", "checkpoint"),
    command("file for a folder", "train data.jsonl --model model --out data.jsonl", "is a file"),
    command("folder in use", "train data.jsonl --model model --out model", "not empty"),
    command("unwritable output", "train data.jsonl --model model --out /proc/halfrank", "Cannot write to"),
    command("full disk", "score data.jsonl --model model --out /dev/full/x", "/dev/full"),
    command("empty query", "rank '' --documents data.jsonl --model model", "empty"),
    command("no documents", "rank q --documents none.txt --model model", "holds no documents", none_txt=b"\n"),
    command(
        "run without texts", "score run.txt --queries q.tsv --model model", "go together", run_txt=b"q Q0 d 1 1 x\n"
    ),
    command(
        "id without text",
        "score run.txt --queries q.tsv --corpus c.tsv --model model",
        "no text for the id 'd'",
        run_txt=RUN,
        q_tsv=b"q\thello\n",
        c_tsv=b"e\tthere\n",
    ),
    command("run of pairs", "score data.jsonl --model model --format trec --out o.run", "with ids"),
    command("unknown format", "score data.jsonl --model model --format xml --out o", "format must be"),
    command("demo not run", "demo --ask hello --out nowhere", "halfrank demo"),
    model("truncated weights", cut, "corrupt or truncated"),
    model("NaN weight", spoil(float("nan")), "bert.encoder.layer.0.output.dense.weight"),
    model("infinite weight", spoil(float("inf")), "bert.encoder.layer.0.output.dense.weight"),
    model("tensor missing", drop_tensor, "lacks 1 weights"),
    model("pickle only", pickled, "never unpickles"),
    model("shard missing", shard_missing, "model"),
    model("no configuration", without("config.json"), "config.json"),
    model("no weights", without("model.safetensors"), "no weights"),
    model("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    model("unknown architecture", configured(model_type="hyperbert"), "hyperbert"),
    model("remote code, not asked for", remote_code, "trust_remote_code=True"),
    model("broken configuration", lambda path: (path / "config.json").write_text("{"), "model"),
    Case("byte-order mark", TRAIN, "1 steps", {"data.jsonl": b"\xef\xbb\xbf" + GOOD}, codes=(0,), leaves=("out",)),
    command("head of the wrong shape", TRAIN + " --num-labels 3", "another shape: 1 labels, not 3"),
    model("head of another model", other_head, "another shape"),
    Case(
        "full disk while scoring",
        "score many.jsonl --model model --out out.jsonl",
        "Cannot write 'out.jsonl'",
        {"many.jsonl": "".join(row(query=f"a {n}", document="b " * 9) for n in range(600)).encode()},
        largest=9_000,
    ),
    Case(
        "full disk while training",
        "train data.jsonl --model model --out out --steps 1",
        "failed",
        {},
        largest=20_000,
        leaves=("out",),
    ),
    Case(
        "two processes train into one folder",
        TRAIN.replace("--steps 1", "--steps 10"),
        "",
        {},
        codes=(0, 1, 2),
        leaves=("out",),
        together=one_whole_model,
    ),
    Case(
        "two processes score into one file",
        "score many.jsonl --model model --out out.jsonl",
        "Another process is writing",
        {"many.jsonl": "".join(row(query=f"a {n}", document="b") for n in range(MANY)).encode()},
        codes=(0, 1),
        leaves=("out.jsonl",),
        together=one_whole_file,
    ),
    Case(
        "pairs longer than the model",
        "train data.jsonl --model model --out out --steps 1",
        "1 of 2 pairs are longer than 64 tokens",
        {"data.jsonl": (row(**PAIR) + row(**PAIR | {"document": "rain " * 500})).encode()},
        codes=(0,),
        leaves=("out",),
    ),
    Case(
        "a text of a million characters, and control characters",
        "score data.jsonl --model model --out out.jsonl",
        "2 pairs scored, 1 cut",
        {
            "data.jsonl": (
                row(query="a", document="rain " * 200_000) + row(query="a", document="\x00\x07 bell \u202e turned")
            ).encode()
        },
        codes=(0,),
        leaves=("out.jsonl",),
    ),
]


def listing(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.stat().st_size for path in place.rglob("*") if path.is_file()}


def run(case: Case, prepared: Path) -> list[str]:
    """What is wrong with how a case ends; nothing if it ends as it should."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shutil.copytree(prepared, place / "model")
        for name, content in ({"data.jsonl": GOOD} | case.files).items():
            (place / name).write_bytes(content)
        if case.change is not None:
            case.change(place / "model")
        before = listing(place)
        started = time.perf_counter()
        try:
            ended = finished(case, place)
        except subprocess.TimeoutExpired:
            return [f"took more than {SECONDS} s"]
        after = {name: size for name, size in listing(place).items() if name.split("/")[0] not in case.leaves}
        said = " ".join(" ".join(one.stderr + (one.stdout if 0 in case.codes else "") for one in ended).split())
        codes = sorted(one.returncode for one in ended)
        problems = [] if set(codes) <= set(case.codes) else [f"exit codes {codes}"]
        problems += ["a traceback"] if "Traceback" in said else []
        problems += [] if case.said in said else [f"said {said[-200:]!r}, not {case.said!r}"]
        if case.together is not None:
            problems += (
                [] if codes[0] == 0 and codes[1] != 0 else [f"ended with {codes}: one of the two has to give way"]
            )
            problems += list(filter(None, [case.together(place)]))
        changed = sorted(set(after.items()) ^ set(before.items()))
        problems += [f"left or changed {changed[:3]}"] if changed else []
        return problems + ([f"{time.perf_counter() - started:.0f} s"] if problems else [])


def finished(case: Case, place: Path) -> list[subprocess.CompletedProcess[str]]:
    """The case's process, or its two, ended; raises TimeoutExpired, with none left running."""
    words = [sys.executable, "-m", "halfrank", *shlex.split(case.words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    largest = case.largest

    def limited() -> None:
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    running = [
        subprocess.Popen(
            words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=limited,
        )
        for _ in range(1 if case.together is None else 2)
    ]  # fmt: skip
    until = time.monotonic() + SECONDS
    try:
        said = [process.communicate(timeout=max(until - time.monotonic(), 0.1)) for process in running]
    finally:
        for process in running:
            process.kill()
    return [subprocess.CompletedProcess(words, p.returncode, *texts) for p, texts in zip(running, said, strict=True)]


def main() -> None:
    options = arguments(__doc__ or "")
    cases = CASES[:: len(CASES) // LEAST[True]][: LEAST[True]] if options.quick else CASES
    with tempfile.TemporaryDirectory() as temporary:
        prepared = make_folder("bert", Path(temporary) / "model")
        with ThreadPoolExecutor(2) as pool:
            found = dict(
                zip([case.name for case in cases], pool.map(lambda case: run(case, prepared), cases), strict=True)
            )
    for name, wrong in found.items():
        if wrong:
            print(f"{name}: {'; '.join(wrong)}")
    failed = sum(bool(wrong) for wrong in found.values())
    bars = {
        f"{len(cases)} bad inputs, at least {LEAST[options.quick]}": len(cases) >= LEAST[options.quick],
        "each ends as it should": failed == 0,
    }
    finish(
        "bad_input",
        options.quick,
        {"problems": found},
        bars,
        f"{len(cases) - failed} of {len(cases)} end as they should",
    )


if __name__ == "__main__":
    main()
