"""What a device allows: copies that nobody waits for, TF32, the layout of weights, and loader processes that feed it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

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


@contextmanager
def quick_on_cpu(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """On a CPU, less time for models that are measured, while the context is open.

    Weights of convolutions have channels as their last dimension in memory (a tenth less time of drawing an image; the
    last bits of the output are others), and feed-forward layers of a denoiser take one row of a batch at a time, which
    stays in the CPU's cache (an eighth less time; the same bits).
    """
    parts = [part for module in modules for part in module.modules()] if device.type == "cpu" else []
    weights = [weight for part in parts for weight in part.parameters(recurse=False) if weight.ndim == 4]
    blocks = [part for part in parts if isinstance(part, BasicTransformerBlock)]
    for weight in weights:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    for block in blocks:
        block.set_chunk_feed_forward(1)
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()
        for block in blocks:
            block.set_chunk_feed_forward(None)


def loader_processes(asked: int | None, device: torch.device | str) -> int:
    """`asked`; for None what suits the device: on a CPU none, as they would take the cores that train."""
    if asked is not None:
        return asked
    if torch.device(device).type != "cuda":
        return 0
    return min(LOADER_PROCESSES, len(cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
