"""Models go to a hub and come from one: the real client against a server on the loopback."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentence_transformers as peer
import torch
from safetensors.torch import load as load_tensors
from torch import nn

from halfrank import CrossEncoder
from halfrank.errors import HubError, ModelError
from hub import Hub, point_at, serving
from tiny import PAIRS, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(sentence_transformers|transformers|torch|huggingface_hub)")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("bert", tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as found:
        point_at(found.address, monkeypatch, tmp_path / "cache")
        yield found


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_at(address, monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # the client tries again for 20 s


# There


def test_a_model_goes_to_the_hub_and_comes_back(one: Path, hub: Hub) -> None:
    model = CrossEncoder(one, activation_fn=nn.Tanh(), prompts={"q": "what "}, model_kwargs={"dtype": "bfloat16"})
    place = model.push_to_hub("me/model", token="hf_secret", private=True, commit_message="First")
    assert place == f"{hub.address}/me/model/commit/{'1' * 40}"
    assert hub.commits == [
        {"created": "me/model", "private": True}, {"repo": "me/model", "branch": "main", "summary": "First"}
    ]  # fmt: skip
    assert "Bearer hf_secret" in hub.tokens
    files = hub.files("me/model")
    assert {"model.safetensors", "config.json", "modules.json", "tokenizer.json", "README.md"} <= set(files)
    assert {tensor.dtype for tensor in load_tensors(files["model.safetensors"]).values()} == {torch.bfloat16}
    for kind in (CrossEncoder, peer.CrossEncoder):
        again = kind("me/model", token="hf_secret")
        assert (again.prompts, type(again.activation_fn), again.dtype) == ({"q": "what "}, nn.Tanh, torch.bfloat16)
        np.testing.assert_allclose(again.predict(PAIRS), model.predict(PAIRS), atol=1e-2)
    assert "# me/model" in files["README.md"].decode()
    assert huggingface_hub.ModelCard.load("me/model").data.pipeline_tag == "text-ranking"


def test_a_card_that_is_there_is_kept_or_replaced(one: Path, hub: Hub) -> None:
    model = CrossEncoder(one)
    hub.repositories["me/model"] = {"main": {"README.md": b"mine", "notes.txt": b"kept"}}
    model.push_to_hub("me/model", exist_ok=True)
    assert hub.files("me/model")["README.md"] == b"mine"
    assert "model.safetensors" in hub.files("me/model")
    model.push_to_hub("me/model", exist_ok=True, replace_model_card=True, train_datasets=["stsb"])
    assert b"Trained on: stsb." in hub.files("me/model")["README.md"]
    assert hub.files("me/model")["notes.txt"] == b"kept"


def test_a_revision_is_a_branch_of_its_own(one: Path, hub: Hub) -> None:
    model = CrossEncoder(one)
    model.push_to_hub("me/model")
    with torch.no_grad():
        model.model.classifier.bias.add_(1)
    model.push_to_hub("me/model", revision="try", exist_ok=True)
    assert set(hub.repositories["me/model"]) == {"main", "try"}
    plain, tried = (CrossEncoder("me/model", revision=revision).predict(PAIRS) for revision in (None, "try"))
    assert abs(tried - plain).min() > 0.1
    np.testing.assert_allclose(tried, model.predict(PAIRS), atol=1e-6)


def test_a_pull_request_touches_no_branch(one: Path, hub: Hub) -> None:
    model = CrossEncoder(one)
    hub.repositories["other/model"] = {"main": {"README.md": b"theirs"}}
    assert model.push_to_hub("other/model", create_pr=True).endswith("/other/model/discussions/1")
    assert hub.files("other/model") == {"README.md": b"theirs"}
    assert "model.safetensors" in hub.files("other/model", "refs/pr/1")
    with pytest.raises(ValueError, match="drop create_pr or revision='try'"):
        model.push_to_hub("other/model", create_pr=True, revision="try")


def test_a_folder_is_uploaded_as_it_lies(one: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("x")
    CrossEncoder(one).save_to_hub(repo_name="model", organization="team", local_model_path=str(tmp_path / "mine"))
    assert hub.files("team/model") == {"note.txt": b"x"}


# From there


def test_folders_of_every_age_come_from_the_hub_with_their_activation(one: Path, hub: Hub, tmp_path: Path) -> None:
    identity = "torch.nn.modules.linear.Identity"
    for name, entry in (
        ("old", {"sbert_ce_default_activation_function": identity}),
        ("middle", {"sentence_transformers": {"activation_fn": identity, "version": "5.0.0"}}),
    ):
        hub.add(f"me/{name}", one)
        files = hub.files(f"me/{name}")
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | entry).encode()
    peer.CrossEncoder(str(one), activation_fn=nn.Identity()).save(str(tmp_path / "new"))
    hub.add("me/new", tmp_path / "new")
    for name in ("old", "middle", "new"):
        assert type(CrossEncoder(f"me/{name}").activation_fn) is nn.Identity


def test_a_bare_name_is_looked_up_with_its_owner(one: Path, hub: Hub) -> None:
    hub.add("cross-encoder/tiny-reranker", one)
    for kind in (CrossEncoder, peer.CrossEncoder):
        assert kind("tiny-reranker").num_labels == 1


def test_what_was_loaded_once_loads_without_network(
    one: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/model", one)
    before = CrossEncoder("me/model", cache_folder=str(tmp_path / "own")).predict(PAIRS)
    hub.asked.clear()
    again = CrossEncoder("me/model", cache_folder=str(tmp_path / "own"), local_files_only=True)
    assert hub.asked == []
    np.testing.assert_array_equal(again.predict(PAIRS), before)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(CrossEncoder("me/model", cache_folder=str(tmp_path / "own")).predict(PAIRS), before)


# Refused


REFUSALS: list[tuple[str, int, str, str]] = [
    ("/api/repos/create", 401, "Invalid credentials in Authorization header",
     r"refused to create 'me/new' \(401: Invalid credentials.*`hf auth login`"),
    ("/api/repos/create", 500, "boom", r"refused to create 'me/new' \(500: boom\). Try again later."),
    ("/api/models/me/new/commit", 403, "Forbidden: pass a write token",
     r"refused to upload to 'me/new' \(403: Forbidden: pass a write token\). Give a token that may write there"),
    ("/api/models/me/new/preupload", 400, "too many files", r"upload to 'me/new' \(400: too many files\). Repair"),
    ("/me/new/resolve", 403, "no", r"refused to look into 'me/new' \(403: no\)"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "status", "said", "message"), REFUSALS)
def test_a_refusal_of_the_hub_is_one_sentence(
    one: Path, hub: Hub, path: str, status: int, said: str, message: str
) -> None:
    hub.failures[path] = (status, said)
    with pytest.raises(HubError, match=message) as caught:
        CrossEncoder(one).push_to_hub("me/new")
    assert "\n" not in str(caught.value)


def test_a_repository_that_is_there_is_not_written_unasked(one: Path, hub: Hub) -> None:
    hub.repositories["me/model"] = {"main": {}}
    with pytest.raises(HubError, match=r"409: You already created .* pass exist_ok=True"):
        CrossEncoder(one).push_to_hub("me/model")
    assert hub.files("me/model") == {}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("me/absent", {}, "Cannot load 'me/absent': me/absent is not a local folder and is not a valid model"),
        ("absent", {}, "Cannot load 'cross-encoder/absent'"),
        ("me/model", {"revision": "nowhere"}, "nowhere is not a valid git identifier"),
        ("me/empty", {}, "Cannot load 'me/empty'.*config.json"),
        ("me/pickled", {}, "'me/pickled' holds no model.safetensors, and halfrank never unpickles"),
        ("me/cut", {}, "weights in 'me/cut' are corrupt or truncated"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_sentence(
    one: Path, hub: Hub, name: str, arguments: dict[str, Any], message: str
) -> None:
    for repository in ("me/model", "me/pickled", "me/cut"):
        hub.add(repository, one)
    hub.repositories["me/empty"] = {"main": {"README.md": b""}}
    weights = hub.files("me/pickled").pop("model.safetensors")
    hub.files("me/pickled")["pytorch_model.bin"] = b"\x80\x02."
    hub.files("me/cut")["model.safetensors"] = weights[: len(weights) // 2]
    with pytest.raises(ModelError, match=message) as caught:
        CrossEncoder(name, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_without_network_both_ways_say_so(one: Path) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "couldn't connect to": lambda: CrossEncoder("me/model"),
        "Cannot create 'me/model': the hub cannot be reached": lambda: CrossEncoder(one).push_to_hub("me/model"),
    }
    for message, call in calls.items():
        with pytest.raises((ModelError, HubError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_offline_mode_is_named(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        CrossEncoder(one).push_to_hub("me/model")
