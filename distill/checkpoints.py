"""Checkpoints of a training: folders state/step-N, each with a manifest of checksums. A damaged one is never read.

state/best-N.safetensors holds the weights of the best look so far. A checkpoint names the one that was the best when it
was written, which stays as long as the checkpoint does.
"""

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
from distill.files import JsonObject, write_tensors

KEPT = 2
"""Checkpoints kept, the newest."""
MANIFEST, FACTS, LOG = "manifest.json", "state.json", "train_log.jsonl"
BEST = "best"
"""Entry of FACTS: the best look, see `Best`; absent where the last weights are exported."""
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

    @property
    def best(self) -> Best | None:
        """The best look until then, where the weights of one are to be exported."""
        entry = self.facts.get(BEST)
        return Best(**entry) if entry else None


@dataclass(frozen=True)
class Best:
    """The best look so far. score: higher is better. sha256: of its file."""

    step: int
    score: float
    sha256: str


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
            f"the checkpoint {folder} cannot be written: {_reason(error)}; free some space, or make the folder "
            f"writable. The same command then goes on from {_newest_name(parent)}"
        ) from error
    # A later one is of a training that went back before it, because it was damaged.
    kept = [step for step in steps_in(parent) if step <= checkpoint.step][:KEPT]
    for step in set(steps_in(parent)) - set(kept):
        shutil.rmtree(folder_of(parent, step), ignore_errors=True)
    forget_best(parent, checkpoint.best)
    return folder


def best_file(parent: Path, step: int) -> Path:
    return parent / f"best-{step:08d}.safetensors"


def write_best(
    parent: Path, step: int, score: float, trained: dict[str, torch.Tensor], method: dict[str, torch.Tensor]
) -> Best:
    """Write the weights of the best look, and what the method keeps, in the place of those of the one before."""
    path = best_file(parent, step)
    parts = {f"{part}/{k}": v for part, own in (("trained", trained), ("method", method)) for k, v in own.items()}
    write_tensors(path, parts, {"step": str(step)})
    best = Best(step, score, _sha256(path, flush=True))
    forget_best(parent, best)
    return best


def check_best(parent: Path, best: Best) -> None:
    """Raise Damaged unless the weights of the best look are as they were written."""
    path = best_file(parent, best.step)
    try:
        is_whole = _sha256(path) == best.sha256
    except OSError as error:
        raise Damaged(f"{path.name}: {_reason(error)}") from error
    if not is_whole:
        raise Damaged(f"{path.name} is not as it was written")


def read_best(parent: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The trained parameters at the best look, and what the method keeps; see `check_best`."""
    found = load_file(best_file(parent, step))
    trained, method = (
        {key.removeprefix(part): value for key, value in found.items() if key.startswith(part)}
        for part in ("trained/", "method/")
    )
    return trained, method


def forget_best(parent: Path, but: Best | None) -> None:
    """Remove the weights of all looks that no checkpoint names, but those of this one."""
    named = [_best_step(folder_of(parent, step)) for step in steps_in(parent)] + [but.step if but else None]
    kept = {best_file(parent, step) for step in named if step is not None}
    for path in parent.glob("best-*.safetensors"):
        if path not in kept:
            path.unlink(missing_ok=True)


def _best_step(folder: Path) -> int | None:
    """The look that a checkpoint names as the best; None where there is none, or the checkpoint cannot be read."""
    try:
        return int(json.loads((folder / FACTS).read_text(encoding="utf-8"))[BEST]["step"])
    except UNREADABLE:
        return None


def planned_steps(parent: Path) -> int | None:
    """max_steps of the training of the newest checkpoint; None where there is none, or it cannot be read."""
    try:
        return int(
            json.loads((folder_of(parent, steps_in(parent)[0]) / FACTS).read_text(encoding="utf-8"))["max_steps"]
        )
    except (*UNREADABLE, IndexError):
        return None


def newest(parent: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none. `say` is told of each damaged one."""
    steps = steps_in(parent)
    for step in steps:
        try:
            check(folder_of(parent, step))
            found = read(folder_of(parent, step))
            if found.best is not None:
                check_best(parent, found.best)
            return found
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
    """Remove all checkpoints but that of `step` with the look that it names, and the folder if nothing is left."""
    if not parent.is_dir():
        return
    folder = folder_of(parent, step)
    best = _best_step(folder)
    for path in parent.iterdir():
        if path != folder and (best is None or path != best_file(parent, best)):
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
