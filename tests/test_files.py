"""Files are written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
