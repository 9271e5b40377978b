"""A data set in memory, for tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill.data.sample import Region, Sample


class Listed:
    """A data set of samples in memory."""

    def __init__(self, samples: Sequence[Sample], query_words: dict[str, Sequence[str]]) -> None:
        self.samples, self.query_words = list(samples), query_words
        self.findings = list(query_words)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def caption(self, index: int) -> str:
        return self.samples[index].caption

    def labels(self, index: int) -> tuple[str, ...]:
        return self.samples[index].labels

    def fingerprint(self, index: int) -> str:
        return self.samples[index].id


def sample(name: str, caption: str, *regions: tuple[str, str | None], size: int = 64) -> Sample:
    """An image of noise; each region covers rows 8..15 and columns 32..47 of 64."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[size // 8 : size // 4, size // 2 : 3 * size // 4] = True
    pixels = torch.rand(3, size, size, generator=torch.Generator().manual_seed(len(caption))) * 2 - 1
    found = tuple(Region(f, mask, ((size / 2, size / 8, size / 4, size / 8),), phrase) for f, phrase in regions)
    return Sample(name, pixels, caption, found, tuple(f for f, _ in regions), (size, size))


WORDS: dict[str, Sequence[str]] = {"edema": ("edema",), "pleural effusion": ("effusion", "effusions")}
