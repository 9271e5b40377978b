"""Peak memory is that since the last reset, and that of the process all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import memory
from distill.memory import peak_memory_gb, peak_of_process_gb, reset_peak_memory


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/self/clear_refs").exists(), reason="resident on Linux")
def test_a_peak_before_the_reset_does_not_count() -> None:
    block = torch.ones(100_000_000)  # 0.4 GB
    with_block = peak_memory_gb()
    del block
    assert peak_memory_gb() >= with_block - 1e-3
    reset_peak_memory()
    assert peak_memory_gb() < with_block - 0.3
    assert peak_of_process_gb() >= with_block - 1e-3
    held = torch.ones(50_000_000)
    assert peak_memory_gb() > with_block - 0.3
    del held


def test_where_the_system_has_no_such_files_it_is_the_peak_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    before = peak_memory_gb()
    reset_peak_memory()
    assert peak_memory_gb() >= before > 0
