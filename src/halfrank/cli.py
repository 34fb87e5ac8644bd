"""The command line: a table of verbs, each a plain function; whatever is heavy is imported inside them.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from halfrank.errors import DataError, DoesNotFitError, HalfrankError, Interrupted, ModelError, SaveError

if TYPE_CHECKING:
    from halfrank.data.pairs import Group, Pair
    from halfrank.data.readers import Dataset
    from halfrank.data.source import Source
    from halfrank.doctor.report import Examination
    from halfrank.evaluate import Report
    from halfrank.memory import Described
    from halfrank.memory import Plan as MemoryPlan
    from halfrank.model.folder import LoadOptions
    from halfrank.model.scorer import Scorer

RATE, LORA_RATE = 2e-5, 2e-4  # adapters start at 0 and have further to go

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)  # how standard output refuses what is written to it
app = typer.Typer(
    name="halfrank",
    help="Cross-encoders that train, rank and stay finite in 16 bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="A model folder or a hub id.")]
Compute = Annotated[str, typer.Option(help="Format of products: auto, float32, float16, bfloat16 or emulated-...")]
Backend = Annotated[str, typer.Option(help="torch, or onnx or openvino where the folder holds such a graph.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest pair in tokens; longer ones are cut and counted.")]
Template = Annotated[
    str | None,
    typer.Option(help="How pairs are put to a causal model: qwen3, mxbai, bge, plain; else as its folder says."),
]
Instruction = Annotated[str | None, typer.Option(help="What the model is told about its task.")]
Queries = Annotated[Path | None, typer.Option(help="Texts of the queries, where DATA is a TREC run or judgements.")]
Corpus = Annotated[Path | None, typer.Option(help="Texts of the documents, where DATA is a TREC run or judgements.")]
Qrels = Annotated[Path | None, typer.Option(help="Judgements, where DATA is a TREC run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Column = Annotated[list[str] | None, typer.Option(help="Which column is what, as role=name: --column query=question.")]


class Reading(NamedTuple):
    """How pairs are put to a model."""

    max_length: int | None
    template: str | None
    instruction: str | None


class Files(NamedTuple):
    """Texts and judgements that stand in files of their own."""

    queries: Path | None
    corpus: Path | None
    qrels: Path | None

    def collections(self) -> tuple[Path, Path] | None:
        """Queries and documents, where data are to be joined from these files; both are needed for that."""
        if (self.queries is None) != (self.corpus is None):
            raise typer.BadParameter("--queries and --corpus go together: give both or none.")
        if self.qrels is not None and self.queries is None:
            raise typer.BadParameter("--qrels goes with --queries and --corpus.")
        return None if self.queries is None or self.corpus is None else (self.queries, self.corpus)


@app.command(epilog="Example: halfrank train pairs.jsonl --model my-model --out tuned --eval held-out.jsonl")
def train(
    data: Annotated[Path, typer.Argument(help="Training data: JSONL, CSV, TSV, Parquet, BEIR, TREC judgements.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the model, train.jsonl and checkpoints go.")],
    precision: Annotated[
        str, typer.Option(help="auto, float32, mixed-float16, mixed-bfloat16, float16 or bfloat16.")
    ] = "auto",
    compute: Compute = "auto",
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out data, evaluated while training.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="bce, cross-entropy, mse; groups: softmax, margin-mse, kl, ranknet, lambda, listmle."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Updates; overrides --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs, or groups where the data are grouped.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients make one update.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; 2e-5, or 2e-4 with --lora.")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Learning rate of the score head.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Decay of matrices; norms and biases have none.")] = 0.01,
    warmup: Annotated[float, typer.Option(help="Below 1 a share of all steps, else a number of steps.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    loss_scale: Annotated[float, typer.Option(help="First scale of the loss where gradients are 16-bit.")] = 65536.0,
    num_labels: Annotated[int | None, typer.Option(help="Labels of a new score head.")] = None,
    max_length: MaxLength = None,
    template: Template = None,
    instruction: Instruction = None,
    seed: Annotated[int, typer.Option(help="Decides order, dropout, rounding and a new head.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: after each epoch.")] = 0,
    patience: Annotated[int, typer.Option(help="Evaluations without a better score before it stops; 0: never.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: with each evaluation.")] = 0,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank and the head; the weights stay frozen.")
    ] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option("--freeze-embeddings", help="Leave embeddings as they are.")
    ] = False,
    length_buckets: Annotated[
        bool, typer.Option("--length-buckets", help="Batches of pairs of like lengths, in random order.")
    ] = False,
    memory: Annotated[str | None, typer.Option(help="What may be used, such as 16GiB; else all that is free.")] = None,
    release_gradients: Annotated[
        str, typer.Option(help="auto, yes or no: consume gradients as they arrive, 5 bytes a weight instead of 7.")
    ] = "auto",
    checkpointing: Annotated[
        str, typer.Option(help="auto, yes or no: keep the inputs of layers alone and compute them again.")
    ] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first fault; only the loss scale may still be lowered.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of the same settings stopped.")
    ] = False,
    queries: Queries = None,
    corpus: Corpus = None,
    qrels: Qrels = None,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a cross-encoder; the best model by --eval, else the last, is left in OUT."""
    if out.is_file():
        raise typer.BadParameter(f"'{out}' is a file. Choose a folder.")
    if out.exists() and any(out.iterdir()) and not resume:
        raise typer.BadParameter(f"'{out}' is not empty. Choose another folder, or continue its run with --resume.")
    import torch

    from halfrank.allocator import give_back, resident, steady_allocator
    from halfrank.memory import parse_size
    from halfrank.model.adapters import require_peft
    from halfrank.model.scorer import IDENTITY
    from halfrank.train.card import Sources
    from halfrank.train.config import Limits, TrainConfig
    from halfrank.train.examples import check, from_source
    from halfrank.train.loop import TOKENS, kept_to_resume
    from halfrank.train.loop import train as run
    from halfrank.train.planning import check_choices, compared, first_use, loaded_beside, memory_facts, planned
    from halfrank.train.report import QUARANTINE, bar
    from halfrank.whole import only_run

    config = TrainConfig(
        loss=loss, epochs=epochs, steps=steps, batch_size=batch_size, accumulate=accumulate,
        lr=lr or (LORA_RATE if lora else RATE), head_lr=head_lr,
        weight_decay=weight_decay, warmup=warmup, schedule=schedule, clip=clip, seed=seed, eval_every=eval_every,
        loss_scale=loss_scale, length_buckets=length_buckets,
        patience=patience, checkpoint_every=checkpoint_every, freeze_embeddings=freeze_embeddings,
        limits=Limits(strict=strict),
    )  # fmt: skip
    check_choices(release_gradients, checkpointing)
    files = Files(queries, corpus, qrels)
    source, held_out = _source(data, column, files), None if eval_data is None else _read(eval_data, column, files)
    if not resume:  # else the run has read them before
        with _waiting(f"checking {data}"):
            check(source)  # before a model is loaded for nothing
    steady_allocator()
    if lora is not None:
        require_peft()
    before, limit = resident(), None if memory is None else parse_size(memory)
    reading = Reading(max_length, template, instruction)

    def loaded(precision: str) -> tuple[Scorer, int]:
        torch.manual_seed(seed)
        scorer = _trainable(model, precision, compute, num_labels, reading, lora)
        base = before + loaded_beside(scorer, before) + first_use(scorer)
        _say(str(scorer.precision))
        if loss == "mse" and scorer.activation != IDENTITY:
            scorer.activation = IDENTITY
            _say("The mse loss learns the labels themselves: the model's scores are its logits, without a sigmoid.")
        return scorer, base

    scorer, base = loaded(precision)
    with only_run(out), kept_to_resume(out):
        with bar("reading tokens", None) as advance:
            examples = from_source(source, scorer.pairs, out / TOKENS, progress=advance, tell=_say)
        if examples.tokens.truncated:
            _say(
                f"{examples.tokens.truncated} of {len(examples.tokens)} pairs are longer than {scorer.max_length} "
                "tokens and were cut."
            )
        plan_of = partial(planned, limit=limit, release=release_gradients, checkpointing=checkpointing)
        try:
            with _waiting("planning"):
                config, found, budget = plan_of(scorer, examples, config, base=base)
        except DoesNotFitError as error:
            if precision != "auto" or error.instead is None or lora is not None:
                raise
            _say(f"With {scorer.precision.scheme} weights this run does not fit, with {error.instead} ones it does.")
            instead, error.__traceback__ = error.instead, None  # which holds the model
            del scorer
            gc.collect()
            give_back()
            scorer, base = loaded(instead)
            with _waiting("planning"):
                config, found, budget = plan_of(scorer, examples, config, base=base)
        if found is not None:
            _say(str(found))
        evaluate_held_out = None if held_out is None else _evaluator(scorer, held_out)
        sources = Sources(data.name, None if eval_data is None else eval_data.name, _identity(model))
        result = run(
            scorer, examples, config, evaluate=evaluate_held_out, out=out, resume=resume, shown=True, sources=sources,
            budget=budget, closing=lambda: memory_facts(found),
        )  # fmt: skip
    measured = memory_facts(found)
    if measured:
        _say(compared(measured))
    summary = {
        "model": str(out), "steps": result.steps, "skipped": result.skipped, "truncated": examples.tokens.truncated,
        "loss": result.losses[-1] if result.losses else None, "best_score": result.best_score,
        "best_step": result.best_step, "precision": str(scorer.precision), "recovery": result.recovery.as_json(),
        "finding": None if result.finding is None else result.finding.as_json(), **measured,
    }  # fmt: skip
    left_out = len(result.recovery.quarantined)
    listed = f", {left_out} pairs left out (see {out / QUARANTINE})" if left_out else ""
    learned = "" if result.finding is None else f", but it did not learn: try {result.finding.remedy}"
    _print(summary, as_json, f"{result.steps} steps, {result.skipped} skipped{listed}; the model is in {out}{learned}")


@app.command(epilog="Example: halfrank plan my-model --data pairs.jsonl --memory 16GiB")
def plan(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id; its weights are not read.")],
    data: Annotated[Path | None, typer.Option("--data", help="Training data, for the lengths of real pairs.")] = None,
    memory: Annotated[str | None, typer.Option(help="What may be used, such as 16GiB; else all that is free.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs, or groups where the data are grouped.")] = 16,
    compute: Compute = "auto",
    max_length: MaxLength = None,
    num_labels: Annotated[int | None, typer.Option(min=1, help="Labels of a new score head.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Rank of the adapters that are compared; else 16.")] = None,
    queries: Queries = None,
    corpus: Corpus = None,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Say what training would need, scheme by scheme, before anything is loaded; exit 1 where nothing fits."""
    from halfrank import memory as budget
    from halfrank.model.folder import LoadOptions

    if data is None and (queries is not None or corpus is not None):
        raise typer.BadParameter("--queries and --corpus are texts of --data, which is not given.")
    limit = budget.limit_of_machine() if memory is None else budget.parse_size(memory)
    options = LoadOptions(num_labels=num_labels, max_length=max_length)
    dataset = None if data is None else _read(data, column, Files(queries, corpus, None))
    found = _memory_plan(
        model, dataset, options, limit=limit, batch_size=batch_size, compute=compute, lora_rank=lora or 0
    )
    _print(found.as_json(), as_json, str(found))
    if found.chosen is None:
        raise typer.Exit(1)


@app.command(epilog="Example: halfrank score pairs.jsonl --model tuned --out scored.jsonl")
def score(
    data: Annotated[Path, typer.Argument(help="Pairs or groups: JSONL, CSV, TSV, Parquet, a BEIR folder, a TREC run.")],
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; standard output by default.")] = None,
    shape: Annotated[str, typer.Option("--format", help="jsonl, trec (a run) or scores (a number a line).")] = "jsonl",
    compute: Compute = "auto",
    backend: Backend = "torch",
    max_length: MaxLength = None,
    template: Template = None,
    instruction: Instruction = None,
    queries: Queries = None,
    corpus: Corpus = None,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Score pairs in the order of the data; a file of any size, and an interrupted run goes on where it stopped."""
    from halfrank.score import fingerprint_of
    from halfrank.score import score as run
    from halfrank.train.report import bar

    files = Files(queries, corpus, None)
    items = _items(data, column, files)
    scorer = _load(model, compute, Reading(max_length, template, instruction), backend)
    _say_certificate(model)
    places = [path for path in (data, queries, corpus, Path(model)) if path is not None and path.exists()]
    name = fingerprint_of(places, model, compute, backend, max_length, template, instruction, column)
    try:
        with bar("scoring", None) as advance:
            done = run(
                scorer, items, out, shape=shape, fingerprint=name, expected=_letters(data) // 4, progress=advance,
                write=print,
            )  # fmt: skip
    except KeyboardInterrupt:
        if out is None:
            raise
        raise Interrupted("Stopped; what is scored is kept, and the same command goes on from there.") from None
    if out is not None:
        resumed = f", {done.resumed} of them found finished" if done.resumed else ""
        wide = f" ({done.islands} modules in float32)" if done.islands else ""
        said = f"{done.pairs} pairs scored{resumed}, {done.truncated} cut, {done.rescued} rescued{wide}; see {out}"
        _print({**vars(done), "out": str(out)}, as_json, said)


@app.command(epilog='Example: halfrank rank "how to parse json" --documents docs.txt --model tuned --top-k 3')
def rank(
    query: Annotated[str, typer.Argument(help="The question.")],
    documents: Annotated[Path, typer.Option("--documents", "-d", help="One document a line, or JSONL with 'text'.")],
    model: Model,
    top_k: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    compute: Compute = "auto",
    backend: Backend = "torch",
    max_length: MaxLength = None,
    template: Template = None,
    instruction: Instruction = None,
    as_json: AsJson = False,
) -> None:
    """Rank documents for one query, best first."""
    from halfrank.data.pairs import check_text

    check_text(query, "the query")
    texts = _documents(documents)
    scorer = _load(model, compute, Reading(max_length, template, instruction), backend)
    if scorer.num_labels != 1:
        raise typer.BadParameter(f"rank needs a model with one label; '{model}' has {scorer.num_labels}.")
    _say_certificate(model)
    values = _scores(scorer, [(query, text) for text in texts]).values[:, 0]
    order = sorted(range(len(texts)), key=lambda index: -values[index])[:top_k]
    rows = [{"rank": n, "score": float(values[i]), "line": i + 1, "text": texts[i]} for n, i in enumerate(order, 1)]
    if as_json:
        print(json.dumps({"query": query, "results": rows}, ensure_ascii=False))
        return
    for row in rows:
        print(f"{row['rank']:3d}  {row['score']:.4f}  {str(row['text'])[:100]}")


@app.command(epilog="Example: halfrank evaluate held-out.jsonl --model tuned")
def evaluate(
    data: Annotated[
        Path, typer.Argument(help="Labelled pairs or graded groups: JSONL, CSV, TSV, Parquet, BEIR, TREC.")
    ],
    model: Model,
    compute: Compute = "auto",
    backend: Backend = "torch",
    max_length: MaxLength = None,
    template: Template = None,
    instruction: Instruction = None,
    queries: Queries = None,
    corpus: Corpus = None,
    qrels: Qrels = None,
    column: Column = None,
    cutoff: Annotated[int, typer.Option(min=1, help="Ranks that nDCG and MRR look at.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Measure a model: nDCG, MRR and MAP for groups, accuracy or correlation for pairs."""
    dataset = _read(data, column, Files(queries, corpus, qrels), keep_unjudged=True)
    scorer = _load(model, compute, Reading(max_length, template, instruction), backend)
    report = _report(scorer, dataset, shown=True, cutoff=cutoff)
    facts = {**report.values, "count": report.count, "ties": report.ties, "skipped": report.skipped}
    lines = [f"{name:20s} {value:.4f}" for name, value in report.values.items()]
    lines.append(
        f"{report.count} {'queries' if dataset.grouped else 'pairs'}, {report.ties} tied scores, "
        f"{report.skipped} left out"
    )
    _print(facts, as_json, "\n".join(lines))


@app.command(epilog="Example: halfrank doctor my-model --data pairs.jsonl --eval held-out.jsonl --html doctor.html")
def doctor(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id.")],
    data: Annotated[Path | None, typer.Option("--data", help="Training data; built-in texts if none.")] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out data, compared with --data.")] = None,
    precision: Annotated[
        str, typer.Option(help="auto, float32, mixed-float16, mixed-bfloat16, float16 or bfloat16.")
    ] = "auto",
    compute: Compute = "auto",
    lr: Annotated[float, typer.Option(help="The learning rate to be trained with.")] = 2e-5,
    num_labels: Annotated[int | None, typer.Option(help="Labels of a new score head.")] = None,
    max_length: MaxLength = None,
    template: Template = None,
    instruction: Instruction = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page with the heat maps here.")] = None,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Look at a model and its data before training: what will go wrong in 16 bits, and what to change, worst first."""
    from halfrank.doctor.checks import Plan, examine
    from halfrank.doctor.page import doctor_page
    from halfrank.model.folder import LoadOptions

    nothing = Files(None, None, None)
    dataset = None if data is None else _read(data, column, nothing)
    held_out = None if eval_data is None else _read(eval_data, column, nothing, keep_unjudged=True)
    groups, tests = (None if found is None else found.queries for found in (dataset, held_out))
    # Before the model is loaded, whose own weights would count as taken.
    needed = _needed(model, dataset, LoadOptions(num_labels=num_labels, max_length=max_length), compute)
    scorer = _trainable(model, precision, compute, num_labels, Reading(max_length, template, instruction))
    grouped = dataset is not None and dataset.grouped
    with _waiting("examining"):
        name = Path(model).absolute().name if Path(model).is_dir() else model
        report = examine(scorer, groups, tests, Plan(lr=lr, grouped=grouped, memory=needed), name=name)
    if html is not None:
        _write(html, doctor_page(report))
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        _show_examination(report)
    if not report.sound:
        raise typer.Exit(1)


@app.command(epilog="Example: halfrank certify my-model-float16 --reference my-model --data held-out.jsonl")
def certify(
    model: Annotated[str, typer.Argument(help="The folder of the narrow copy; the certificate is written into it.")],
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="The float32 model it is a copy of.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Pairs or groups to score; built-in texts if none.")
    ] = None,
    compute: Annotated[
        list[str] | None, typer.Option(help="A format to compute in; repeat it. float32 and the storage's, emulated.")
    ] = None,
    max_score_error: Annotated[float | None, typer.Option(help="Largest score error, in spreads or 1.")] = None,
    max_mean_score_error: Annotated[float | None, typer.Option(help="Largest mean score error.")] = None,
    min_kendall_tau: Annotated[float | None, typer.Option(help="Smallest mean Kendall tau.")] = None,
    min_top10_overlap: Annotated[float | None, typer.Option(help="Smallest mean overlap of the first ten.")] = None,
    max_ndcg_loss: Annotated[
        float | None, typer.Option(help="Largest loss of nDCG@10, where there are grades.")
    ] = None,
    max_new_ties: Annotated[int | None, typer.Option(help="Most pairs of documents that newly score alike.")] = None,
    min_headroom_bits: Annotated[
        float | None, typer.Option(help="Fewest bits below the format's largest number.")
    ] = None,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="Compare scores alone: MODEL was trained apart and is no rounding.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Keep modules that overflow in float32, and certify again.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only say whether the folder has changed since it was certified.")
    ] = False,
    queries: Queries = None,
    corpus: Corpus = None,
    qrels: Qrels = None,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Compare a 16-bit copy with its float32 reference, write the certificate, exit 1 where it breaks its budget."""
    if verify:
        _verify(Path(model), as_json)
        return
    if reference is None:
        raise typer.BadParameter("certify needs --reference: the float32 model that MODEL is a copy of.")
    if not Path(model).is_dir():
        raise typer.BadParameter(f"'{model}' is no folder: a certificate is written into the folder of the copy.")
    from halfrank import whole
    from halfrank.certify.compare import certify as run
    from halfrank.model import folder

    limits = {
        "max_score_error": max_score_error, "max_mean_score_error": max_mean_score_error,
        "min_kendall_tau": min_kendall_tau, "min_top10_overlap": min_top10_overlap, "max_ndcg_loss": max_ndcg_loss,
        "max_new_ties": max_new_ties, "min_headroom_bits": min_headroom_bits,
    }  # fmt: skip
    groups, name = _certified_on(data, column, Files(queries, corpus, qrels))
    from halfrank.train.report import bar

    with bar("certifying", None) as advance:
        found, scorer = run(
            model, reference, groups, limits=limits, copied=not scores_only, computes=compute, data_name=name,
            repair=repair, progress=advance,
        )  # fmt: skip
    if repair and scorer is not None and found.passed:
        folder.record_islands(scorer, Path(model))
        found = found.of_folder(Path(model))
    whole.write_whole(Path(model), partial(found.write, card=Path(model) / "README.md"))
    lines = [found.line(), *(f"  {reason}" for reason in found.reasons)]
    for m in found.measured:
        lines.append(f"  {m.summary()}")
    _print(found.as_json(), as_json, "\n".join(lines))
    if not found.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: halfrank report tuned")
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, with its train.jsonl.")], as_json: AsJson = False
) -> None:
    """Draw a run as one page, report.html: loss, norms, scale, headroom, evaluation, events, certificate."""
    from halfrank.train.report import write_report

    place = write_report(run)
    _print({"report": str(place)}, as_json, str(place))


@app.command(epilog="Example: halfrank export my-model --dtype float16 --out my-model-float16")
def export(
    model: Annotated[str, typer.Argument(help="A model folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the copy goes.")],
    dtype: Annotated[str | None, typer.Option(help="Weights for torch: float16, bfloat16 or float32.")] = None,
    kind: Annotated[str | None, typer.Option("--format", help="A graph for another runtime: onnx or openvino.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --format: products of 8 bits, embeddings as the runtime has them.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="With --format: what the copy is certified on; built-in texts if none."),
    ] = None,
    compute: Annotated[
        list[str] | None,
        typer.Option(help="With --format openvino: certified in this format, float32 or bfloat16; repeat it."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Weights above this size are cut into several files.")] = "5GB",
    keep_float32: Annotated[
        list[str] | None, typer.Option(help="A module that computes in float32 (an island); repeat it.")
    ] = None,
    column: Column = None,
    as_json: AsJson = False,
) -> None:
    """Write a model in another format, certified against float32; a copy that breaks its budget is refused."""
    from halfrank.export import export as run
    from halfrank.export import export_graph

    if (dtype is None) == (kind is None):
        raise typer.BadParameter("Give --dtype (weights for torch) or --format (a graph for another runtime).")
    if kind is None and (int8 or data is not None or compute):
        raise typer.BadParameter("--int8, --data and --compute go with --format.")
    if kind is not None and keep_float32:
        raise typer.BadParameter("--keep-float32 goes with --dtype: a graph computes in float32.")
    if dtype is not None:
        certificate = run(model, out, dtype=dtype, max_shard_size=max_shard_size, islands=tuple(keep_float32 or ()))
    else:
        groups, name = _certified_on(data, column, Files(None, None, None))
        with _waiting(f"exporting to {kind}"):
            certificate = export_graph(
                model, out, kind=str(kind), int8=int8, computes=compute or ("float32",), groups=groups, data_name=name
            )
    said = certificate.line() if certificate is not None else "float32 loses nothing and needs no certificate"
    facts = {
        "model": str(out), "dtype": dtype, "format": kind, "int8": int8,
        "certificate": None if certificate is None else certificate.as_json(),
    }  # fmt: skip
    _print(facts, as_json, f"{out}: {said}")


@app.command(epilog='Example: halfrank demo --ask "split a string into words"')
def demo(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model folder or hub id.")] = None,
    ask: Annotated[
        str | None, typer.Option(help="Answer a question from the standard library with the demo's model.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the trained model goes.")] = Path("out/demo"),
    as_json: AsJson = False,
) -> None:
    """Train a real MiniLM in float16 on Python's own documentation, and rank with it."""
    from halfrank.demo import run

    run(model=model, ask=ask, out=out, as_json=as_json)


def main() -> None:
    """Run a verb; every expected failure is one message on standard error and an exit code."""
    handler = logging.StreamHandler()
    said: set[str] = set()

    def first_time(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in said
        said.add(text)
        return new

    handler.addFilter(first_time)  # a verb that loads a model several times announces each fact once
    logging.getLogger("halfrank").addHandler(handler)
    try:
        # click gives back the code of a typer.Exit, and what a verb returns: None.
        code = app(standalone_mode=False, prog_name="halfrank")
        if sys.stdout is not None:  # closed by whoever started this process
            sys.stdout.flush()
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except Interrupted as stopped:
        sys.exit(_fail(stopped, 130))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except HalfrankError as error:
        sys.exit(_fail(error, 1))
    except ValueError as error:
        sys.exit(_fail(error, 2))
    except OSError as error:
        # Files that cannot be written are errors of our own by now: what has no name is standard output.
        if error.filename is not None or error.errno not in REFUSED:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what waits would fail again at the end
        closed = isinstance(error, BrokenPipeError)
        sys.exit(1 if closed else _fail(SaveError(f"Cannot write to standard output: {error.strerror}."), 1))
    except Exception as error:
        # Click's own usage errors know how to show themselves; anything else is our fault and keeps its traceback.
        if not hasattr(error, "show"):
            raise
        error.show()
        sys.exit(getattr(error, "exit_code", 2))


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("HALFRANK_DEBUG"):
        raise error
    print(f"halfrank: {error}", file=sys.stderr)
    return code


def _show_examination(report: Examination) -> None:
    from rich.console import Console
    from rich.table import Table

    colors = {"fix": "bold red", "warn": "yellow", "note": "blue", "fine": "green"}
    console = Console()
    facts = Table(show_header=False, box=None)
    for name, value in report.facts.items():
        if value not in (None, [], ""):
            facts.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    facts.add_row("memory", ", ".join(f"{name}: {value}" for name, value in list(report.memory.items())[:4]))
    checks = Table("", "what", "found", "change", title="What to change, worst first", title_justify="left")
    for check in report.worst_first:
        checks.add_row(f"[{colors[check.level]}]{check.level}[/]", check.topic, check.found, check.change)
    tight = Table("module", "float16 bits left", "gradient underflow", title="Tightest modules", title_justify="left")
    tight.columns[0].overflow = "fold"
    for row in sorted(report.modules, key=lambda row: row.headroom_float16)[:8]:
        lost = "-" if row.gradient_underflow is None else f"{row.gradient_underflow:.1%}"
        tight.add_row(row.name, f"{row.headroom_float16:.1f}", lost)
    for part in (facts, checks, tight):
        console.print(part)


def _write(path: Path, text: str) -> None:
    from halfrank.errors import SaveError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"Cannot write to '{path}': {error.strerror or error}. Choose another place.") from error


def _memory_plan(
    model: str,
    dataset: Dataset | None,
    options: LoadOptions,
    *,
    limit: int,
    batch_size: int,
    compute: str,
    lora_rank: int = 0,
) -> MemoryPlan:
    from halfrank import memory as budget

    described = budget.describe(model, options)
    for note in described.notes:
        _say(note)
    pairs = budget.tokenizer_of(described, options)
    if dataset is None:
        units = [[pairs.max_length]] * batch_size
    else:
        with _waiting("reading tokens"):
            lengths = iter(pairs.encode(dataset.texts).lengths.tolist())
        sizes = [len(group.documents) for group in dataset.groups] if dataset.grouped else [1] * len(dataset.pairs)
        units = [[next(lengths) for _ in range(size)] for size in sizes]
    with _waiting("running the model on shapes"):
        batches, base = budget.batches_of(units, batch_size), budget.base_of_training()
        return budget.plan(described, batches, limit=limit, base=base, compute=compute, lora_rank=lora_rank)


def _needed(model: str, dataset: Dataset | None, options: LoadOptions, compute: str) -> dict[str, object]:
    """What the doctor says about memory: the plan in words, or why there is none."""
    from halfrank import memory as budget

    try:
        found = _memory_plan(model, dataset, options, limit=budget.limit_of_machine(), batch_size=16, compute=compute)
    except ModelError as error:
        return {"not planned": str(error)}
    ways = {
        str(row.way): f"{row.need.peak / 2**30:.2f} GiB" + ("" if row.fits else ", does not fit") for row in found.rows
    }
    chosen = "nothing fits" if found.chosen is None else str(found.chosen.way)
    return {
        "fits": found.chosen is not None,
        "may be used": f"{found.limit / 2**30:.1f} GiB",
        "fastest": chosen,
        **ways,
    }


def _verify(path: Path, as_json: bool) -> None:
    from halfrank.certify import certificate as certificates

    if not path.is_dir():
        raise typer.BadParameter(f"'{path}' is no model folder.")
    found = certificates.read(path)
    if found is None:
        raise ModelError(f"'{path}' has no certificate: halfrank certify {path} --reference MODEL makes one.")
    changed = certificates.changes(path, found)
    said = f"changed since it was certified: {'; '.join(changed)}" if changed else "unchanged since it was certified"
    _print({"passed": found.passed, "changed": changed}, as_json, f"{path}: {said}\n{found.line()}")
    if changed or not found.passed:
        raise typer.Exit(1)


def _certified_on(data: Path | None, columns: list[str] | None, files: Files) -> tuple[list[Group], str]:
    from halfrank.data import probes

    if data is None:
        return probes.groups(), "built-in texts"
    dataset = _read(data, columns, files, keep_unjudged=True)
    return dataset.queries, data.name


def _say_certificate(model: str) -> None:
    from halfrank.certify import certificate as certificates

    path = Path(model)
    found = certificates.read(path) if path.is_dir() else None
    if found is not None:
        _say(found.line())


def _load(model: str, compute: str, reading: Reading, backend: str) -> Scorer:
    from halfrank.allocator import steady_allocator
    from halfrank.model import folder

    steady_allocator()  # before a model runs for the first time
    with _waiting("loading the model"):
        return folder.load(model, folder.LoadOptions(compute=compute, backend=backend, **reading._asdict()))


def _trainable(
    model: str, precision: str, compute: str, num_labels: int | None, reading: Reading, lora: int | None = None
) -> Scorer:
    """A scorer stored as `precision` says; a 16-bit one is read in 16 bits, so that no wider copy ever exists.

    With `lora` it has fresh adapters of that rank.
    """
    import torch

    from halfrank.model import adapters, folder
    from halfrank.precision import LORA, SCHEMES, Facts, choose, detect, usual_hardware

    if precision.startswith(LORA):
        raise typer.BadParameter(f"precision must be auto or one of {', '.join(SCHEMES)}; adapters: --lora RANK.")
    narrow = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    wide = None if precision == "auto" else torch.float32
    options = folder.LoadOptions(num_labels=num_labels, dtype=narrow.get(precision, wide), **reading._asdict())
    with _waiting("loading the model"):
        described = _described(model, options) if precision == "auto" else None
        if described is not None:
            parameters, arrived = described.sizes.parameters, described.arrived
            foreseen = Facts(parameters, arrived, usual_hardware(), _memory())
            storage = choose(foreseen, compute=compute, frozen=lora is not None).storage
            if arrived is torch.float32 and storage in narrow.values():
                options = replace(options, dtype=storage)
        scorer = folder.load(model, options)
    arrived = scorer.precision.storage if options.dtype is None else torch.float32
    facts = Facts(scorer.model.num_parameters(), arrived, detect(scorer.device), _memory())
    frozen = lora is not None or scorer.adapters is not None
    scorer.adopt(choose(facts, scheme=precision, compute=compute, frozen=frozen))
    if lora is not None:
        adapters.add(scorer, adapters.settings(scorer.model, lora))
    return scorer


def _identity(model: str) -> str:
    """What a model is called in a run's state: the whole path of a folder, or the hub id."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _described(model: str, options: LoadOptions) -> Described | None:
    """What a model's files say before they are read; None for one that has a class of its own to be read by."""
    from halfrank import memory as budget

    if options.num_labels is not None and options.num_labels < 1:
        return None  # reading it will say so
    try:
        return budget.describe(model, options)
    except ModelError:
        return None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _source(path: Path, columns: list[str] | None, files: Files) -> Source:
    from halfrank.data.source import Source

    texts = files.collections() or (None, None)
    return Source(path, _named(columns), queries=texts[0], corpus=texts[1], qrels=files.qrels)


def _read(path: Path, columns: list[str] | None, files: Files, *, keep_unjudged: bool = False) -> Dataset:
    source = _source(path, columns, files)
    with _waiting(f"reading {path}"):
        dataset = source.dataset(keep_unjudged=keep_unjudged)
    for note in dataset.notes:
        _say(note)
    return dataset


def _items(path: Path, columns: list[str] | None, files: Files) -> Iterator[Pair | Group]:
    from halfrank.data.readers import stream
    from halfrank.data.trec import read_joined

    named = _named(columns)
    if (texts := files.collections()) is not None:
        return iter(read_joined(path, queries=texts[0], corpus=texts[1]))
    return stream(path, columns=named)


def _letters(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _named(columns: list[str] | None) -> dict[str, str] | None:
    named = {}
    for item in columns or []:
        role, equals, name = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--column needs role=name, such as query=question; got {item!r}.")
        named[role] = name
    return named or None


def _documents(path: Path) -> list[str]:
    from halfrank.data.pairs import check_text

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"There is no file '{path}'.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            texts.append(check_text(_text_of(line, f"{path}:{number}"), f"{path}:{number}"))
    if not texts:
        raise DataError(f"'{path}' holds no documents: give one a line, or JSONL with 'text'.")
    return texts


def _text_of(line: str, source: str) -> Any:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = json.loads(line)
        return row["text"] if "text" in row else row["document"]
    except (json.JSONDecodeError, KeyError):
        raise DataError(f"{source}: expected a JSON object with 'text' or 'document', got {line[:60]!r}.") from None


def _scores(scorer: Scorer, texts: Sequence[tuple[str, str]], *, shown: bool = True) -> Any:
    from halfrank.allocator import keeping
    from halfrank.predict import predict
    from halfrank.train.report import bar

    if not shown:
        return predict(scorer, texts)
    with bar("scoring", len(texts)) as advance, keeping(advance) as passed:
        return predict(scorer, texts, progress=passed)


def _report(scorer: Scorer, dataset: Dataset, *, shown: bool = False, cutoff: int = 10) -> Report:
    from halfrank.evaluate import evaluate_groups, evaluate_pairs

    values = _scores(scorer, dataset.texts, shown=shown).values
    if dataset.grouped:
        return evaluate_groups(dataset.groups, values[:, 0], cutoff=cutoff)
    return evaluate_pairs(dataset.pairs, values)


def _evaluator(scorer: Scorer, dataset: Dataset) -> Any:
    from halfrank.train.loop import Evaluation

    def measured(epoch: int, step: int) -> Evaluation:
        report = _report(scorer, dataset)
        return Evaluation(report.score, report.values)

    return measured


def _print(facts: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(facts, default=float) if as_json else text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


if __name__ == "__main__":
    main()
