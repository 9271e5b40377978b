"""What every data source yields, whatever its files look like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True)
class Region:
    """Ground truth of one finding in one image, at the data set's resolution.

    mask: (height, width) bool, the union of the finding's masks, or of its boxes where there is no mask.
    boxes: (x, y, width, height) in pixels of the resized image, one for each annotated box.
    """

    finding: str
    mask: torch.Tensor
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    phrase: str | None = None


@dataclass(frozen=True)
class Sample:
    """One image with its text.

    pixel_values: (3, height, width) float32 in [-1, 1].
    labels: the findings that the image is said to have, with or without a region.
    original_size, crop_top_left: (height, width) of the file and the crop's corner, in pixels (read by SDXL).
    square_px: side of the training square, in pixels of the file.
    """

    id: str
    pixel_values: torch.Tensor
    caption: str
    regions: tuple[Region, ...] = ()
    labels: tuple[str, ...] = ()
    original_size: tuple[int, int] = (0, 0)
    crop_top_left: tuple[int, int] = (0, 0)
    square_px: int = 0
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_ids(self) -> tuple[int, ...]:
        """What SDXL reads of an image: original size, top left corner of the crop, and size, each (height, width) in
        px."""
        return (*self.original_size, *self.crop_top_left, *self.pixel_values.shape[-2:])


class ImageCaptionDataset(Protocol):
    """Map-style data set; captions, labels and fingerprints are known without decoding an image."""

    @property
    def findings(self) -> Sequence[str]: ...

    @property
    def query_words(self) -> Mapping[str, Sequence[str]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def caption(self, index: int) -> str: ...

    def labels(self, index: int) -> tuple[str, ...]: ...

    def fingerprint(self, index: int) -> str:
        """Hash of everything that decides `pixel_values` of this row; changes when the file's bytes change."""
        ...


def image_key(dataset: ImageCaptionDataset, index: int) -> str:
    """What the samples of one image share.

    The data set's own `image_key(index)`; a data set without one has an image for each sample.
    """
    own = getattr(dataset, "image_key", None)
    return str(index) if own is None else own(index)


def patient_of(dataset: ImageCaptionDataset, index: int) -> str:
    """The patient of a sample; empty where the data set does not know one."""
    own = getattr(dataset, "patient", None)
    return "" if own is None else own(index)


def group_key(dataset: ImageCaptionDataset, index: int) -> str:
    """The patient, where the data set knows one, else the image: what no two sides of a split may share, and what a
    bootstrap draws, since the images of one patient are not independent."""
    patient = patient_of(dataset, index)
    return f"patient {patient}" if patient else image_key(dataset, index)


def has_finding_twice(dataset: ImageCaptionDataset) -> bool:
    """Whether some finding has a region in two images."""
    seen: dict[str, str] = {}
    for index in range(len(dataset)):
        image = image_key(dataset, index)
        if any(seen.setdefault(region.finding, image) != image for region in region_list(dataset, index)):
            return True
    return False


def region_fingerprint(dataset: ImageCaptionDataset, index: int) -> str:
    """Hash of what decides the regions of a sample: the data set's own `region_fingerprint(index)`, or its
    `fingerprint`."""
    own = getattr(dataset, "region_fingerprint", dataset.fingerprint)
    found: str = own(index)
    return found


def size_ids(dataset: ImageCaptionDataset, index: int) -> tuple[int, ...]:
    """`Sample.size_ids`: the data set's own `size_ids(index)`; a data set without one decodes the image."""
    own = getattr(dataset, "size_ids", None)
    found: tuple[int, ...] = dataset[index].size_ids if own is None else own(index)
    return found


def hash_of(values: Iterable[str]) -> str:
    """One hash of many texts, which are told apart."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest())
    return digest.hexdigest()


def region_list(dataset: ImageCaptionDataset, index: int) -> Sequence[Region]:
    """Regions of a row. The data set's own `regions(index)` does not decode the image; without one, the sample is
    read."""
    own = getattr(dataset, "regions", None)
    return dataset[index].regions if own is None else own(index)
