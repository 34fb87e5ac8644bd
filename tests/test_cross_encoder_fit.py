"""`fit` against sentence-transformers' own: the same numbers in float32, and 16-bit weights that follow them."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers as peer
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.cross_encoder import evaluation
from sentence_transformers.sentence_transformer.datasets import NoDuplicatesDataLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from halfrank.cross_encoder import CrossEncoder
from halfrank.cross_encoder.loaders import read_loader
from halfrank.data.pairs import InputExample
from halfrank.errors import DataError
from halfrank.numerics.adamw import AdamW
from judges import BINARY, CLASSES, JUDGED, SIMILARITY
from tiny import PAIRS, SENTENCES, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch|accelerate)")
MPNET = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halfrank" / "all-mpnet-base-v2"
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUIET = {"show_progress_bar": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: make_folder(family, root / family) for family in ("bert", "llama", "mpnet")}
    return made | {"three": make_folder("bert", root / "three", num_labels=3)}


def examples(kind: Any = InputExample, labels: int = 1, count: int = 16) -> list[Any]:
    """Labelled pairs; grades are fractions for one label."""
    values = [number % 3 if labels > 1 else number % 5 / 4 for number in range(count)]
    return [kind(texts=list(pair), label=value) for pair, value in zip(PAIRS, values, strict=False)]


# The text that started this project


@pytest.mark.parametrize("use_amp", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["bert", "llama", "mpnet", "all-mpnet-base-v2"])
def test_the_script_that_started_this_project(
    folders: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype, use_amp: bool
) -> None:
    if family == "all-mpnet-base-v2" and not (MPNET.exists() and dtype is torch.float16):
        pytest.skip("needs the folder that benchmarks/seed_script.py puts into the cache")
    path, folder = str(folders.get(family, MPNET)), str(tmp_path / "saved")
    train_dataloader = DataLoader(examples(), shuffle=True, batch_size=8)

    model = CrossEncoder(path, num_labels=1, classifier_dropout=0.1, automodel_args={"torch_dtype": dtype})
    before = model.predict(PAIRS)
    options = {"use_amp": True} if use_amp else {}
    model.fit(train_dataloader=train_dataloader, epochs=2, warmup_steps=10, output_path=None, **options)
    scores = model.predict([["I am happy", "I am sad"], ["I am happy", "I am sad"]])
    model.save(folder)
    again = CrossEncoder(folder, automodel_args={"torch_dtype": torch.float16})

    assert model.dtype is dtype
    assert again.dtype is torch.float16
    assert scores.shape == (2,)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert np.isfinite(scores).all()
    assert abs(model.predict(PAIRS) - before).max() > 0
    np.testing.assert_allclose(again.predict([["I am happy", "I am sad"]]), scores[:1], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_end_where_float32_ends(folders: dict[str, Path], dtype: torch.dtype) -> None:
    start = CrossEncoder(str(folders["bert"])).predict(PAIRS)
    ends = {}
    for storage in (torch.float32, dtype):
        torch.manual_seed(3)
        model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": storage}, config_kwargs=DRY)
        loader = DataLoader(examples(), shuffle=True, batch_size=4)
        model.fit(loader, epochs=6, warmup_steps=2, optimizer_params={"lr": 1e-3}, **QUIET)
        ends[storage] = model.predict(PAIRS)
    moved = np.linalg.norm(ends[torch.float32] - start)
    assert moved > 0.3
    assert np.linalg.norm(ends[dtype] - ends[torch.float32]) < 0.05 * moved


# The same numbers as the peer's


def both_ends(path: Path, labels: int, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores after four steps of one batch each, ours and the peer's; one batch, so that no order matters."""
    ends = []
    for face, kind in ((CrossEncoder, InputExample), (peer.CrossEncoder, peer.InputExample)):
        model = face(str(path), config_kwargs=dict(DRY), num_labels=labels)
        loader = DataLoader(examples(kind, labels), batch_size=16)
        # 6.2's fit fails with a loss of the user's (its wrapper calls the model with keywords); its older fit does not.
        fit = model.old_fit if face is peer.CrossEncoder and "loss_fct" in arguments else model.fit
        with fresh_folder():
            fit(loader, epochs=4, **copy.deepcopy(arguments), **QUIET)
        ends.append(np.asarray(model.predict(PAIRS, show_progress_bar=False)))
    return ends[0], ends[1]


@contextlib.contextmanager
def fresh_folder() -> Iterator[None]:
    # The peer writes checkpoints into the working folder.
    import tempfile

    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


FAST = {"optimizer_params": {"lr": 1e-3}, "warmup_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "default learning rate": {"warmup_steps": 0},
    "default warm-up": {"optimizer_params": {"lr": 1e-3}},
    "constantlr": {**FAST, "scheduler": "constantlr"},
    "WarmupConstant": {**FAST, "scheduler": "WarmupConstant"},
    "WarmupLinear": {**FAST, "scheduler": "WarmupLinear"},
    "warmupcosine": {**FAST, "scheduler": "warmupcosine"},
    "hard restarts": {**FAST, "scheduler": "WarmupCosineWithHardRestarts"},
    "loss": {**FAST, "loss_fct": nn.MSELoss()},
    "loss with a state": {**FAST, "loss_fct": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))},
    "activation": {**FAST, "activation_fct": nn.Tanh(), "loss_fct": nn.L1Loss()},
    "decay": {**FAST, "weight_decay": 0.5},
    "clipping": {**FAST, "max_grad_norm": 0.01, "optimizer_class": torch.optim.SGD, "optimizer_params": {"lr": 0.5}},
    "betas and eps": {**FAST, "optimizer_params": {"lr": 1e-3, "betas": (0.5, 0.9), "eps": 1e-4}},
    "torch's AdamW": {**FAST, "optimizer_class": torch.optim.AdamW},
}


@pytest.mark.parametrize("case", CASES)
def test_float32_ends_where_the_peer_ends(folders: dict[str, Path], case: str) -> None:
    ours, theirs = both_ends(folders["bert"], 1, **CASES[case])
    start = CrossEncoder(str(folders["bert"])).predict(PAIRS)
    moved = abs(theirs - start).max()
    assert moved > 1e-5
    assert abs(ours - theirs).max() < max(0.01 * moved, 2e-6)


@pytest.mark.parametrize("case", [{}, {"loss_fct": nn.CrossEntropyLoss(label_smoothing=0.1)}])
def test_several_labels_end_where_the_peer_ends(folders: dict[str, Path], case: dict[str, Any]) -> None:
    ours, theirs = both_ends(folders["three"], 3, **FAST, **case)
    assert ours.shape == theirs.shape == (24, 3)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


# Loaders


class Fresh(Dataset[Any]):
    """Makes a new object at each access, as lazily reading datasets do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> InputExample:
        return InputExample(texts=list(PAIRS[index]), label=index % 2)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[InputExample]:
        return iter(examples(count=10))


class Namespace:
    def __init__(self, texts: list[str], label: float) -> None:
        self.texts, self.label = texts, label


def never(batch: Any) -> Any:
    raise AssertionError("the collate function was called")


LOADERS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "loader": (lambda: DataLoader(examples(count=10), batch_size=4), [4, 4, 2]),
    "drop last": (lambda: DataLoader(examples(count=10), batch_size=4, drop_last=True), [4, 4]),
    "collate": (lambda: DataLoader(examples(count=10), batch_size=4, collate_fn=never), [4, 4, 2]),
    "batch sampler": (
        lambda: DataLoader(Fresh(), batch_sampler=BatchSampler(SequentialSampler(range(9)), 3, False)),
        [3, 3, 3],
    ),
    "lazy dataset": (lambda: DataLoader(Fresh(), batch_size=5), [5, 5]),
    "no batches": (lambda: DataLoader(examples(count=10), batch_size=None), [10]),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), [4, 4, 2]),
    "stream without end": (lambda: DataLoader(Stream(), batch_size=4, drop_last=True), [4, 4]),
    "list of examples": (lambda: examples() + examples(count=2), [16, 2]),
    "list of batches": (lambda: [examples(count=3), examples(count=5)], [3, 5]),
    "generator": (lambda: (examples(count=3) for _ in range(2)), [3, 3]),
    "other objects": (lambda: [[Namespace(["a", "b"], 1), Namespace(["c", "d"], 0)]], [2]),
    "peer's examples": (lambda: DataLoader(examples(peer.InputExample, count=6), batch_size=4), [4, 2]),
    "no duplicates": (lambda: NoDuplicatesDataLoader(examples(peer.InputExample, count=8), 2), [2, 2, 2, 2]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_give_their_own_batches_uncollated(folders: dict[str, Path], name: str) -> None:
    make, sizes = LOADERS[name]
    material = read_loader(make(), 2)
    assert [[len(batch) for batch in epoch] for epoch in material.epochs] == [sizes, sizes]
    if name != "no duplicates":  # it shuffles
        first = [material.pairs[index] for index in material.epochs[0][0]]
        assert [pair.query for pair in first] in (["a", "c"], [pair[0] for pair in PAIRS[: len(first)]])
    CrossEncoder(str(folders["bert"])).fit(make(), epochs=2, **QUIET)


def test_a_shuffled_loader_is_shuffled_anew_each_epoch_and_read_once(folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    loader = DataLoader(examples(), batch_size=4, shuffle=True)
    material = read_loader(loader, 3)
    torch.manual_seed(1)
    wanted = [[[id(loader.dataset[i]) for i in batch] for batch in loader.batch_sampler] for _ in range(3)]
    known = {id(example): number for number, example in enumerate(loader.dataset)}
    for ours, theirs in zip(material.epochs, wanted, strict=True):
        assert [[material.pairs[i].query for i in batch] for batch in ours] == [
            [PAIRS[known[key]][0] for key in batch] for batch in theirs
        ]
    assert material.epochs[0] != material.epochs[1]
    assert len(material.pairs) == 16


def test_the_same_seed_gives_the_same_bits(folders: dict[str, Path]) -> None:
    ends = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
        model.fit(DataLoader(examples(), batch_size=4, shuffle=True), epochs=2, **FAST, **QUIET)
        ends.append(model.predict(PAIRS))
    np.testing.assert_array_equal(ends[0], ends[1])
    assert abs(ends[0] - ends[2]).max() > 1e-4


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            InputExample(texts=["a", "b"], label=float("nan")),
            r"training example 1 \(counted from 0\): the label is nan",
        ),
        (InputExample(texts=["a", "b"], label=float("inf")), "the label is inf"),
        (InputExample(texts=["a", "b"], label=None), "must be a number; got NoneType"),
        (InputExample(texts=["a", "b"], label="1"), "must be a number; got str '1'"),
        (InputExample(texts=["a", ""], label=1), r"training example 1 \(counted from 0\): the text is empty"),
        (InputExample(texts=["  ", "b"], label=1), r"training example 1 \(counted from 0\): the text is empty"),
        (InputExample(texts=["a", None], label=1), "expected text, got NoneType"),
        (InputExample(texts=["a", "b", "c"], label=1), "must have two texts"),
        (InputExample(texts="ab", label=1), "must have two texts"),
        (InputExample(texts=["a", "b"], label=5), "labels from 0 to 1"),
        ({"texts": ["a", "b"], "label": 1}, "as an InputExample has; got dict"),
        ("text", "as an InputExample has; got str"),
    ],
)
def test_bad_examples_stop_before_the_first_step(folders: dict[str, Path], example: Any, message: str) -> None:
    model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
    before = model.predict(PAIRS)
    with pytest.raises(DataError, match=message):
        model.fit([[*examples(count=1), example]], **QUIET)
    np.testing.assert_array_equal(model.predict(PAIRS), before)


@pytest.mark.parametrize("label", [3, 0.5, -1])
def test_classes_outside_the_labels_are_named(folders: dict[str, Path], label: float) -> None:
    with pytest.raises(DataError, match="whole labels from 0 to 2"):
        CrossEncoder(str(folders["three"])).fit([[InputExample(texts=["a", "b"], label=label)]], **QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataloader": []}, "nothing to train on"),
        ({"scheduler": "linear"}, "scheduler must be one of constantlr"),
        ({"scheduler": None}, "scheduler must be one of constantlr"),
        ({"warmup_steps": 0.5}, "whole number of steps"),
        ({"warmup_steps": -1}, "whole number of steps"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"optimizer_class": torch.optim.SGD}, "optimizer_class=SGD cannot train float16 weights"),
        ({"optimizer_params": {"lr": 1e-3, "momentum": 0.9}}, "takes lr, betas, eps, weight_decay"),
        ({"loss_fct": nn.BCEWithLogitsLoss(reduction="none")}, "Use reduction='mean'"),
        ({"max_grad_norm": -1}, "clip must be 0 or more"),
    ],
)
def test_bad_settings_are_value_errors(folders: dict[str, Path], arguments: dict[str, Any], message: str) -> None:
    model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
    before = model.predict(PAIRS)
    with pytest.raises(ValueError, match=message):
        model.fit(**{"train_dataloader": [examples()], **QUIET, **arguments})
    np.testing.assert_array_equal(model.predict(PAIRS), before)


# Optimizers and precision


def test_torch_s_adamw_becomes_ours_on_16_bit_weights_and_says_so(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    ends = []
    for optimizer in ({}, {"optimizer_class": torch.optim.AdamW}, {"optimizer_class": AdamW}):
        caplog.clear()
        torch.manual_seed(0)
        model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
        model.fit([examples()] * 3, **FAST, **QUIET, **optimizer)
        ends.append(model.predict(PAIRS))
        said = "halfrank.AdamW is used instead" in caplog.text
        assert said == (optimizer.get("optimizer_class") is torch.optim.AdamW)
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_speed_flags_of_torch_s_adamw_are_ignored_and_said(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
    params = {"lr": 1e-3, "fused": True}
    model.fit([examples()], optimizer_class=torch.optim.AdamW, optimizer_params=params, **QUIET)
    assert "fused are ignored" in caplog.text


def test_amp_trains_float32_weights_in_the_mixed_scheme_and_returns(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = CrossEncoder(str(folders["bert"]))
    before = model._scorer.precision
    schemes: list[str] = []

    def look(judged: CrossEncoder, **_: Any) -> float:
        schemes.append(judged._scorer.precision.scheme)
        return 1.0

    model.fit([examples()], look, use_amp=True, **QUIET)
    assert schemes == ["mixed-float16"]
    assert model._scorer.precision == before
    assert "use_amp=True: mixed-float16 weights" in caplog.text
    with pytest.raises(RuntimeError, match="of the evaluator"):
        model.fit([examples()], use_amp=True, evaluator=broken, **QUIET)
    assert model._scorer.precision == before
    narrow = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "bfloat16"})
    narrow.fit([examples()], use_amp=True, **QUIET)
    assert "changes nothing: the weights are bfloat16 already" in caplog.text


def broken(model: Any, **_: Any) -> float:
    raise RuntimeError("of the evaluator")


def test_frozen_parameters_stay(folders: dict[str, Path]) -> None:
    for optimizer in (AdamW, torch.optim.AdamW):
        model = CrossEncoder(str(folders["bert"]))
        model.model.bert.embeddings.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        model.fit([examples()] * 2, optimizer_class=optimizer, **FAST, **QUIET)
        moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert moved
        assert not any("embeddings" in name for name in moved)


def test_a_second_fit_goes_on(folders: dict[str, Path]) -> None:
    model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "bfloat16"}, config_kwargs=DRY)
    exact = CrossEncoder(str(folders["bert"]), config_kwargs=DRY)
    start = exact.predict(PAIRS)
    for _ in range(2):
        for one in (model, exact):
            one.fit([examples()] * 4, **FAST, **QUIET)
    moved = np.linalg.norm(exact.predict(PAIRS) - start)
    assert np.linalg.norm(model.predict(PAIRS) - exact.predict(PAIRS)) < 0.1 * moved


# Evaluators, callback, folder


EVALUATORS: dict[str, Callable[[], Any]] = {
    "correlation": lambda: evaluation.CrossEncoderCorrelationEvaluator(JUDGED, SIMILARITY, name="dev"),
    "classification": lambda: evaluation.CrossEncoderClassificationEvaluator(JUDGED, BINARY),
    "reranking": lambda: evaluation.CrossEncoderRerankingEvaluator(
        [{"query": SENTENCES[0], "positive": SENTENCES[1:3], "negative": SENTENCES[3:]}]
    ),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_evaluators_of_the_peer_judge_both_alike(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    ours, theirs = (kind(str(folders["bert"])) for kind in (CrossEncoder, peer.CrossEncoder))
    results = [model.evaluate(EVALUATORS[name](), str(tmp_path / str(n))) for n, model in enumerate((ours, theirs))]
    assert results[0].keys() == results[1].keys()
    for key, value in results[1].items():
        assert results[0][key] == pytest.approx(value, abs=1e-5), key
    assert list((tmp_path / "0").iterdir())
    assert ours.model_card_data.evaluations[0]["metrics"] == results[0]


def test_an_evaluator_for_several_labels(folders: dict[str, Path]) -> None:
    results = [
        kind(str(folders["three"])).evaluate(evaluation.CrossEncoderClassificationEvaluator(JUDGED, CLASSES))
        for kind in (CrossEncoder, peer.CrossEncoder)
    ]
    assert results[0] == pytest.approx(results[1])


class Scripted(BaseEvaluator):
    """Returns given scores in turn and notes how it was called."""

    def __init__(self, scores: list[float], greater_is_better: bool = True) -> None:
        super().__init__()
        self.scores, self.greater_is_better = scores, greater_is_better
        self.primary_metric = "judged"
        self.calls: list[tuple[Any, float, int]] = []
        self.seen: list[np.ndarray] = []

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        self.calls.append((output_path, epoch, steps))
        self.seen.append(np.asarray(model.predict(PAIRS)))
        return {"judged": self.scores[len(self.calls) - 1], "other": 0.0}


def test_evaluator_and_callback_are_called_as_the_peer_calls_them(folders: dict[str, Path], tmp_path: Path) -> None:
    calls = []
    for face, kind in ((CrossEncoder, InputExample), (peer.CrossEncoder, peer.InputExample)):
        heard: list[tuple[float, float, int]] = []
        judge = Scripted([0.1, 0.3, 0.2, 0.4])
        with fresh_folder():
            face(str(folders["bert"])).fit(
                DataLoader(examples(kind), batch_size=4), judge, epochs=2, output_path=str(tmp_path),
                callback=lambda score, epoch, steps, heard=heard: heard.append((score, epoch, steps)), **QUIET,
            )  # fmt: skip
        calls.append((judge.calls, heard))
    assert calls[0][0] == calls[1][0]
    assert calls[0][1] == [(0.1, 1.0, 4), (0.3, 2.0, 8)]  # 6.2 calls it with evaluation_steps only


@pytest.mark.parametrize(("higher", "best"), [(True, 1), (False, 2)])
def test_the_best_model_is_saved_and_the_last_stays_in_memory(
    folders: dict[str, Path], tmp_path: Path, higher: bool, best: int
) -> None:
    judge = Scripted([0.2, 0.5, 0.1, 0.3], greater_is_better=higher)
    model = CrossEncoder(str(folders["bert"]))
    model.fit([examples()] * 4, judge, evaluation_steps=1, output_path=tmp_path / "out", **FAST, **QUIET)
    assert [steps for _, _, steps in judge.calls] == [1, 2, 3, 4]
    assert [epoch for _, epoch, _ in judge.calls] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(CrossEncoder(tmp_path / "out").predict(PAIRS), judge.seen[best], atol=1e-6)
    np.testing.assert_array_equal(model.predict(PAIRS), judge.seen[-1])
    assert not model.training


@pytest.mark.parametrize("evaluator", [None, Scripted([0.2, 0.5])])
def test_without_a_best_one_the_last_model_is_saved(folders: dict[str, Path], tmp_path: Path, evaluator: Any) -> None:
    model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
    model.fit([examples()] * 2, evaluator, output_path=str(tmp_path), save_best_model=False, **FAST, **QUIET)
    assert peer.CrossEncoder(str(tmp_path)).dtype is torch.float16
    np.testing.assert_allclose(CrossEncoder(str(tmp_path)).predict(PAIRS), model.predict(PAIRS), atol=2e-3)


def test_an_evaluator_may_return_a_number_and_must_name_its_metric(folders: dict[str, Path]) -> None:
    heard: list[float] = []
    model = CrossEncoder(str(folders["bert"]))
    model.fit([examples()], lambda m, **_: 0.5, callback=lambda score, *_: heard.append(score), **QUIET)
    model.fit([examples()], lambda m, **_: {"only": 0.25}, callback=lambda score, *_: heard.append(score), **QUIET)
    assert heard == [0.5, 0.25]
    with pytest.raises(ValueError, match="The evaluator returned a, b"):
        model.fit([examples()], lambda m, **_: {"a": 1.0, "b": 2.0}, **QUIET)


def test_ctrl_c_stops_between_two_steps_and_keeps_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    steps: list[int] = []

    def press(score: float, epoch: float, step: int) -> None:
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    model = CrossEncoder(str(folders["bert"]), model_kwargs={"dtype": "float16"})
    with pytest.raises(KeyboardInterrupt, match="between two steps; a model is in"):
        model.fit(
            [examples()] * 5, lambda m, **_: 1.0, evaluation_steps=1, callback=press, output_path=tmp_path,
            save_best_model=False, **FAST, **QUIET,
        )  # fmt: skip
    assert steps == [1, 2]
    np.testing.assert_allclose(CrossEncoder(tmp_path).predict(PAIRS), model.predict(PAIRS), atol=2e-3)
    assert np.isfinite(model.predict(PAIRS)).all()


def test_the_progress_line_is_shown_unless_turned_off(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = CrossEncoder(str(folders["bert"]))
    capsys.readouterr()
    model.fit([examples()], show_progress_bar=False)
    assert capsys.readouterr().err == ""
    model.fit([examples()])
    assert "loss" in capsys.readouterr().err
