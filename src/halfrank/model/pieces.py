"""Safetensors files written and read a piece at a time: no second copy of a model, or of a tensor, is ever made."""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfrank.numerics.rounding import join

PIECE = 1 << 20  # elements
# In the order of the format's own writer, which puts the widest first.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Source:
    """A tensor as it will stand in a file: in `dtype`, joined with its residual where one is given."""

    tensor: Tensor
    dtype: torch.dtype
    residual: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel() * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """The elements in order, flat, converted."""
        parts = self.tensor.detach().reshape(-1).split(PIECE)
        kept = [None] * len(parts) if self.residual is None else self.residual.reshape(-1).split(PIECE)
        for part, codes in zip(parts, kept, strict=True):
            yield (part if codes is None else join(part, codes)).to(self.dtype)

    def whole(self) -> Tensor:
        """All of it at once; the tensor itself where nothing is converted."""
        tensor = self.tensor.detach()
        return (tensor if self.residual is None else join(tensor, self.residual.view_as(tensor))).to(self.dtype)


def write_file(path: Path, sources: Mapping[str, Source], *, metadata: Mapping[str, str] | None = None) -> int:
    """Write a safetensors file, the same bytes as the format's own writer, and give the CRC-32 of its tensors' bytes.

    Raises OSError where the disk refuses.
    """
    ordered = sorted(sources.items(), key=lambda item: (-RANK[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, source in ordered:
        start, end = end, end + source.nbytes
        header[name] = {
            "dtype": NAMES[source.dtype], "shape": list(source.tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    checksum = 0
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, source in ordered:
            for piece in source.pieces():
                data = _bytes_of(piece.cpu())
                checksum = zlib.crc32(data, checksum)
                handle.write(data)
    return checksum


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for and held by nobody else.

    A memory-mapped file would count every page that was looked at until the last tensor of it is dropped. Raises
    SafetensorError for a file that is corrupt or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with safe_open(path, framework="pt"):
            pass  # checks the header
        # The file stays the one that was opened, also where another is moved to its place.
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        entries = json.loads(os.pread(self._handle, length, 8))
        self._entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        self._begin = 8 + length

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def checksum(self) -> int:
        """The CRC-32 of all tensors' bytes, as `write_file` gives it."""
        found, place, piece = 0, self._begin, bytearray(8 * PIECE)
        while count := os.preadv(self._handle, [piece], place):
            found, place = zlib.crc32(memoryview(piece)[:count], found), place + count
        return found

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor, which is not read."""
        start, end = self._entries[name]["data_offsets"]
        return end - start

    def dtype(self, name: str) -> torch.dtype | None:
        """The format of a tensor in the file; None for one that no weight of ours has."""
        return DTYPES.get(self._entries[name]["dtype"])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor, converted to `dtype` piece by piece."""
        entry, stored = self._entries[name], self.dtype(name)
        assert stored is not None, entry["dtype"]
        found = torch.empty(entry["shape"], dtype=dtype or stored)
        place = self._begin + entry["data_offsets"][0]
        for piece in found.view(-1).split(PIECE):
            part = piece if piece.dtype is stored else torch.empty(len(piece), dtype=stored)
            self._fill(_bytes_of(part), place)
            place += part.nbytes
            if part is not piece:
                piece.copy_(part)
        return found

    def _fill(self, target: memoryview, place: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._handle, [target[done:]], place + done)
            if count == 0:
                raise SafetensorError("the file ends before its last tensor")
            done += count


def _bytes_of(flat: Tensor) -> memoryview:
    return flat.contiguous().view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
