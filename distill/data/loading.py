"""The data set of a configuration."""

from __future__ import annotations

from distill.data.phantom.dataset import PhantomDataset
from distill.data.readers.coco import CocoDataset
from distill.data.readers.folder import FolderDataset
from distill.data.readers.mimic import MimicDataset, MsCxrDataset, mscxr_training
from distill.data.readers.records import RecordDataset
from distill.data.readers.splits import Split, refuse_shared
from distill.data.readers.tables import SPLIT_CODES, VALIDATION_SPLITS
from distill.data_config import CocoData, DataConfig, FileData, FolderData, MimicData, MsCxrData
from distill.errors import UserError


def load_dataset(config: DataConfig, split: Split) -> PhantomDataset | RecordDataset:
    """The split of a data set. Raises UserError with every fault of the data."""
    if split == "train" and isinstance(config, (FolderData, MimicData, CocoData)):
        train, test = (SPLIT_CODES.get(name, name) for name in (config.train_split, config.test_split))
        if train == test:
            raise UserError(
                f"data.train_split and data.test_split are both {train}: a test would see what was trained on"
            )
    if split == "validation" and isinstance(config, FileData):
        test = SPLIT_CODES.get(config.test_split, config.test_split)
        if test in VALIDATION_SPLITS:
            raise UserError(
                f"data.test_split is {test}, which is also the validation split ({', '.join(VALIDATION_SPLITS)}): "
                "what is chosen on it would be tested on it; name another test split"
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
    return PhantomDataset(split, size, config.seed, config.resolution, config.captions, config.placement)


def refuse_shared_pictures(*splits: PhantomDataset | RecordDataset | None) -> None:
    """Raise UserError if files of the same bytes are in two of the `splits`."""
    members = [member for dataset in splits if isinstance(dataset, RecordDataset) for member in dataset.members()]
    refuse_shared(
        members,
        "the data has a picture in two splits: a test would see what was trained on",
        "Leave the picture out of all splits but one",
    )
