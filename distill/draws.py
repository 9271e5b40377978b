"""Random draws of one process of several, so that the processes together draw what one with the whole batch draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


class SharedGenerator(torch.Generator):
    """The same generator on every process; `rows` gives each its own rows. own_seed: of the process, for dropout. step:
    the optimizer step that it draws for, the first being 1."""

    process: int
    processes: int
    own_seed: int
    step: int


def generator_at(seed: int, step: int, rank: int) -> torch.Generator:
    """CPU generator that depends on (seed, step, rank) only, so that a resumed run draws the same noise."""
    return torch.Generator().manual_seed(_seed_at(seed, step, rank))


def shared_generator(seed: int, micro: int, process: int, processes: int, *, step: int) -> SharedGenerator:
    """What `generator_at(seed, micro, 0)` gives, with the part of this process. micro: micro steps before, of all
    steps."""
    generator = SharedGenerator()
    generator.manual_seed(_seed_at(seed, micro, 0))
    generator.process, generator.processes, generator.own_seed = process, processes, _seed_at(seed, micro, process)
    generator.step = step
    return generator


def step_of(generator: torch.Generator) -> int:
    """The optimizer step that the training loop's generator draws for, the first being 1; 1 for any other generator."""
    return generator.step if isinstance(generator, SharedGenerator) else 1


def _seed_at(seed: int, step: int, rank: int) -> int:
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    return int(state[0]) << 32 | int(state[1])


def rows(draw: Callable[[int], torch.Tensor], count: int, generator: torch.Generator) -> torch.Tensor:
    """This process's `count` rows. draw: gives that many rows, drawn from `generator`.

    Every process draws the rows of all: a generator on the CPU cannot skip those of the others.
    """
    if not isinstance(generator, SharedGenerator):
        return draw(count)
    return draw(count * generator.processes)[generator.process * count : (generator.process + 1) * count]


def normal(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Standard normal values of `shape`, rows first."""
    return rows(lambda count: torch.randn(count, *shape[1:], generator=generator), shape[0], generator)


def uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) values of [0, 1)."""
    return rows(lambda count: torch.rand(count, generator=generator), count, generator)
