"""A run folder: one launch at a time, and nothing left in it of one that was killed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.utils import broadcast_object_list

from distill.errors import UserError
from distill.processes import process_state

LOCKS = ".locks"
"""Folder of the locks in a run folder."""
SHARED_WAIT = 5.0
"""Seconds that a launch which shares its folder waits for one that holds it alone."""
_LEFTOVER = re.compile(r"\..+\.\d+(\.\d+)?\.tmp|(export|look|step-\d+|)\.partial")
"""Names of what is written before it is renamed, see distill/files.py."""


@contextmanager
def held(folder: Path, *, shared: bool = False, write: bool = True) -> Iterator[None]:
    """Keep other launches out of a run folder; all ranks of one launch must call this.

    shared: let those in that share it too. write: False changes and locks nothing, as a dry run asks.
    Removes what a killed launch left half-written. Raises UserError if another launch is at the folder, or if it cannot
    be written. A launch that fails before it wrote anything leaves nothing.
    """
    in_the_way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise UserError(f"output_dir: {in_the_way} is a file; choose another --output_dir")
    if not write or not process_state().is_main_process:
        yield
        return
    fresh = not (folder / LOCKS).exists()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCKS / ".launch", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"output_dir: cannot write to {folder}: {error.strerror}; choose another --output_dir, or make it writable"
        ) from None
    try:
        _acquire(lock, folder, shared=shared)
        try:
            yield
        except BaseException:
            if fresh and _is_alone(lock):
                shutil.rmtree(folder / LOCKS, ignore_errors=True)
                _remove_empty(made)
            raise
    finally:
        os.close(lock)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that all processes of a launch share; it is removed at the end. All processes must call this."""
    state = process_state()
    made: list[str] = [tempfile.mkdtemp() if state.is_main_process else ""]
    broadcast_object_list(made)
    try:
        yield Path(made[0])
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(made[0], ignore_errors=True)


def _acquire(lock: int, folder: Path, *, shared: bool) -> None:
    """Raises UserError if another launch holds the folder. Alone in it, removes leftovers.

    One that shares waits a little: the first to come holds the folder for itself while it removes leftovers.
    """
    deadline = time.monotonic() + (SHARED_WAIT if shared else 0)
    while True:
        alone = _is_alone(lock)
        if alone:
            remove_leftovers(folder)
        if _locked(lock, fcntl.LOCK_SH) if shared else alone:
            return
        if time.monotonic() >= deadline:
            raise UserError(f"another launch is at {folder}; wait until it ends, or choose another --output_dir")
        time.sleep(0.05)


def _is_alone(lock: int) -> bool:
    """Whether no other launch is at the folder; then none comes in until the lock is closed or shared."""
    return _locked(lock, fcntl.LOCK_EX)


def _locked(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with suppress(OSError):
            path.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove files and folders that a killed launch had not renamed yet. No other launch may be at the folder."""
    for parent, names, files in os.walk(folder):
        for name in [name for name in (*names, *files) if _LEFTOVER.fullmatch(name)]:
            path = Path(parent) / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        names[:] = [name for name in names if not _LEFTOVER.fullmatch(name)]
