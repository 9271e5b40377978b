"""torch.compile of the blocks of a denoiser, in place: attention and residual blocks, which are most of a step's
kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from distill.errors import UserError

IN_COMPILED_BLOCK = "_in_compiled_block"
"""Attribute of attention layers inside a compiled block: a recorder must not be called there."""
VARIANTS = 64
"""Compiled forms that one kind of block may have: of each size, with and without a recorder, with and without
gradients."""


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The smallest modules around each attention layer, and the residual blocks."""
    parents = {name.rpartition(".")[0] for name, part in denoiser.named_modules() if isinstance(part, Attention)}
    return [part for name, part in denoiser.named_modules() if name in parents or isinstance(part, ResnetBlock2D)]


class CompiledBlocks:
    """The blocks of some denoisers, compiled until `close`. Hooks of a block run outside of its compiled part."""

    def __init__(self, denoisers: Sequence[nn.Module], *, fullgraph: bool = False) -> None:
        """fullgraph: raise where a block would be compiled in several parts. Raises UserError without a C++
        compiler."""
        names = (os.environ.get("CXX", ""), "g++", "c++", "clang++", "cl")
        self._forward: dict[nn.Module, Callable[..., object]] = {}
        if not denoisers:
            return
        if not any(name and shutil.which(name) for name in names):
            raise UserError("trainer.compile needs a C++ compiler such as g++; install one, or set it to false")
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, max(VARIANTS, getattr(torch._dynamo.config, limit)))
        for block in (block for denoiser in denoisers for block in blocks(denoiser)):
            self._forward[block] = torch.compile(block.forward, dynamic=False, fullgraph=fullgraph)
        self._install()

    def _install(self) -> None:
        for block, forward in self._forward.items():
            block.forward = forward
            for part in block.children():
                if isinstance(part, Attention):
                    setattr(part, IN_COMPILED_BLOCK, True)

    def close(self) -> None:
        for block in self._forward:
            block.__dict__.pop("forward", None)
            for part in block.children():
                part.__dict__.pop(IN_COMPILED_BLOCK, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """As they were, for passes of other sizes, such as a look at samples."""
        self.close()
        try:
            yield
        finally:
            self._install()
