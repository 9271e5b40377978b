"""Files are written whole or not at all."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import files
from distill.errors import UserError
from distill.files import read_json, whole_folder, write_atomic, write_json, write_tensors

WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_atomic(path, "new"),
    "json": lambda path: write_json(path, {"value": 1}),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(2)}, {"key": "value"}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_kill_before_the_rename_leaves_the_old_file_and_nothing_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def dies(*names: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(OSError, match="No space left"):
            WRITERS[kind](path)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]
    WRITERS[kind](path)
    assert path.read_bytes() != b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "half").touch()
        assert not (tmp_path / "a" / "b").exists()
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    with whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]
    with pytest.raises(OSError), whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "y").touch()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "x"]


def test_folders_are_made_and_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": [1, None]})
    assert read_json(tmp_path / "a" / "b.json") == {"x": [1, None]}
    write_tensors(tmp_path / "c" / "d.safetensors", {"t": torch.arange(3.0)})
    assert torch.equal(load_file(tmp_path / "c" / "d.safetensors")["t"], torch.arange(3.0))


@pytest.mark.parametrize("length", range(8))
def test_tensors_with_metadata_begin_at_a_multiple_of_eight_bytes(tmp_path: Path, length: int) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {"key": "v" * length})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert torch.equal(load_file(path)["a"], torch.ones(2))


def test_json_without_a_number_that_is_not_finite(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": math.nan})
    assert read_json(path) == {"x": 1}
    path.write_text("{")
    with pytest.raises(UserError, match="cannot read .*a.json"):
        read_json(path)


def test_provenance_names_the_commit_and_whether_files_differ_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        ("git", "status", "--porcelain", "--untracked-files=no"): " M a.py\n",
        ("git", "rev-parse", "HEAD"): "abc\n",
    }

    def run(command: list[str], **options: Any) -> Any:
        assert (options["cwd"] / "files.py").is_file() and options["check"] and options["timeout"] == 10
        return SimpleNamespace(stdout=answers[tuple(command)])

    monkeypatch.setattr(subprocess, "run", run)
    version = files.code_version.__wrapped__
    assert version() == ("abc", True)
    answers["git", "status", "--porcelain", "--untracked-files=no"] = "\n"
    assert version() == ("abc", False)

    def fails(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fails)
    assert version() == (None, None), "no checkout"
    monkeypatch.setattr(files, "code_version", lambda: ("abc", True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")
    found = files.provenance()
    assert (found["commit"], found["uncommitted_changes"], found["device"]) == ("abc", True, "a chip")
    assert found["versions"]["torch"] == torch.__version__ and set(found["versions"]) == set(files.PACKAGES)
    assert datetime.fromisoformat(found["date"]).utcoffset() == timedelta(0) and "." not in found["date"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert files.provenance()["device"] == f"CPU ({platform.machine()})" and files._version("no such package") is None
