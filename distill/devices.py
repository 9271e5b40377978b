"""What a device allows: copies that nobody waits for, TF32, and loader processes that feed it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distill.processes import cores

LOADER_PROCESSES = 4
"""Data loader processes for a GPU where the user names no number."""


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. From pinned memory the copy to a GPU waits for nothing that runs there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def tf32(device: torch.device, allowed: bool = True) -> Iterator[None]:
    """Matrix products of float32 in TF32 while the context is open, where the device is a GPU; convolutions already
    are."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def loader_processes(asked: int | None, device: torch.device | str) -> int:
    """`asked`; for None what suits the device: on a CPU none, as they would take the cores that train."""
    if asked is not None:
        return asked
    if torch.device(device).type != "cuda":
        return 0
    return min(LOADER_PROCESSES, len(cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
