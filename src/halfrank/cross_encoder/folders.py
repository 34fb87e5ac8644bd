"""Folders and repositories beyond weights: prompts, the card, upload."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from halfrank.certify import saving
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
    """A hub repository, made if absent."""

    def __init__(
        self, repo_id: str, *, token: str | None, private: bool | None, exist_ok: bool, revision: str | None
    ) -> None:
        self._hub = HfApi(token=token)
        self._revision = revision
        self.name: str = self._hub.create_repo(repo_id=repo_id, private=private, exist_ok=exist_ok).repo_id
        if revision is not None:
            self._hub.create_branch(repo_id=self.name, branch=revision, exist_ok=True)

    def has_card(self) -> bool:
        """True where a README is there already."""
        return self._hub.file_exists(self.name, "README.md", revision=self._revision)

    def upload(self, path: str, message: str, create_pr: bool) -> str:
        """Upload a folder; the address of the commit, or of the pull request if one was asked for."""
        done = self._hub.upload_folder(
            repo_id=self.name, folder_path=path, commit_message=message, revision=self._revision, create_pr=create_pr
        )
        return str(done.pr_url if create_pr else done.commit_url)
