"""A batch as training reads it, typed. A row is a batch without its first dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

T = TypeVar("T", bound="Tensors")
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Tensors:
    """A record of tensors, tuples of tensors, None, and further records: moved, stacked and cut as one."""

    def apply(self: T, change: Change) -> T:
        """The same record with `change` applied to each tensor."""
        return type(self)(**{item.name: _changed(getattr(self, item.name), change) for item in fields(self)})

    def to(self: T, device: torch.device, non_blocking: bool = False) -> T:
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: T) -> T:
        """Called by the data loader where it pins memory."""
        return self.apply(lambda tensor: tensor.pin_memory())

    def first(self: T, count: int) -> T:
        """The first `count` images."""
        return self.apply(lambda tensor: tensor[:count])

    @classmethod
    def stack(cls: type[T], rows: Sequence[T]) -> T:
        """One batch of rows that have the same fields."""
        return cls(**{item.name: _stacked([getattr(row, item.name) for row in rows]) for item in fields(cls)})


def _changed(value: object, change: Change) -> object:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Tensors):
        return value.apply(change)
    if isinstance(value, tuple):
        return tuple(_changed(item, change) for item in value)
    return value


def _stacked(values: Sequence[object]) -> object:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(list(values))  # type: ignore[arg-type]
    if isinstance(first, Tensors):
        return type(first).stack(values)  # type: ignore[arg-type]
    if isinstance(first, tuple):
        return tuple(_stacked(items) for items in zip(*values, strict=True))
    return first


@dataclass(frozen=True)
class Pixels(Tensors):
    """pixel_values: (batch, 3, height, width) float32 in [-1, 1]."""

    pixel_values: torch.Tensor


@dataclass(frozen=True)
class Posterior(Tensors):
    """The VAE's posterior of the image, and of the mirrored image where rows may be mirrored.

    All (batch, channels, height, width), not scaled.
    """

    mean: torch.Tensor
    std: torch.Tensor
    mean_flipped: torch.Tensor | None = None
    std_flipped: torch.Tensor | None = None


@dataclass(frozen=True)
class Tokens(Tensors):
    """input_ids: for each tokenizer (batch, tokens) int64."""

    input_ids: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class TextEmbeddings(Tensors):
    """embeds: (batch, tokens, dim) hidden states. pooled: (batch, dim), SDXL's."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch(Tensors):
    """Images with their texts.

    groups: (batch, tokens) codes of distill.tokens. droppable: (batch,) bool, whether caption dropout may take the
    caption. flippable: (batch,) bool, whether the image may be mirrored. size_ids: (batch, 6), original size, crop and
    target size. label_tokens: (batch, tokens) bool, the words that name a label of the image. regions: (batch, tokens,
    S, S) uint8, 1 where the label that a word names is.
    """

    image: Pixels | Posterior
    text: Tokens | TextEmbeddings
    groups: torch.Tensor
    droppable: torch.Tensor
    flippable: torch.Tensor | None = None
    size_ids: torch.Tensor | None = None
    label_tokens: torch.Tensor | None = None
    regions: torch.Tensor | None = None
