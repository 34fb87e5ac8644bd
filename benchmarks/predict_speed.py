"""Prediction speed beside what people use: sentence-transformers in torch and OpenVINO, an ONNX file as FlashRank and
fastembed run it. BM25's top 100 of 2019, in turns, each at its best settings; ours certified before it counts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import finish, interleaved, median_ratio, minilm, ranking_data
from halfrank import CrossEncoder
from halfrank.data.packing import pack
from halfrank.errors import HalfrankError
from halfrank.export import export, export_graph
from halfrank.model import folder
from halfrank.model.scorer import Scorer
from halfrank.precision import detect
from halfrank.predict import predict

PEER = Path.home() / ".cache" / "halfrank" / "openvino-peer"
EXACT = 1e-4  # largest difference of a score to float32: sums in another order
Texts = list[tuple[str, str]]
Run = Callable[[], float]


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    count, rounds, queries = (48, 2, 2) if options.quick else (2000, 5, 30)
    lines = ranking_data("dl19-bm25-top100.jsonl")
    pairs = [(line["query"], doc["text"]) for line in lines for doc in line["docs"]]
    random.Random(options.seed).shuffle(pairs)
    pairs = pairs[:count]
    lists = [(line["query"], [doc["text"] for doc in line["docs"]][:100]) for line in lines[:queries]]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = fitted(place / "model", options.seed, 150 if options.quick else 300)
        ours, certificates = formats(source, place, every=not options.quick)
        peers, closing = competitors(source, place, options.peer_python)
        try:
            result = measured(ours, peers, pairs, lists, rounds)
        finally:
            closing()
    result |= {"pairs": len(pairs), "queries": len(lists), "certificates": certificates}
    for name, said in certificates.items():
        print(f"{name}: {said}")
    report(result, options.quick)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form, under 100 s on 2 cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peer-python", help="Python with sentence-transformers[openvino]; made in ~/.cache/halfrank if not given"
    )
    return parser.parse_args()


def fitted(path: Path, seed: int, rows: int = 300) -> Path:
    """MiniLM with a score head fitted to grades by least squares: its scores spread as a trained model's do."""
    torch.manual_seed(seed)
    scorer = folder.load(minilm(), folder.LoadOptions(num_labels=1, compute="float32"))
    graded = [
        (line["query"], d["text"], d["grade"]) for line in ranking_data("dl20-judged.jsonl") for d in line["docs"]
    ]
    random.Random(seed).shuffle(graded)
    graded = [row for row in graded if row[2] is not None][:rows]
    model: Any = scorer.model
    seen: list[torch.Tensor] = []
    handle = model.classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].double()))
    order: list[int] = []
    tokens = scorer.pairs.encode([(query, text) for query, text, _ in graded])
    with torch.no_grad():
        for start in range(0, len(graded), 50):
            batch = pack(tokens, range(start, min(start + 50, len(graded))))
            scorer.logits(batch)
            order += batch.rows
        handle.remove()
        inputs = torch.cat(seen).flatten(1)
        wanted = torch.tensor([6.0 * (graded[row][2] > 1) - 3.0 for row in order]).double()
        middle = inputs.mean(0)
        centred = inputs - middle
        gram = centred.T @ centred + torch.eye(inputs.shape[1]).double()
        weight = torch.linalg.solve(gram, centred.T @ (wanted - wanted.mean()))
        model.classifier.weight.copy_(weight[None])
        model.classifier.bias.fill_(float(wanted.mean() - middle @ weight))
    folder.save(scorer, path)
    return path


def formats(source: Path, place: Path, *, every: bool) -> tuple[dict[str, CrossEncoder], dict[str, str]]:
    """Our ways to score the model, by name, with what their certificate says; a refused one is left out.

    Ways that are nobody's fastest are left out as well, unless `every` one is asked for.
    """
    found = {"halfrank torch float32": CrossEncoder(source, compute="float32")}
    said: dict[str, str] = {}
    fast = detect().bfloat16_products

    def graph(name: str, kind: str, *, int8: bool = False, computes: tuple[str, ...] = ("float32",)) -> None:
        out = place / name.replace(" ", "-")
        try:
            said[name] = export_graph(source, out, kind=kind, int8=int8, computes=computes).line()
        except HalfrankError as error:
            said[name] = str(error)
            return
        for compute in computes:
            suffix = "int8" if int8 else compute
            found[f"{name.removesuffix(' int8')} {suffix}"] = CrossEncoder(out, backend=kind, compute=compute)

    if fast and every:
        narrow = export(source, place / "bfloat16", dtype="bfloat16")
        said["halfrank torch bfloat16"] = narrow.line() if narrow else ""
        found["halfrank torch bfloat16"] = CrossEncoder(place / "bfloat16", compute="bfloat16")
    graph("halfrank openvino", "openvino", computes=("float32", "bfloat16") if fast else ("float32",))
    graph("halfrank openvino int8", "openvino", int8=True)
    graph("halfrank onnx", "onnx")
    if every:
        graph("halfrank onnx int8", "onnx", int8=True)
    return found, said


class Peer:
    """A way to score that is not ours: pairs, and one query with its documents, each answering (seconds, scores)."""

    def __init__(self, predict: Callable[[Texts], np.ndarray], rank: Callable[[str, list[str]], object]) -> None:
        self._predict, self._rank = predict, rank

    def predict(self, pairs: Texts) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        scores = self._predict(pairs)
        return time.perf_counter() - started, np.asarray(scores, dtype=np.float64).reshape(-1)

    def rank(self, query: str, documents: list[str]) -> float:
        started = time.perf_counter()
        self._rank(query, documents)
        return time.perf_counter() - started


class OtherProcess:
    """The peer that needs another Python; it times itself, so that sending texts counts for nobody."""

    def __init__(self, python: Path, model: Path, precision: str | None, texts: Texts) -> None:
        script = Path(__file__).with_name("peer_openvino.py")
        self._process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self._ask({"model": str(model), "precision": precision, "texts": texts})
        except BaseException:
            self.close()
            raise

    def predict(self, pairs: Texts) -> tuple[float, np.ndarray]:
        answer = self._ask({"predict": pairs})
        return answer["seconds"], np.array(answer["scores"])

    def rank(self, query: str, documents: list[str]) -> float:
        return float(self._ask({"rank": [query, documents]})["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("The peer's process ended: " + "\n".join(self._process.stderr.read().splitlines()[-5:]))
        return dict(json.loads(line))


def competitors(source: Path, place: Path, python: str | None) -> tuple[dict[str, Any], Callable[[], None]]:
    """The peers by name, and what ends their processes."""
    from sentence_transformers import CrossEncoder as Theirs

    warm = [("warm", "up")] * 8
    own = Path(python) if python else peer_python()
    found: dict[str, Any] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = Theirs(str(source), device="cpu", model_kwargs={"dtype": dtype})
        found[f"sentence-transformers torch {name}"] = Peer(
            lambda pairs, model=model: model.predict(pairs, batch_size=32, show_progress_bar=False),
            lambda query, texts, model=model: model.rank(query, texts, show_progress_bar=False),
        )
    others = {
        "sentence-transformers openvino float32": (source, "f32"),
        "sentence-transformers openvino as it comes": (source, None),
    }
    if (place / "halfrank-openvino-int8").exists():  # its own calibration needs a data set from the hub
        others["sentence-transformers openvino int8 weights"] = (place / "halfrank-openvino-int8", "f32")
    running = {name: OtherProcess(own, model, precision, warm) for name, (model, precision) in others.items()}
    found |= running
    for name, graph in (("float32", "halfrank-onnx"), ("int8", "halfrank-onnx-int8")):
        if (path := place / graph / "onnx" / "model.onnx").exists():
            run = plain_onnx(path, folder.load(source))
            found[f"onnx {name} as fastembed runs it"] = Peer(
                run, lambda query, texts, run=run: run([(query, text) for text in texts])
            )

    def close() -> None:
        for process in running.values():
            process.close()

    return found, close


def plain_onnx(path: Path, scorer: Scorer) -> Callable[[Texts], np.ndarray]:
    """The file in ONNX Runtime with its default session, batches of 64 in the order given, padded to the longest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokenizer = scorer.tokenizer

    def run(pairs: Texts) -> np.ndarray:
        scores = []
        for start in range(0, len(pairs), 64):
            part = pairs[start : start + 64]
            encoded = tokenizer(
                [a for a, _ in part], [b for _, b in part], padding=True, truncation=True, max_length=scorer.max_length,
                return_tensors="np",
            )  # fmt: skip
            logits = session.run(None, {port.name: encoded[port.name] for port in session.get_inputs()})[0][:, 0]
            scores.append(1 / (1 + np.exp(-logits)))
        return np.concatenate(scores)

    return run


def peer_python() -> Path:
    """The Python of an environment with sentence-transformers[openvino], made once."""
    python = PEER / "bin" / "python"
    if not (PEER / "ready").exists():
        print(f"making {PEER} with sentence-transformers[openvino], once", file=sys.stderr)
        venv.create(PEER, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        torch_version = torch.__version__.partition("+")[0]
        subprocess.run(
            [*pip, "install", "sentence-transformers[openvino]==6.2.0", f"torch=={torch_version}"], check=True
        )
        # Built for torch with CUDA, where it comes along at all, and not importable without.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        subprocess.run([str(python), "-c", "import optimum.intel, sentence_transformers"], check=True)
        (PEER / "ready").touch()
    return python


def measured(
    ours: dict[str, CrossEncoder], peers: dict[str, Any], pairs: Texts, lists: list[tuple[str, list[str]]], rounds: int
) -> dict[str, Any]:
    """Seconds of every way for all pairs, and for one query with its documents."""
    scores: dict[str, np.ndarray] = {}

    def mine(name: str) -> Run:
        def run() -> float:
            started = time.perf_counter()
            scores[name] = predict(ours[name]._scorer, pairs).values[:, 0]
            return time.perf_counter() - started

        return run

    def theirs(name: str) -> Run:
        def run() -> float:
            seconds, scores[name] = peers[name].predict(pairs)
            return float(seconds)

        return run

    runs = {name: mine(name) for name in ours} | {name: theirs(name) for name in peers}
    whole, pairs = pairs, pairs[: len(pairs) // 4]
    for run in runs.values():
        run()  # kernels and buffers are made once
    pairs = whole
    seconds = interleaved(runs, rounds)
    wanted = scores["halfrank torch float32"]
    errors = {name: float(np.abs(values - wanted).max()) for name, values in scores.items()}
    exact = {name for name, error in errors.items() if error <= EXACT}
    speed = {name: len(pairs) / statistics.median(times) for name, times in seconds.items()}
    best = {
        "halfrank": max(ours, key=speed.__getitem__),
        "halfrank exact": max(exact & set(ours), key=speed.__getitem__),
        "peer": max(peers, key=speed.__getitem__),
        "peer exact": max(exact & set(peers), key=speed.__getitem__),
    }
    baseline = "sentence-transformers torch float32"
    latencies = one_query(
        {name: ours[name].rank for name in dict.fromkeys((best["halfrank exact"], best["halfrank"]))}
        | {name: peers[name].rank for name in dict.fromkeys((baseline, best["peer exact"], best["peer"]))},
        lists,
    )
    return {"seconds": seconds, "pairs_per_second": speed, "errors": errors, "best": best, "rank_seconds": latencies}


def one_query(ways: dict[str, Callable[..., Any]], lists: list[tuple[str, list[str]]]) -> dict[str, list[float]]:
    """Seconds of each way for each query, in turns; our `rank` is timed here, the peers time themselves."""

    def seconds(rank: Callable[..., Any], query: str, documents: list[str]) -> float:
        started = time.perf_counter()
        answer = rank(query, documents)
        return answer if isinstance(answer, float) else time.perf_counter() - started

    for rank in ways.values():
        seconds(rank, lists[0][0], lists[0][1][:10])
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number, (query, documents) in enumerate(lists):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            found[name].append(seconds(ways[name], query, documents))
    return found


def report(result: dict[str, Any], quick: bool) -> None:
    seconds, best, latencies = result["seconds"], result["best"], result["rank_seconds"]
    print(f"{'':46s} pairs/s  largest error")
    for name, speed in sorted(result["pairs_per_second"].items(), key=lambda item: -item[1]):
        print(f"{name:46s} {speed:7.1f}  {result['errors'][name]:.1e}")
    for name, times in latencies.items():
        p50, p99 = (float(np.percentile(times, q)) * 1000 for q in (50, 99))
        print(f"rank, 100 passages: {name:44s} p50 {p50:6.0f} ms  p99 {p99:6.0f} ms")
    baseline = "sentence-transformers torch float32"

    def ratio(slow: str, fast: str) -> float:
        return median_ratio(seconds[slow], seconds[fast])

    ratios = {
        "exact beside torch": ratio(baseline, best["halfrank exact"]),
        "exact beside fastest exact": ratio(best["peer exact"], best["halfrank exact"]),
        "fastest beside fastest": ratio(best["peer"], best["halfrank"]),
        "torch beside torch": ratio(baseline, "halfrank torch float32"),
    }
    for quantile in (50, 99):
        slow, fast = (float(np.percentile(latencies[name], quantile)) for name in (baseline, best["halfrank exact"]))
        ratios[f"rank p{quantile}"] = slow / fast
    bars = {
        "exact: at least 1.5 times sentence-transformers' torch backend": ratios["exact beside torch"] >= 1.5,
        "exact: at least 1.25 times the fastest exact peer": ratios["exact beside fastest exact"] >= 1.25,
        "certified: at least 1.2 times the fastest peer of any format": ratios["fastest beside fastest"] >= 1.2,
        "rank of 100 passages, p50: at least 1.6 times torch": ratios["rank p50"] >= 1.6,
        "rank of 100 passages, p99: at least 1.6 times torch": ratios["rank p99"] >= 1.6,
        "exact: scores equal within 1e-5": result["errors"][best["halfrank exact"]] <= 1e-5,
    }
    exact, fastest = best["halfrank exact"], f"{best['halfrank']} beside {best['peer']}"
    figure = (
        f"exact {ratios['exact beside torch']:.2f} x torch, {ratios['exact beside fastest exact']:.2f} x the fastest "
        f"exact peer ({exact}); fastest {ratios['fastest beside fastest']:.2f} x ({fastest}); "
        f"rank {ratios['rank p50']:.2f} x p50, {ratios['rank p99']:.2f} x p99"
    )
    finish("predict_speed", quick, result | {"ratios": ratios}, bars, figure)


if __name__ == "__main__":
    main()
