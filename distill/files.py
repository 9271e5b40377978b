"""Files that survive a kill, JSON, and provenance: the only place that writes results and says where they come from."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from distill.errors import UserError

JsonObject = dict[str, Any]
"""An object of a JSON file, or one that is to be written: a row of a log, an entry of metrics.json."""
PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchmetrics", "safetensors", "pyarrow",
)  # fmt: skip


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def code_version() -> tuple[str | None, bool | None]:
    """Commit (None outside a checkout) and whether files differ from it, as at the first call: a run calls it at start,
    since the checkout may change before its end."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


def provenance() -> JsonObject:
    """Commit, whether files differ from it, versions, device, threads, time in UTC."""
    commit, changed = code_version()
    cuda = torch.cuda.is_available()
    return {
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write the whole file or nothing: a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """The same for a safetensors file. Equal tensors and metadata give equal bytes.

    The library's own `save_file` writes to a file `.tmpXXXXXX` first, which a kill would leave for good.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        content = save(dict(tensors))
        temporary.write_bytes(_with_metadata(content, metadata) if metadata else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: one to write to, which gets the name `path` when the block ends without an error.

    Raises OSError if `path` is a folder that is not empty.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _with_metadata(file: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with sorted metadata: the library writes its entries in an order that changes from run to
    run."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(file[8:start])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[start:]


def write_json(path: Path, value: object) -> Path:
    """The same for a JSON value. Raises ValueError for a number that is not finite, and then writes nothing."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False))


def read_json(path: Path) -> Any:
    """JSON of a file written by this project; UserError names the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
