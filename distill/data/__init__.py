"""Captioned images: the phantom, generic pictures, and the readers of image files."""

from __future__ import annotations

from typing import Literal

from distill.config import DataConfig
from distill.data.coco import CocoDataset
from distill.data.folder import FolderDataset
from distill.data.mimic import MimicDataset, MsCxrDataset, mscxr_training
from distill.data.phantom import PhantomDataset
from distill.data.records import RecordDataset
from distill.data.sample import ImageCaptionDataset, Region, Sample, image_key
from distill.data.tables import SPLIT_CODES
from distill.errors import UserError

__all__ = [
    "CocoDataset",
    "FolderDataset",
    "ImageCaptionDataset",
    "MimicDataset",
    "MsCxrDataset",
    "PhantomDataset",
    "RecordDataset",
    "Region",
    "Sample",
    "image_key",
    "load_dataset",
]


def load_dataset(config: DataConfig, split: Literal["train", "validation", "test"]) -> PhantomDataset | RecordDataset:
    """The data set of a configuration. Raises UserError with every fault of the data."""
    if split == "train" and config.kind in ("folder", "mimic", "coco"):
        train, test = (SPLIT_CODES.get(name, name) for name in (config.train_split, config.test_split))
        if train == test:
            raise UserError(
                f"data.train_split and data.test_split are both {train}: a test would see what was trained on"
            )
    if config.kind == "folder":
        return FolderDataset(config, split)
    if config.kind == "mimic":
        return MimicDataset(config, split)
    if config.kind == "mscxr":
        return mscxr_training(config) if split == "train" else MsCxrDataset(config, split)
    if config.kind == "coco":
        return CocoDataset(config, split)
    size = {"train": config.train_size, "validation": config.validation_size, "test": config.test_size}[split]
    return PhantomDataset(
        split, size, config.seed, config.resolution, config.phantom_captions, config.phantom_companions
    )
