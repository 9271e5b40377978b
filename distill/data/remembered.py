"""Samples that stay in memory, where several parts of an evaluation read the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.data.sample import ImageCaptionDataset, Sample

BYTES = 2**28


class Remembered:
    """The same data set, whose first samples are decoded once; nothing is forgotten, and nothing kept beyond `limit`
    bytes."""

    def __init__(self, dataset: ImageCaptionDataset, limit: int = BYTES) -> None:
        self._dataset, self._left = dataset, limit
        self._kept: dict[int, Sample] = {}
        self.findings: Sequence[str] = dataset.findings
        self.query_words: Mapping[str, Sequence[str]] = dataset.query_words
        self.caption, self.labels, self.fingerprint = dataset.caption, dataset.labels, dataset.fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        if index in self._kept:
            return self._kept[index]
        sample = self._dataset[index]
        size = sample.pixel_values.nbytes + sum(region.mask.nbytes for region in sample.regions)
        if size <= self._left:
            self._kept[index] = sample
            self._left -= size
        return sample

    def __getattr__(self, name: str) -> object:  # what only some data sets have, such as regions() and image_key()
        found: object = getattr(self.__dict__["_dataset"], name)
        return found
