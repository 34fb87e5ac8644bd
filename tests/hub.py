"""A hub on the loopback: repositories in memory, spoken to by the real `huggingface_hub` over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers

Files = dict[str, bytes]


@dataclass
class Hub:
    """What the server knows and what it was asked; `failures` answer a path's beginning with a status and a message."""

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    address: str = ""

    def add(self, name: str, folder: Path, branch: str = "main") -> None:
        """Put a folder's files there."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(name, {})[branch] = files

    def files(self, name: str, branch: str = "main") -> Files:
        return self.repositories[name][branch]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def do_HEAD(self) -> None:
        self.answered()

    def do_GET(self) -> None:
        self.answered()

    def do_POST(self) -> None:
        self.answered()

    def answered(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, path.replace("%2F", "/")))
        self.hub.tokens.add(self.headers.get("Authorization"))
        failure = next((found for start, found in self.hub.failures.items() if path.startswith(start)), None)
        if failure is not None:
            self.reply(failure[0], {"error": failure[1]})
        elif path.startswith("/api/"):
            self.api(path.removeprefix("/api/").split("/"), body, "create_pr=1" in self.path)
        else:
            self.resolve(path)

    def api(self, parts: list[str], body: bytes, pull_request: bool) -> None:
        if parts == ["repos", "create"]:
            self.create(json.loads(body))
        elif parts == ["validate-yaml"]:
            self.reply(200, {"errors": [], "warnings": []})
        elif parts[0] != "models" or "/".join(parts[1:3]) not in self.hub.repositories:
            self.missing_repository()
        elif parts[3:4] == ["branch"]:
            branches = self.hub.repositories["/".join(parts[1:3])]
            branches.setdefault(parts[4], dict(branches["main"]))
            self.reply(200, {})
        elif parts[3:4] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self.reply(200, {"files": modes})
        elif parts[3:4] == ["commit"]:
            self.commit("/".join(parts[1:3]), parts[4], body, pull_request)
        elif parts[3:4] == ["discussions"]:
            self.discuss("/".join(parts[1:3]))
        elif parts[3:4] == ["tree"]:
            self.reply(404, {"error": "no such folder"}, "EntryNotFound")
        else:
            self.inform("/".join(parts[1:3]), "/".join(parts[4:]) if parts[3:4] == ["revision"] else "main")

    def inform(self, name: str, revision: str) -> None:
        branch = self.branch_of(name, revision)
        if branch is None:
            self.reply(404, {"error": "no such revision"}, "RevisionNotFound")
        else:
            self.reply(200, {"id": name, "sha": commit_of(branch), "siblings": []})

    def branch_of(self, name: str, revision: str) -> str | None:
        return next((one for one in self.hub.repositories[name] if revision in (one, commit_of(one))), None)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        self.hub.commits.append({"created": name, "private": asked.get("visibility") == "private"})
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, {"main": {}})
        said = {"error": "You already created this model repo"} if status == 409 else {}
        self.reply(status, {"url": f"{self.hub.address}/{name}", **said})

    def commit(self, name: str, branch: str, body: bytes, pull_request: bool) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        place = "refs/pr/1" if pull_request or branch == "refs" else branch
        self.hub.repositories[name].setdefault(place, dict(self.hub.files(name))).update(added)
        self.hub.commits.append({"repo": name, "branch": place, "summary": lines[0]["value"]["summary"]})
        answer = {"commitUrl": f"{self.hub.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
        pull = {"pullRequestUrl": f"{self.hub.address}/{name}/discussions/1"} if pull_request else {}
        self.reply(200, {**answer, **pull})

    def discuss(self, name: str) -> None:
        self.hub.repositories[name].setdefault("refs/pr/1", dict(self.hub.files(name)))
        facts = {"num": 1, "title": "t", "status": "draft", "createdAt": "2026-01-01T00:00:00.000Z", "events": []}
        place = {"repo": {"name": name, "type": "model"}, "isPullRequest": True}
        self.reply(200, {**facts, **place, "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []})

    def resolve(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file_name = rest.partition("/")
        if name not in self.hub.repositories:
            self.missing_repository()
            return
        branch = self.branch_of(name, revision)
        if branch is None:
            self.reply(404, {"error": "no such revision"}, "RevisionNotFound")
            return
        file = self.hub.files(name, branch).get(file_name)
        if file is None:
            self.reply(404, {"error": "no such file"}, "EntryNotFound", commit=commit_of(branch))
            return
        self.send(200, file, {"ETag": f'"{hashlib.sha1(file).hexdigest()}"', "X-Repo-Commit": commit_of(branch)})

    def missing_repository(self) -> None:
        self.reply(404, {"error": "Repository not found"}, "RepoNotFound")

    def reply(self, status: int, content: Any, code: str | None = None, commit: str | None = None) -> None:
        said = {"X-Error-Message": content["error"]} if "error" in content else {}
        said |= {"X-Error-Code": code} if code else {}
        said |= {"X-Repo-Commit": commit} if commit else {}
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **said})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit_of(branch: str) -> str:
    return hashlib.sha1(branch.encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A server of its own; its address is in the hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let `huggingface_hub` speak to `address`, with a cache of its own."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    # Clients that transformers and the peer keep for themselves.
    for client in (huggingface_hub.hf_api.api, transformers.utils.hub.hf_api()):
        monkeypatch.setattr(client, "endpoint", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
