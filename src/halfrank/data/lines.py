"""Lines of a text file, decoded one by one so that a wrong byte has a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from halfrank.errors import DataError


def decoded(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Lines with their numbers from 1, decoded one by one so that a wrong byte has a line."""
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                _refuse_utf16(path, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield (
                    number,
                    DataError(
                        f"{path}:{number}: byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8. "
                        "Save the file as UTF-8, for instance with: iconv -f latin1 -t utf-8."
                    ),
                )


def _refuse_utf16(path: Path, line: bytes) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:1: the file is UTF-16. Save it as UTF-8, for instance with: iconv -f utf-16 -t utf-8.")
