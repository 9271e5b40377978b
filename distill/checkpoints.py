"""Checkpoints of a training: folders state/step-N, each with a manifest of checksums. A damaged one is never read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distill.errors import UserError
from distill.files import JsonObject

KEPT = 2
"""Checkpoints kept, the newest."""
MANIFEST, FACTS, LOG = "manifest.json", "state.json", "train_log.jsonl"
TRAINED, LOOP, METHOD = "trainable.safetensors", "optimizer.pt", "method.safetensors"
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on after `step`.

    facts: in JSON, which training this is, and how far it is. trained: the trained parameters by name. loop: states of
    optimizer, schedule and the like, for torch.save. log: train_log.jsonl so far. method: what the method keeps.
    """

    step: int
    facts: JsonObject
    trained: dict[str, torch.Tensor]
    loop: dict[str, Any]
    log: str
    method: dict[str, torch.Tensor] = field(default_factory=dict)


class Damaged(Exception):
    """What is wrong with a checkpoint."""


def folder_of(parent: Path, step: int) -> Path:
    return parent / f"step-{step:08d}"


def steps_in(parent: Path) -> list[int]:
    """Steps that have a checkpoint, whole or damaged, the newest first."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (parent.iterdir() if parent.is_dir() else ()))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def write(parent: Path, checkpoint: Checkpoint) -> Path:
    """Write step-N in a temporary folder and rename it; the manifest comes last. Removes all but the newest KEPT.

    Raises UserError if it cannot be written; the checkpoint before is then untouched.
    """
    folder = folder_of(parent, checkpoint.step)
    partial = folder.with_suffix(".partial")
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        save_file(checkpoint.trained, partial / TRAINED)
        torch.save(checkpoint.loop, partial / LOOP)
        if checkpoint.method:
            save_file(checkpoint.method, partial / METHOD)
        (partial / LOG).write_text(checkpoint.log, encoding="utf-8")
        (partial / FACTS).write_text(json.dumps({"step": checkpoint.step} | checkpoint.facts), encoding="utf-8")
        sums = {path.name: _sha256(path, flush=True) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1), encoding="utf-8")
        _flush(partial / MANIFEST)
        _remove(folder)
        os.replace(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError when the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the checkpoint {folder} cannot be written: {_reason(error)}; free some space, or make the folder writable. "
            f"The same command then goes on from {_newest_name(parent)}"
        ) from error
    # A later one is of a training that went back before it, because it was damaged.
    kept = [step for step in steps_in(parent) if step <= checkpoint.step][:KEPT]
    for step in set(steps_in(parent)) - set(kept):
        shutil.rmtree(folder_of(parent, step), ignore_errors=True)
    return folder


def newest(parent: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none. `say` is told of each damaged one."""
    steps = steps_in(parent)
    for step in steps:
        try:
            check(folder_of(parent, step))
            return read(folder_of(parent, step))
        except Damaged as damage:
            say(f"{folder_of(parent, step)} is damaged and is not used: {damage}")
    if steps:
        say(f"no checkpoint in {parent} is whole: the training starts from the beginning")
    return None


def check(folder: Path) -> None:
    """Raise Damaged unless the files of a checkpoint are those that its manifest lists, byte for byte."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        missing = sorted(set(sums) - {path.name for path in folder.iterdir()})
        if missing:
            raise Damaged(f"it lacks {', '.join(missing)}")
        changed = [name for name, wanted in sums.items() if _sha256(folder / name) != wanted]
    except UNREADABLE as error:
        raise Damaged(
            f"it has no {MANIFEST}, or is of an earlier version"
            if not (folder / MANIFEST).is_file()
            else _reason(error)
        ) from error
    if changed:
        raise Damaged(f"{', '.join(changed)} is not as it was written")
    if not {TRAINED, LOOP, FACTS, LOG} <= set(sums):
        raise Damaged(f"{MANIFEST} does not list all files")


def read(folder: Path) -> Checkpoint:
    """A checkpoint whose files were checked. Raises Damaged for content that cannot be read, or of another step."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        loop = torch.load(folder / LOOP, map_location="cpu", weights_only=True)
        method = load_file(folder / METHOD) if (folder / METHOD).exists() else {}
        step = facts["step"]
        if folder.name != folder_of(folder.parent, step).name:
            raise Damaged(f"{FACTS} is of step {step}")
        log = (folder / LOG).read_text(encoding="utf-8")
        return Checkpoint(step, facts, load_file(folder / TRAINED), loop, log, method)
    except UNREADABLE as error:
        raise Damaged(_reason(error)) from error


def keep_only(parent: Path, step: int) -> None:
    """Remove all checkpoints but that of `step`, and the folder if nothing is left."""
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        if path.name != folder_of(parent, step).name:
            _remove(path)
    if not any(parent.iterdir()):
        parent.rmdir()


def _newest_name(parent: Path) -> str:
    steps = steps_in(parent)
    return folder_of(parent, steps[0]).name if steps else "the beginning"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path, *, flush: bool = False) -> str:
    if flush:
        _flush(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To the disk, so that no power loss leaves the manifest without what it lists."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
