"""Folders that are written whole or not at all, whoever dies meanwhile and whoever else writes to them.

Files are made in a staging folder and moved in under a lock on the folder itself; who dies lets go of its lock, and
what it left is completed, where it was complete, or dropped by the next one who comes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from halfrank.errors import SaveError

log = logging.getLogger("halfrank")
RUNNING = ".halfrank-running"
STAGE, COMPLETE = ".halfrank-saving", "complete"


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"Cannot write to '{path}': {error.strerror or error}. Choose a folder you may write to."
        ) from error


def make(path: Path) -> None:
    """Make a folder and its parents; raises SaveError where that cannot be."""
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, write: Callable[[Path], None], *, stale: tuple[str, ...] = ()) -> None:
    """Let `write` fill a staging folder, then move it to `path`: whole or not at all.

    An existing folder keeps its other files; files matching `stale` that were not written again are removed. Of two
    processes that save to one folder at the same time, the later one's files stand there in the end, all of them.
    """
    parent = path.absolute().parent
    with _writable(path):
        parent.mkdir(parents=True, exist_ok=True)
        finish_interrupted(path)
        stage, hold = _new_stage(path, parent)
    try:
        write(stage)
        _sync(stage)
        if not stage.is_relative_to(path.absolute()):
            stage = _put_in_place(stage, path.absolute())
        if stage != path.absolute():
            with _alone(path):
                _finish(path)
                (stage / COMPLETE).write_text("\n".join(_outdated(stage, path, stale)), encoding="utf-8")
                _move_in(stage, path)
        _sync_folder(parent)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"Saving to '{path}' failed: {error}. Nothing partial was left behind.") from error
    finally:
        if stage != path.absolute() and not (stage / COMPLETE).exists():
            shutil.rmtree(stage, ignore_errors=True)
        os.close(hold)


def finish_interrupted(path: Path) -> None:
    """Complete a save that was cut off while its finished files moved in, or drop one that never finished."""
    if any(path.glob(f"{STAGE}*")):
        with _alone(path):
            _finish(path)


@contextmanager
def unchanged(source: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a folder from being saved to while it is read; hub ids pass."""
    path = Path(source)
    if not path.is_dir():
        yield
        return
    finish_interrupted(path)
    with _alone(path, shared=True):
        yield


def claim(handle: TextIO, refusal: str) -> None:
    """Lock an open file until it is closed; raises SaveError with `refusal`, and closes it, where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise SaveError(refusal) from error


@contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Keep a folder, made if absent, to one training run; raises SaveError while another process trains there."""
    fresh = not path.exists()
    make(path)
    with _writable(path):
        handle = (path / RUNNING).open("w")
    claim(handle, f"Another run is writing to '{path}' at this moment. Wait for it, or choose another folder.")
    try:
        yield
    finally:
        (path / RUNNING).unlink(missing_ok=True)
        handle.close()
        if fresh and not any(path.iterdir()):
            path.rmdir()


def _new_stage(path: Path, parent: Path) -> tuple[Path, int]:
    """A staging folder beside a new `path` or inside an existing one, and the handle that says its writer lives."""
    place, prefix = (path.absolute(), f"{STAGE}-") if path.exists() else (parent, f".{path.name}{STAGE}-")
    with _alone(place):
        _drop_abandoned(place, prefix)
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        return stage, _locked(stage)


def _put_in_place(stage: Path, path: Path) -> Path:
    """Make a finished stage the folder itself, or move it inside one that another process made meanwhile."""
    with _alone(path.parent):
        target = path / f"{STAGE}-{stage.name.rpartition('-')[2]}" if path.exists() else path
        if target == path:
            stage.chmod(0o755)
        return stage.replace(target)


def _finish(path: Path) -> None:
    # Moving in happens under the lock that the caller holds, so whoever left a complete stage is dead.
    for stage in sorted(path.glob(f"{STAGE}*")):
        if (stage / COMPLETE).exists():
            _move_in(stage, path)
    _drop_abandoned(path, STAGE)


def _drop_abandoned(place: Path, prefix: str) -> None:
    for stage in place.glob(f"{prefix}*"):
        handle = os.open(stage, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its writer lives, or this file system cannot say
        else:
            shutil.rmtree(stage)
        finally:
            os.close(handle)


@contextmanager
def _alone(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `folder` against savers, of this process and others; who dies lets go."""
    handle = _locked(folder, shared=shared)
    try:
        yield
    finally:
        os.close(handle)


def _locked(folder: Path, *, shared: bool = False) -> int:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        log.warning("'%s' cannot be locked (%s): let one process at a time save there.", folder, error.strerror)
    return handle


def _outdated(stage: Path, path: Path, stale: tuple[str, ...]) -> list[str]:
    return [item.name for pattern in stale for item in path.glob(pattern) if not (stage / item.name).exists()]


def _move_in(stage: Path, path: Path) -> None:
    """Finish what `stage` began, perhaps in a process that died: files that moved already are not looked at again."""
    for name in (stage / COMPLETE).read_text(encoding="utf-8").splitlines():
        (path / name).unlink(missing_ok=True)
    for name in sorted({item.name for item in stage.iterdir()} - {COMPLETE}):
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(stage / name, target)
    shutil.rmtree(stage)


def _sync(folder: Path) -> None:
    for item in folder.rglob("*"):
        if item.is_file():
            item.chmod(0o644)
            with item.open("rb") as handle:
                os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
