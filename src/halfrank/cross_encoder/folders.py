"""Folders and repositories beyond weights: prompts, the card, upload."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from halfrank.certify import saving
from halfrank.errors import HubError
from halfrank.model import folder
from halfrank.model.folder import SETTINGS
from halfrank.model.scorer import Scorer


def write(
    scorer: Scorer, path: Path, *, dtype: torch.dtype | None, card: str | None, settings: Mapping[str, Any]
) -> None:
    """Write a certified model folder with `settings` in its sentence-transformers file; without a card an older one
    stays. Raises CertificateError for a 16-bit copy that is too far from the model, which is kept in float32 beside.
    """

    def writer(storage: torch.dtype) -> Callable[[Path], None]:
        write_model = folder.writer(scorer, dtype=storage, card=card)

        def fill(stage: Path) -> None:
            write_model(stage)
            if card is None:
                (stage / "README.md").unlink()
            content = json.loads((stage / SETTINGS).read_text(encoding="utf-8")) | dict(settings)
            (stage / SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

        return fill

    saving.save(scorer, path, dtype=dtype, writer=writer)


class Repository:
    """A hub repository, made if absent; raises HubError wherever the hub refuses or cannot be reached."""

    def __init__(
        self, repo_id: str, *, token: str | None, private: bool | None, exist_ok: bool, revision: str | None
    ) -> None:
        self._hub = HfApi(token=token)
        self._revision = revision
        with _told("create", repo_id):
            self.name: str = self._hub.create_repo(repo_id=repo_id, private=private, exist_ok=exist_ok).repo_id
        if revision is not None:
            with _told(f"create the branch {revision!r} of", self.name):
                self._hub.create_branch(repo_id=self.name, branch=revision, exist_ok=True)

    def has_card(self) -> bool:
        """True where a README is there already."""
        with _told("look into", self.name):
            return self._hub.file_exists(self.name, "README.md", revision=self._revision)

    def upload(self, path: str, message: str, create_pr: bool) -> str:
        """Upload a folder; the address of the commit, or of the pull request if one was asked for."""
        with _told("upload to", self.name):
            done = self._hub.upload_folder(
                repo_id=self.name,
                folder_path=path,
                commit_message=message,
                revision=self._revision,
                create_pr=create_pr,
            )
        return str(done.pr_url if create_pr else done.commit_url)


@contextmanager
def _told(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or error.response.reason_phrase).strip().splitlines()[0].rstrip(".")
        raise HubError(
            f"The hub refused to {what} '{name}' ({status}: {said}). {REMEDIES.get(status, 'Try again later.')}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"Cannot {what} '{name}': HF_HUB_OFFLINE is set, which forbids the network.") from error
    except (TRANSPORT, ConnectionError) as error:
        raise HubError(f"Cannot {what} '{name}': the hub cannot be reached ({error}). Is there a network?") from error


TRANSPORT: Any = HfHubHTTPError.__bases__[0]  # the HTTPError of whichever httpx the hub's client is built on
_LOG_IN = "Give a token that may write there: token=..., or `hf auth login`."
REMEDIES = {
    400: "Repair what it names.",
    401: _LOG_IN,
    403: _LOG_IN,
    404: f"Is the name right? {_LOG_IN}",
    409: "It is there already: pass exist_ok=True to add to it.",
}
