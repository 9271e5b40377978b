"""Peak memory of this process."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's <malloc.h>."""

_peaks = [0.0]


def keep_freed_memory() -> None:
    """On Linux (glibc), keep freed blocks of up to 1 GB for the next tensor, and do not return them to the system.

    A tensor of some megabytes otherwise gets new pages at each operation, which the system fills with zeros: a sixth of
    the processor time of an evaluation of the phantom base. Numbers do not change.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return to the system what was freed, so that it does not count as held."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak_memory() -> None:
    """Count the peak anew from what is held now; where the system cannot (macOS), it stays that of the process so
    far."""
    _peaks.append(peak_memory_gb())
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Peak memory of this process since `reset_peak_memory`, in units of 1e9 bytes: allocated on the GPU, else
    resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", (PROCESS / "status").read_text())
        if found:
            return int(found[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_of_process_gb() -> float:
    """The same since the process began, whatever was reset."""
    return max(*_peaks, peak_memory_gb())
