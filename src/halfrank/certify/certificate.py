"""The certificate: what was compared, what came out, whether it passed; written into the folder that it speaks of."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import halfrank
from halfrank.errors import ModelError

NAME = "precision_certificate.json"
HASHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "onnx/*.onnx*",
    "openvino/*.xml",
    "openvino/*.bin",
)
BEGIN, END = "<!-- halfrank certificate -->", "<!-- end of halfrank certificate -->"


CAUSES = (
    "unreadable", "non-finite-weights", "weights-missing", "weights-differ", "row-order", "mantissa", "architecture",
    "labels", "activation", "tokenizer", "pad-token", "max-length", "islands", "overflow", "non-finite-scores",
    "score-error", "rank-changes", "new-ties", "headroom", "invariance",
)  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """Why a copy is refused: a cause out of a closed list, the module or file, and what to do."""

    cause: str
    where: str
    text: str

    def __post_init__(self) -> None:
        assert self.cause in CAUSES, self.cause

    def __str__(self) -> str:
        return f"{self.cause} ({self.where}): {self.text}"


@dataclass(frozen=True)
class Measured:
    """What a copy does in one compute format."""

    compute: str
    values: Mapping[str, float | int | None]  # the fields of an Agreement
    headroom_bits: float | None  # None where modules cannot be watched, in a graph
    headroom_module: str
    beyond: tuple[str, ...]  # modules that leave the range of the compute format
    seconds: float

    def summary(self) -> str:
        """One line for people."""
        values = self.values
        parts = [
            f"score error {_shown(values['max_score_error'])}, mean {_shown(values['mean_score_error'])}",
            f"tau {_shown(values['kendall_tau'])}",
            f"top-10 overlap {_shown(values['top10_overlap'])}",
            f"new ties {values['new_ties']}",
        ]
        if self.headroom_bits is not None:
            parts.append(f"headroom {self.headroom_bits:.1f} bits at '{self.headroom_module}'")
        if values["ndcg_loss"] is not None:
            parts.insert(3, f"nDCG@10 {_shown(values['ndcg_copy'])} for {_shown(values['ndcg_reference'])}")
        return f"{self.compute}: " + ", ".join(parts)


@dataclass(frozen=True)
class Certificate:
    """A narrow model beside its float32 reference; `passed` iff there is no reason against it."""

    model: Mapping[str, Any]  # name, storage, islands, sha256 by file
    reference: Mapping[str, Any]
    data: Mapping[str, Any]  # name, sha256, pairs, queries
    measured: tuple[Measured, ...]
    invariance: Mapping[str, float | None]
    budget: Mapping[str, Any]
    reasons: tuple[Reason, ...]
    created: str = field(default_factory=lambda: date.today().isoformat())

    @property
    def passed(self) -> bool:
        return not self.reasons

    def of_folder(self, folder: Path, name: str | None = None) -> Certificate:
        """The same for what stands in `folder` now."""
        return replace(self, model={**self.model, "name": name or folder.absolute().name, "sha256": hashes(folder)})

    def line(self) -> str:
        """One line for people."""
        worst = max((_number(m.values["max_score_error"]) for m in self.measured), default=0.0)
        formats = ", ".join(m.compute for m in self.measured)
        verdict = "passed" if self.passed else f"REFUSED ({', '.join(dict.fromkeys(r.cause for r in self.reasons))})"
        pairs = f"{self.data.get('pairs', 0)} pairs of {self.data.get('name', 'unknown data')}"
        return (
            f"certificate of {self.created}: {self.model['storage']} copy {verdict}, score error up to {worst:.2g} on "
            f"{pairs}, computed in {formats or 'nothing'}"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are written as strings, which JSON can hold."""
        content = {"halfrank": halfrank.__version__, "passed": self.passed, **asdict(self)}
        return _plain(content)

    def write(self, folder: Path, *, card: Path | None = None) -> None:
        """Write the certificate into a folder, and its section into the model card, which may still lie elsewhere."""
        (folder / NAME).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        card = card or folder / "README.md"
        if card.exists():
            text = card.read_text(encoding="utf-8")
            head, begun, rest = text.partition(BEGIN)
            tail = rest.partition(END)[2] if begun else ""
            joined = f"{head.rstrip()}\n\n{self.section()}\n{tail.lstrip()}"
            (folder / "README.md").write_text(joined, encoding="utf-8")

    def section(self) -> str:
        """The certificate as a section of a model card."""
        rows = [
            f"| {m.compute} | {_shown(m.values['max_score_error'])} | {_shown(m.values['mean_score_error'])} | "
            f"{_shown(m.values['kendall_tau'])} | {_shown(m.values['top10_overlap'])} | {m.values['new_ties']} | "
            f"{_shown(m.headroom_bits)}{f' ({m.headroom_module})' if m.headroom_module else ''} |"
            for m in self.measured
        ]
        islands = ", ".join(f"`{name}`" for name in self.model.get("islands", ())) or "none"
        reasons = [f"- {reason}" for reason in self.reasons]
        return "\n".join(
            [
                BEGIN,
                "## Precision",
                "",
                f"Weights in {self.model['storage']}, compared with {self.reference['name']} "
                f"({self.reference['storage']}) on {self.data['pairs']} pairs of {self.data['name']}: "
                f"{'passed' if self.passed else 'refused'}. Modules that compute in float32: {islands}.",
                "",
                "| computed in | score error | mean error | Kendall tau | top-10 overlap | new ties | headroom, bits |",
                "|---|---|---|---|---|---|---|",
                *rows,
                *(["", *reasons] if reasons else []),
                END,
            ]
        )


def read(folder: Path) -> Certificate | None:
    """The certificate of a folder, None where there is none; raises ModelError for one that cannot be read."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Certificate(
            content["model"],
            content["reference"],
            content["data"],
            tuple(Measured(**{**m, "beyond": tuple(m["beyond"])}) for m in content["measured"]),
            content["invariance"],
            content["budget"],
            tuple(Reason(**reason) for reason in content["reasons"]),
            content["created"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{path}' is not a certificate that this version reads ({type(error).__name__}: {error}). Certify again."
        ) from error


def hashes(folder: Path) -> dict[str, str]:
    """Sha256 by file name of all that decides a folder's scores: weights, configuration, tokenizer."""
    names = sorted({path for pattern in HASHED for path in folder.glob(pattern)})
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in names}


def file_hash(path: Path) -> str:
    """Sha256 of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


def texts_hash(texts: Iterable[tuple[str, str]]) -> str:
    """Sha256 of pairs of texts."""
    found = hashlib.sha256()
    for query, document in texts:
        found.update(json.dumps([query, document]).encode())
    return found.hexdigest()


def changes(folder: Path, certificate: Certificate) -> list[str]:
    """What has changed in a folder since it was certified, in words; empty if nothing has."""
    then, now = dict(certificate.model["sha256"]), hashes(folder)
    said = [f"{name} is gone" for name in then if name not in now]
    said += [f"{name} is new" for name in now if name not in then]
    return said + [f"{name} has changed" for name in then if name in now and then[name] != now[name]]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: Any) -> float:
    return float(value) if value is not None else 0.0


def _shown(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"
