"""Bases, adapters and run folders that are damaged, foreign or hostile: one message that names the file, or
accepted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import huggingface_hub.constants
import pytest
import torch
from hostile import Case, adapter_cases, base_cases, full_run_cases, unreadable_cases
from tiny import save_tiny

from distill.config import BaseConfig, LoraConfig
from distill.errors import UserError
from distill.models.adapters import prepare_training
from distill.models.export import export
from distill.models.loading import load_model

UNREADABLE = unreadable_cases() if os.getuid() else []
BASES, ADAPTERS, RUNS = [*base_cases(), *UNREADABLE], list(adapter_cases()), list(full_run_cases())
EVERY = [*BASES, *ADAPTERS, *RUNS]
SAMPLE = EVERY[::16]
HANG_S = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the bases sd and sdxl, and the run folders lora and full of sd."""
    folder = tmp_path_factory.mktemp("sound")
    for kind in ("sd", "sdxl"):
        save_tiny(folder / kind, kind)
    for how in ("lora", "full"):
        model = load_model(BaseConfig(name=str(folder / "sd")))
        prepare_training(model, denoiser=how, text_encoder=how, lora=LoraConfig(rank=2, alpha=4.0))  # type: ignore[arg-type]
        torch.manual_seed(0)
        for module in model.modules():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.01 * torch.randn_like(parameter)
        export(model, folder / how)
    return folder


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*arguments: object) -> NoReturn:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def listing(folder: Path) -> set[Path]:
    """All but what Python caches."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def outcome(case: Case, sound: Path, work: Path) -> str | None:
    """What a user is told of the damaged folder, None where it is accepted. Nothing may be written, whatever
    happens."""
    kind = case.kind if case in BASES else "lora" if case in ADAPTERS else "full"
    folder = Path(shutil.copytree(sound / kind, work / "damaged"))
    os.chdir(work)
    sys.path.insert(0, str(work))
    case.damage(folder)
    before = listing(work)
    base, run = (folder, None) if case in BASES else (sound / "sd", folder)
    try:
        with no_hang():
            load_model(BaseConfig(name=str(base)), run)
        return None
    except UserError as error:
        assert str(folder) in str(error), "the message names the folder"
        return str(error)
    finally:
        sys.path.remove(str(work))
        assert listing(work) == before, "nothing is written, and no code of the folder runs"


def check(case: Case, sound: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    said = outcome(case, sound, work)
    if case.said is None:
        assert said is None
    else:
        assert said is not None, "accepted"
        assert re.search(case.said, said), said
        assert "Traceback" not in said and len(said) < 1500


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_some_hostile_folders_are_answered(
    case: Case, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, sound, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_hostile_folder_is_answered(
    case: Case, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, sound, tmp_path, monkeypatch)


def test_there_are_as_many_hostile_folders_as_the_readme_says() -> None:
    assert [len(cases) for cases in (base_cases(), ADAPTERS, RUNS, unreadable_cases())] == [317, 53, 102, 9]
    names = [case.name for case in EVERY]
    assert len(set(names)) == len(names)


def test_a_hub_id_in_the_local_cache_is_read_like_a_folder(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "a" * 40
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(sound / "sd", cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, ours = (load_model(BaseConfig(name=name)) for name in ("someone/tiny", str(sound / "sd")))
    theirs = ours.denoiser.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.denoiser.state_dict().items())
    with pytest.raises(UserError, match="no weights of the variant fp16"):
        load_model(BaseConfig(name="someone/tiny", variant="fp16"))
