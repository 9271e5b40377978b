"""The data set of a configuration."""

from __future__ import annotations

from typing import Literal

from distill.data.phantom.dataset import PhantomDataset
from distill.data.readers.coco import CocoDataset
from distill.data.readers.folder import FolderDataset
from distill.data.readers.mimic import MimicDataset, MsCxrDataset, mscxr_training
from distill.data.readers.records import RecordDataset
from distill.data.readers.tables import SPLIT_CODES
from distill.data_config import CocoData, DataConfig, FolderData, MimicData, MsCxrData
from distill.errors import UserError

Split = Literal["train", "validation", "test"]


def load_dataset(config: DataConfig, split: Split) -> PhantomDataset | RecordDataset:
    """The split of a data set. Raises UserError with every fault of the data."""
    if split == "train" and isinstance(config, (FolderData, MimicData, CocoData)):
        train, test = (SPLIT_CODES.get(name, name) for name in (config.train_split, config.test_split))
        if train == test:
            raise UserError(
                f"data.train_split and data.test_split are both {train}: a test would see what was trained on"
            )
    if isinstance(config, FolderData):
        return FolderDataset(config, split)
    if isinstance(config, MimicData):
        return MimicDataset(config, split)
    if isinstance(config, MsCxrData):
        return mscxr_training(config) if split == "train" else MsCxrDataset(config, split)
    if isinstance(config, CocoData):
        return CocoDataset(config, split)
    size = {"train": config.train_size, "validation": config.validation_size, "test": config.test_size}[split]
    return PhantomDataset(split, size, config.seed, config.resolution, config.captions, config.companions)
