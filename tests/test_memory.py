"""Peak memory is that since the last reset, and that of the process all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_blocks_are_kept_until_they_are_returned() -> None:
    code = """
import sys, resource, torch
from distill.memory import keep_freed_memory, return_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
def work():
    before = faults()
    for _ in range(20):
        torch.zeros(12_000_000)
    return faults() - before
plain = work()
keep_freed_memory()
work()
kept, full = work(), held()
return_freed_memory()
print(plain, kept, full - held())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, kept, returned = map(int, done.stdout.split())
    assert kept < plain / 10 and returned > 40e6


def test_on_a_gpu_it_is_what_was_allocated_there(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"peak": 3_500_000_000}
    monkeypatch.setattr(memory, "_peaks", [0.0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=1_000_000_000))
    assert peak_memory_gb() == 3.5
    reset_peak_memory()
    assert peak_memory_gb() == 1.0 and peak_of_process_gb() == 3.5


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd", 1024)])
def test_other_systems_count_bytes_or_kilobytes(
    platform: str, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_memory_gb() == pytest.approx(2_000_000 * unit / 1e9)
    (tmp_path / "status").write_text("Name: x\nVmHWM:\t  1500000 kB\n")
    assert peak_memory_gb() == pytest.approx(1.536)


def test_glibc_is_told_to_keep_blocks_of_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the numbers of its <malloc.h>: M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1."""
    asked: list[Any] = []
    libc = SimpleNamespace(mallopt=lambda *given: asked.append(given), malloc_trim=asked.append)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: {"libc.so.6": libc}[name])
    memory.keep_freed_memory()
    memory.return_freed_memory()
    assert asked == [(-3, 2**30), (-1, 2**31 - 1), 0]

    def missing(name: str) -> None:
        raise OSError

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    memory.keep_freed_memory()
    memory.return_freed_memory()
