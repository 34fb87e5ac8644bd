"""The public face against sentence-transformers itself: constructor, attributes, predict and rank."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers as peer
import torch
from torch import Tensor, nn

from halfrank.cross_encoder import CrossEncoder
from halfrank.errors import DataError, ModelError, NonFiniteScoreError, NonFiniteWeightError
from halfrank.numerics.rounding import join
from tiny import PAIRS, SENTENCES, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch)")
NARROW = [torch.float16, torch.bfloat16]
TOLERANCE = 2e-6  # float32 scores: other order of sums, nothing else


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "three", num_labels=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def both(one: Path, three: Path) -> dict[int, tuple[CrossEncoder, Any]]:
    return {labels: (CrossEncoder(str(path)), peer.CrossEncoder(str(path))) for labels, path in ((1, one), (3, three))}


INPUTS: dict[str, Callable[[], Any]] = {
    "list of tuples": lambda: PAIRS,
    "list of lists": lambda: [list(pair) for pair in PAIRS],
    "tuple of tuples": lambda: tuple(PAIRS),
    "2-d array": lambda: np.array(PAIRS),
    "2-d object array": lambda: np.array(PAIRS, dtype=object),
    "one pair in a list": lambda: [PAIRS[0]],
    "pair as tuple": lambda: PAIRS[0],
    "pair as list": lambda: list(PAIRS[0]),
    "pair as 1-d array": lambda: np.array(PAIRS[0]),
    "empty texts": lambda: [("", ""), ("a", "")],
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "numpy": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "softmax": {"apply_softmax": True},
    "tanh": {"activation_fn": nn.Tanh()},
    "batches of three": {"batch_size": 3},
    "prompt": {"prompt": "what is "},
    "no bar": {"show_progress_bar": False},
}


def assert_alike(ours: Any, theirs: Any) -> None:
    """Same type, dtype and shape all the way down, and the same numbers."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
        return
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", INPUTS)
def test_predict_returns_what_the_peer_returns(both: dict[int, Any], labels: int, form: str, output: str) -> None:
    ours, theirs = both[labels]
    assert_alike(ours.predict(INPUTS[form](), **OUTPUTS[output]), theirs.predict(INPUTS[form](), **OUTPUTS[output]))


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}])
def test_no_pairs_give_an_empty_result_of_the_peer_s_type(both: dict[int, Any], labels: int, options: Any) -> None:
    ours, theirs = (model.predict([], **options) for model in both[labels])
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs) == 0
    if not isinstance(ours, list):
        assert tuple(ours.shape) == tuple(theirs.shape) == (0,)
        assert str(ours.dtype).endswith("float32")  # the peer's empty array is float64, ours joins others unchanged
    assert len(both[labels][0].predict(np.array([]))) == 0


def test_predict_takes_a_column_of_a_dataset(both: dict[int, Any]) -> None:
    from datasets import Dataset

    column = Dataset.from_dict({"pair": [list(pair) for pair in PAIRS[:4]]})["pair"]
    assert_alike(both[1][0].predict(column), both[1][1].predict(column))


def test_predict_takes_older_names_and_positions(both: dict[int, Any], caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = both[1]
    plain = ours.predict(PAIRS)
    # 6.2 takes the number for a prompt's name.
    np.testing.assert_allclose(ours.predict(PAIRS, 8), plain, atol=TOLERANCE)
    np.testing.assert_allclose(ours.predict(PAIRS, 8, False), plain, atol=TOLERANCE)
    np.testing.assert_array_equal(ours.predict(sentences=PAIRS), plain)
    logits = ours.predict(PAIRS, activation_fct=nn.Identity())
    assert not caplog.records
    assert_alike(logits, theirs.predict(PAIRS, activation_fct=nn.Identity()))
    np.testing.assert_array_equal(ours.predict(PAIRS, num_workers=2), plain)
    assert "num_workers is ignored" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("abc", "got str"),
        (None, "predict needs pairs"),
        (["a", "b", "c"], "The pair must be two texts; got 3"),
        ([("a", "b"), ("a", "b", "c")], r"pair 1 \(counted from 0\) must be two texts; got 3"),
        ([("a",)], r"pair 0 \(counted from 0\) must be two texts; got 1"),
        ([("a", None)], r"pair 0 \(counted from 0\) must be two texts; got NoneType None"),
        ([("a", "b"), "ab"], r"pair 1 \(counted from 0\) must be two texts; got str 'ab'"),
        ([("a", 3.5)], "got float 3.5"),
    ],
)
def test_what_is_no_pair_is_named(both: dict[int, Any], inputs: Any, message: str) -> None:
    with pytest.raises((DataError, TypeError), match=message):
        both[1][0].predict(inputs)


@pytest.mark.parametrize("method", ["predict", "rank", "fit", "save", "to_nowhere"])
def test_a_misspelt_argument_is_a_type_error(both: dict[int, Any], one: Path, method: str) -> None:
    model = both[1][0]
    calls: dict[str, Callable[[], Any]] = {
        "predict": lambda: model.predict(PAIRS, bacth_size=1),
        "rank": lambda: model.rank("a", ["b"], topk=1),
        "fit": lambda: model.fit([], warmup=1),
        "save": lambda: model.save("nowhere", safe=True),
        "to_nowhere": lambda: CrossEncoder(str(one), model_kwarg={}),
    }
    with pytest.raises(TypeError, match="unexpected keyword"):
        calls[method]()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"return_documents": True}, {"prompt": "what "}, {"top_k": 99}])
def test_rank_returns_what_the_peer_returns(both: dict[int, Any], options: dict[str, Any]) -> None:
    ours, theirs = (model.rank(SENTENCES[0], SENTENCES[1:], **options) for model in both[1])
    assert [entry["corpus_id"] for entry in ours] == [entry["corpus_id"] for entry in theirs]
    assert [entry.get("text") for entry in ours] == [entry.get("text") for entry in theirs]
    np.testing.assert_allclose([e["score"] for e in ours], [e["score"] for e in theirs], atol=TOLERANCE, rtol=0)
    assert all(type(entry["score"]) is float and type(entry["corpus_id"]) is int for entry in ours)
    json.dumps(ours)
    assert both[1][0].rank("x", []) == []


def test_rank_keeps_the_order_of_equal_scores_and_ignores_what_it_always_did(
    both: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ranked = both[1][0].rank("x", ["One."] * 4, batch_size=2, convert_to_tensor=True, apply_softmax=True, num_workers=1)
    assert [entry["corpus_id"] for entry in ranked] == [0, 1, 2, 3]
    assert caplog.text.count("is ignored") == 3


def test_rank_refuses_a_count_below_zero(both: dict[int, Any]) -> None:
    with pytest.raises(ValueError, match="top_k is how many documents are wanted, or None for all; got -1"):
        both[1][0].rank("a", ["b", "c"], top_k=-1)


def test_rank_refuses_several_labels_as_the_peer_does(both: dict[int, Any]) -> None:
    for model in both[3]:
        with pytest.raises(ValueError, match="label"):
            model.rank("a", ["b"])
    with pytest.raises(DataError, match="list of documents; got str"):
        both[1][0].rank("a", "b")


@pytest.mark.parametrize("bad", [0, -3])
def test_batch_size_must_be_positive(both: dict[int, Any], bad: int) -> None:
    for model in both[1]:
        with pytest.raises(ValueError, match="batch_size"):
            model.predict(PAIRS, batch_size=bad)


METHODS = ["__init__", "predict", "rank", "fit", "evaluate", "save", "save_pretrained", "push_to_hub", "save_to_hub"]
METHODS += ["start_multi_process_pool", "stop_multi_process_pool"]


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_of_the_peer_is_known(method: str) -> None:
    theirs = inspect.signature(inspect.unwrap(getattr(peer.CrossEncoder, method))).parameters
    ours = inspect.signature(getattr(CrossEncoder, method)).parameters
    wanted = {key for key, value in theirs.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
    assert wanted <= ours.keys()
    assert not any(value.kind is inspect.Parameter.VAR_KEYWORD for value in ours.values())


ATTRIBUTES = ["max_length", "max_seq_length", "num_labels", "device", "dtype", "prompts", "default_prompt_name"]


@pytest.mark.parametrize("labels", [1, 3])
def test_attributes_are_the_peer_s(both: dict[int, Any], labels: int) -> None:
    ours, theirs = both[labels]
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("activation_fn", "default_activation_function", "config", "model"):
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert ours.tokenizer("a b") == theirs.tokenizer("a b")


def test_parameters_are_those_of_the_transformers_model(both: dict[int, Any]) -> None:
    ours, theirs = both[1]
    names = [name.removeprefix("0.model.") for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert list(ours.state_dict()) == [name.removeprefix("0.model.") for name in theirs.state_dict()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_users_own_padded_call_stays_right(both: dict[int, Any]) -> None:
    ours, theirs = both[1]
    batch = ours.tokenizer(*zip(*PAIRS, strict=True), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours.model(**batch).logits, theirs.model(**batch).logits, atol=TOLERANCE, rtol=0)


SHORT = {"model_max_length": 32}
SPELLINGS: list[dict[str, Any]] = [
    {"model_name": "PATH", "automodel_args": {"torch_dtype": torch.float16}, "tokenizer_args": SHORT},
    {"model_name": "PATH", "automodel_args": {"torch_dtype": "float16"}, "tokenizer_kwargs": SHORT},
    {"model_name_or_path": "PATH", "model_kwargs": {"dtype": "float16"}, "max_length": 32},
    {"model_name_or_path": "PATH", "model_kwargs": {"dtype": torch.float16}, "processor_kwargs": SHORT},
]


@pytest.mark.parametrize("arguments", SPELLINGS)
def test_old_and_new_spellings_load_the_same(one: Path, arguments: dict[str, Any]) -> None:
    def given() -> dict[str, Any]:
        copies = {key: dict(value) if isinstance(value, dict) else value for key, value in arguments.items()}
        return {key: str(one) if value == "PATH" else value for key, value in copies.items()}

    ours, theirs = CrossEncoder(**given()), peer.CrossEncoder(**given())
    assert ours.dtype == theirs.dtype == torch.float16
    assert ours.max_length == theirs.max_length == 32
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS), atol=2e-3)


def test_positions_of_older_scripts(one: Path) -> None:
    ours, theirs = CrossEncoder(str(one), 1, 48), peer.CrossEncoder(str(one), 1, 48)
    assert ours.max_length == theirs.max_length == 48
    assert CrossEncoder(str(one), 1, 48, "cpu").device == torch.device("cpu")
    assert type(CrossEncoder(str(one), 1, 48, nn.Tanh(), "cpu").activation_fn) is nn.Tanh


def test_more_tokens_than_positions_are_cut_to_the_positions_and_said(
    one: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = CrossEncoder(str(one), 1, 256)
    assert model.max_length == 96
    assert "256 is more than the model's 96 positions" in caplog.text
    assert np.isfinite(model.predict((SENTENCES[1] * 20, SENTENCES[1] * 20)))  # the peer fails here


def test_arguments_reach_the_configuration(one: Path, caplog: pytest.LogCaptureFixture) -> None:
    for key in ("classifier_dropout", "config_kwargs", "config_args"):
        value: Any = 0.25 if key == "classifier_dropout" else {"classifier_dropout": 0.25}
        for kind in (CrossEncoder, peer.CrossEncoder):
            assert kind(str(one), **{key: value}).config.classifier_dropout == 0.25
    caplog.clear()
    model = CrossEncoder(str(one), config_kwargs={"num_labels": 1, "no_such_setting": 1})
    assert "no_such_setting is ignored" in caplog.text
    assert model.num_labels == 1


@pytest.mark.parametrize("key", ["activation_fn", "default_activation_function"])
def test_the_activation_can_be_given_and_set(one: Path, key: str) -> None:
    ours, theirs = (kind(str(one), **{key: nn.Identity()}) for kind in (CrossEncoder, peer.CrossEncoder))
    assert_alike(ours.predict(PAIRS), theirs.predict(PAIRS))
    ours.activation_fn = theirs.activation_fn = nn.Tanh()
    assert_alike(ours.predict(PAIRS), theirs.predict(PAIRS))
    with pytest.raises(TypeError, match="callable"):
        ours.activation_fn = "tanh"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "onnx"}, "holds no 'onnx/model.onnx'"),
        ({"modules": []}, "modules is not supported"),
        ({"keep_in_fp32_modules": ["nowhere"]}, "An island is the name"),
        ({"model_kwargs": {"dtype": "int8"}}, "float32, float16 or bfloat16"),
        ({"model_kwargs": {"dtype": "float8"}}, "float32, float16 or bfloat16"),
        ({"model_kwargs": {"load_in_8bit": True}}, "load_in_8bit"),
        ({"model_kwargs": {"device_map": "auto"}}, "one device"),
        ({"default_prompt_name": "query"}, "not among prompts"),
        ({"compute": "int8"}, "compute must be auto or one of"),
        ({"max_length": 2}, "at least 4"),
    ],
)
def test_what_is_not_supported_is_a_value_error(one: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEncoder(str(one), **arguments)


def test_two_names_of_one_argument_are_refused(one: Path) -> None:
    with pytest.raises(TypeError, match="two names of one argument: give model_kwargs only"):
        CrossEncoder(str(one), model_kwargs={"dtype": "float16"}, automodel_args={"torch_dtype": "float32"})
    with pytest.raises(TypeError, match="a folder or a hub id"):
        CrossEncoder()
    with pytest.raises(ModelError, match="no model folder"):
        CrossEncoder("/no/such/folder")


@pytest.mark.parametrize("dtype", [*NARROW, "auto"])
def test_dtypes_load_as_the_peer_s_do(one: Path, dtype: Any) -> None:
    ours, theirs = (kind(str(one), model_kwargs={"torch_dtype": dtype}) for kind in (CrossEncoder, peer.CrossEncoder))
    assert ours.dtype == theirs.dtype
    scores = ours.predict(PAIRS)
    assert scores.dtype == np.float32
    # 16-bit weights, float32 products: about as far from float32 as products in 16 bits are, whose errors may cancel.
    exact = peer.CrossEncoder(str(one)).predict(PAIRS)
    assert abs(scores - exact).max() <= 2 * max(abs(theirs.predict(PAIRS) - exact).max(), TOLERANCE)


def test_prompts_are_the_peer_s(one: Path, tmp_path: Path) -> None:
    ours, theirs = (
        kind(str(one), prompts={"q": "what is ", "none": None}, default_prompt_name="q")
        for kind in (CrossEncoder, peer.CrossEncoder)
    )
    assert ours.prompts == theirs.prompts
    for options in ({}, {"prompt_name": "none"}, {"prompt": "I am "}, {"prompt": "I am ", "prompt_name": "q"}):
        assert_alike(ours.predict(PAIRS, **options), theirs.predict(PAIRS, **options))
    assert_alike(ours.predict(PAIRS, "none"), theirs.predict(PAIRS, "none"))  # 6.2's second place
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="nowhere"):
            model.predict(PAIRS, prompt_name="nowhere")
    ours.save(tmp_path / "ours")
    theirs.save(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        for kind in (CrossEncoder, peer.CrossEncoder):
            again = kind(str(tmp_path / folder))
            assert (again.prompts, again.default_prompt_name) == (ours.prompts, "q")
            np.testing.assert_allclose(again.predict(PAIRS), ours.predict(PAIRS), atol=TOLERANCE)


def test_max_length_can_be_set_and_is_saved(one: Path, tmp_path: Path) -> None:
    ours, theirs = CrossEncoder(str(one)), peer.CrossEncoder(str(one))
    pair = (SENTENCES[1] * 2, SENTENCES[2] * 2)
    for name in ("max_length", "max_seq_length"):
        for model in (ours, theirs):
            setattr(model, name, 16)
        assert ours.max_length == ours.max_seq_length == theirs.max_seq_length == 16
        assert_alike(ours.predict(pair), theirs.predict(pair))
        ours.max_length = None
        assert ours.max_length == 96
    ours.max_length = 24
    ours.save(tmp_path / "short")
    assert CrossEncoder(str(tmp_path / "short")).max_length == 24
    assert peer.CrossEncoder(str(tmp_path / "short")).max_seq_length == 24


@pytest.mark.parametrize(("method", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_dtype_methods(one: Path, method: str, dtype: torch.dtype) -> None:
    model, exact = CrossEncoder(str(one)), CrossEncoder(str(one)).predict(PAIRS)
    assert getattr(model, method)() is model
    assert model.dtype is dtype
    assert model.model.bert.encoder.layer[0].output.dense.weight.dtype is dtype
    assert model.model.bert.encoder.layer[0].output.LayerNorm.weight.dtype is torch.float32
    loaded = CrossEncoder(str(one), model_kwargs={"dtype": dtype})
    np.testing.assert_allclose(model.predict(PAIRS), loaded.predict(PAIRS), atol=2e-3)  # its head came in 16 bits
    assert model.float().dtype is torch.float32
    np.testing.assert_allclose(model.predict(PAIRS), exact, atol=5e-3)
    assert model.to("cpu", dtype).dtype is dtype
    assert model.to(device="cpu", dtype=torch.float32).cpu().device.type == "cpu"


def test_float_joins_what_training_kept(one: Path) -> None:
    model = CrossEncoder(str(one), model_kwargs={"dtype": torch.bfloat16})
    model.fit([_labelled()], epochs=3, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    name = "bert.encoder.layer.0.output.dense.weight"
    wanted = join(model.state_dict()[name].clone(), model._scorer.residuals[name])
    assert not torch.equal(wanted, model.state_dict()[name].float())
    assert torch.equal(model.float().state_dict()[name], wanted)


def test_half_refuses_weights_beyond_its_range(one: Path) -> None:
    model = CrossEncoder(str(one))
    with torch.no_grad():
        model.model.bert.encoder.layer[1].output.dense.weight[0, 0] = 1e5
    before = model.predict(PAIRS)
    with pytest.raises(NonFiniteWeightError, match=r"layer\.1\.output\.dense\.weight"):
        model.half()
    assert model.dtype is torch.float32
    np.testing.assert_array_equal(model.predict(PAIRS), before)


def test_train_and_eval_switch_dropout(one: Path) -> None:
    model = CrossEncoder(str(one))
    assert model.train() is model
    assert model.training
    before = model.predict(PAIRS)  # without dropout, and the mode comes back
    assert model.training
    np.testing.assert_array_equal(before, model.eval().predict(PAIRS))
    assert not model.training


def test_scores_that_overflow_are_scored_again_and_said(one: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = CrossEncoder(str(one), compute="emulated-float16")
    with torch.no_grad():
        model.model.bert.encoder.layer[0].intermediate.dense.weight.mul_(3e5)
    scores = model.predict(PAIRS)
    assert np.isfinite(scores).all()
    assert "were scored again in float32" in caplog.text
    with pytest.raises(NonFiniteScoreError, match="use another activation"):
        model.predict(PAIRS, activation_fn=lambda logits: logits / 0)


def test_tokens_added_later_count(one: Path) -> None:
    models = [kind(str(one), model_kwargs={"dtype": "float16"}) for kind in (CrossEncoder, peer.CrossEncoder)]
    before = models[0].predict([("[NEW] one", "two")])
    for model in models:
        model.tokenizer.add_tokens(["[NEW]"], special_tokens=True)
        torch.manual_seed(3)
        model.model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.model.get_input_embeddings().weight[-1].fill_(1.0)
    ours, theirs = (model.predict([("[NEW] one", "two")]) for model in models)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert abs(ours - before).max() > 4e-3


def test_a_llama_gets_a_head_and_a_pad_token(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = CrossEncoder(str(llama), num_labels=1, automodel_args={"torch_dtype": torch.float16})
    assert "no pad token" in caplog.text
    assert model.predict(PAIRS).shape == (24,)
    alone = np.array([model.predict(pair) for pair in PAIRS])
    np.testing.assert_allclose(model.predict(PAIRS), alone, atol=TOLERANCE)


def test_a_pool_of_processes_gives_the_same_scores(one: Path) -> None:
    model = CrossEncoder(str(one), model_kwargs={"dtype": "bfloat16"}, compute="emulated-float16")
    alone = model.predict(PAIRS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        assert pool.keys() == {"input", "output", "processes"}
        np.testing.assert_allclose(model.predict(PAIRS, pool=pool, chunk_size=5), alone, atol=TOLERANCE)
        assert_alike(
            model.predict(PAIRS[:7], pool=pool, convert_to_tensor=True, activation_fn=nn.Tanh()),
            model.predict(PAIRS[:7], convert_to_tensor=True, activation_fn=nn.Tanh()),
        )
        ranked = model.rank(SENTENCES[0], SENTENCES[1:], pool=pool)
        assert [entry["corpus_id"] for entry in ranked] == [
            entry["corpus_id"] for entry in model.rank(SENTENCES[0], SENTENCES[1:])
        ]
        assert model.predict([], pool=pool).shape == (0,)
        with pytest.raises(ValueError, match="must pickle"):
            model.predict(PAIRS, pool=pool, activation_fn=lambda logits: logits)
        with pytest.raises(NonFiniteScoreError):
            model.predict(PAIRS, pool=pool, activation_fn=Poison())
        np.testing.assert_allclose(model.predict(PAIRS, pool=pool), alone, atol=TOLERANCE)
    finally:
        model.stop_multi_process_pool(pool)


class Poison(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits * float("nan")


def test_progress_shows_on_request_only(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = CrossEncoder(str(one))
    model.predict(PAIRS)
    assert capsys.readouterr().err == ""
    model.predict(PAIRS, show_progress_bar=True)
    assert "scoring" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="halfrank")


def _labelled() -> list[peer.InputExample]:
    return [peer.InputExample(texts=list(pair), label=number % 2) for number, pair in enumerate(PAIRS[:8])]
