"""Fixtures that several test files share."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from accelerate import Accelerator
from hypothesis import settings
from tiny import save_tiny

from distill.config import BaseConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.models.family import Model
from distill.models.loading import load_model

# The same examples in every run, so that a failure is of the change that it follows, and no limit of time, which a busy
# machine breaks; others: --hypothesis-profile default
settings.register_profile("repeatable", derandomize=True, print_blob=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is imported stays until the end; the `gc.collect()` of each training would look at it for a third of a
    second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; tests that need it are skipped where it is missing."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Tiny bases of each architecture, loaded from their folders."""
    folder = tmp_path_factory.mktemp("bases")
    paths = {kind: save_tiny(folder / kind, kind) for kind in ("sd", "v", "sdxl")}
    return {kind: load_model(BaseConfig(name=str(path))).freeze() for kind, path in paths.items()}


@pytest.fixture(scope="module")
def sd(loaded: dict[str, Model]) -> Model:
    return loaded["sd"]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture(scope="module")
def phantoms() -> PhantomDataset:
    return PhantomDataset("test", 8, 0, 64)
