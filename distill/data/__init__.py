"""Captioned images: the phantom, generic pictures, folders."""

from __future__ import annotations

from typing import Literal

from distill.config import DataConfig
from distill.data.folder import FolderDataset
from distill.data.phantom import PhantomDataset
from distill.data.sample import ImageCaptionDataset, Region, Sample

__all__ = ["FolderDataset", "ImageCaptionDataset", "PhantomDataset", "Region", "Sample", "load_dataset"]


def load_dataset(config: DataConfig, split: Literal["train", "validation", "test"]) -> PhantomDataset | FolderDataset:
    """The data set of a configuration. Raises UserError with every fault of the data."""
    if config.kind == "folder":
        return FolderDataset(config, split)
    size = {"train": config.train_size, "validation": config.validation_size, "test": config.test_size}[split]
    return PhantomDataset(split, size, config.seed, config.resolution)
