"""Options of each kind of data. The reader of a kind is in distill/data/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distill.configuration import renamed as old
from distill.settings import HARMLESS, Count, Number, Probability, Seed, Settings, Text, Texts

Fit = Literal["crop", "letterbox"]


class Data(Settings):
    """What all kinds of data have."""

    resolution: Annotated[int, Field(ge=8, le=16384)] = 128
    """Side of the square training image, in pixels."""
    cache_dir: Annotated[Text | None, HARMLESS] = None
    """Where latents and text embeddings are cached. None uses checkpoints/.cache."""


class PhantomData(Data):
    """Procedural chest radiographs with exact masks, drawn from a seed."""

    renamed: ClassVar[dict[str, str]] = old.DATA
    kind: Literal["phantom"] = "phantom"
    """Images drawn from a seed (phantom), or read from files: folder, mimic (MIMIC-CXR-JPG), mscxr (MS-CXR), coco."""
    seed: Seed = 0
    """Which infinite data set is drawn."""
    train_size: Count = 4000
    """Images of the training split."""
    validation_size: Number = 500
    """Images of the validation split."""
    test_size: Count = 500
    """Images of the test split."""
    captions: Literal["reports", "affirmed", "stated", "labels"] = "reports"
    """reports state findings and negate others; affirmed negates none; stated has findings alone; labels is their
    names."""
    placement: Literal["anatomical", "balanced"] = "anatomical"
    """balanced: a finding lies on either side and in any zone equally often, so that its place alone tells little."""


class FileData(Data):
    """What all kinds that read files have."""

    kind: str
    root: Text | None = None
    """The folder that holds the images; names of files are relative to it."""
    fit: Fit = "crop"
    """How an image becomes a square: crop keeps the square of its short side at the centre; letterbox keeps all of it,
    between black bars. Take letterbox where what lies at the edges counts."""
    train_split: Text = "train"
    """Value of the split column for training."""
    test_split: Text = "test"
    """Value of the split column for evaluation; `all` evaluates every row and is refused where a model is trained.
    Rows of the validation split are called validation, val, valid or validate."""
    findings: Texts = ()
    """Findings to keep and evaluate. Empty keeps all that the files name."""
    query_words: dict[Text, Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=dict)
    """Finding -> the words that name it in a caption. Default: published lists for MS-CXR findings, else its own
    words."""
    allow_empty_captions: bool = False
    """Accept rows with an empty caption."""
    truncate_captions: bool = False
    """Cut captions that have more tokens than the text encoder takes. Otherwise they are refused."""
    horizontal_flip: bool = False
    """Mirror images at random in training, only those whose caption names no side."""
    balance_findings: Probability = 0.0
    """Draw images of rare findings more often in training. A finding that k images have weighs 1 / k to this power, and
    an image as much as its rarest finding. 0 draws all alike, 0.5 is usual; 1 draws findings that stand alone equally
    often."""


class FolderData(FileData):
    """A folder of images with metadata.csv or metadata.jsonl: one row an image, or one row a box.

    A column option that is `auto` reads the column of the documented name where there is one; `none` reads none.
    Without a column of splits, images are split by the hash of their patient, else of their name: 10 % test, 10 %
    validation, the rest train. Images of one patient and files of the same bytes stay together.
    """

    kind: Literal["folder"] = "folder"
    """Images drawn from a seed (phantom), or read from files: folder, mimic (MIMIC-CXR-JPG), mscxr (MS-CXR), coco."""
    metadata_file: Text = "metadata.csv"
    """metadata.csv or metadata.jsonl, in root."""
    image_column: Text = "file_name"
    """Path of the image, relative to root."""
    caption_column: Text = "text"
    """The caption."""
    split_column: Text = "auto"
    """Column of the split: train, test, and validation, val, valid or validate. auto: `split` where there is one; none: by a
    rule."""
    finding_column: Text = "auto"
    """Finding of the row's box, or a list of one finding for each box. auto: `finding` where there is one."""
    phrase_column: Text = "auto"
    """Short phrase that describes the row's box. auto: `phrase` where there is one."""
    box_column: Text = "auto"
    """Box as `x,y,w,h` in pixels of the image file, or a list of such boxes. auto: `bbox` where there is one."""
    mask_column: Text = "auto"
    """Path of a mask image (non-zero is inside), used in place of the box unless it is empty. auto: `mask`
    where there is one."""
    label_column: Text = "auto"
    """Findings of the whole image, joined by `|`. auto: `labels` where there is one, else the findings of its boxes."""
    patient_column: Text = "auto"
    """Patient of the image; no patient is in two splits. auto: `patient` where there is one."""


class MimicData(FileData):
    """MIMIC-CXR-JPG by the CSV of Dombrowski et al.: dicom_id, path, split, impression, Finding Labels."""

    kind: Literal["mimic"] = "mimic"
    """Images drawn from a seed (phantom), or read from files: folder, mimic (MIMIC-CXR-JPG), mscxr (MS-CXR), coco."""
    metadata_file: Text = "metadata.csv"
    """The CSV, in root."""


class MsCxrData(FileData):
    """MS-CXR: boxes and phrases for images of MIMIC-CXR-JPG."""

    kind: Literal["mscxr"] = "mscxr"
    """Images drawn from a seed (phantom), or read from files: folder, mimic (MIMIC-CXR-JPG), mscxr (MS-CXR), coco."""
    metadata_file: Text = "metadata.csv"
    """MS-CXR's JSON or CSV, or the CSV with bboxxywh."""
    split_column: Text = "none"
    """Column of the split. none puts every row in the test split."""
    mimic_file: Text | None = None
    """MIMIC metadata CSV: its impressions become captions, and its train_split is trained on."""
    caption_source: Literal["impression", "phrase"] = "impression"
    """A sample is an image with its impression, or a phrase with its boxes."""
    mentioned_only: bool = False
    """Keep only findings that the caption names by their query words."""


class CocoData(FileData):
    """COCO captions and instances."""

    kind: Literal["coco"] = "coco"
    """Images drawn from a seed (phantom), or read from files: folder, mimic (MIMIC-CXR-JPG), mscxr (MS-CXR), coco."""
    captions_file: Text = "annotations/captions_{split}2017.json"
    """Captions JSON, or a CSV with path, captions, split. {split} stands for train_split or test_split."""
    instances_file: Text | None = "annotations/instances_{split}2017.json"
    """Instances JSON. None reads captions only."""
    image_dir: Text = "{split}2017"
    """Folder of the file names in JSON. Paths in a CSV are relative to root."""


DataConfig = PhantomData | FolderData | MimicData | MsCxrData | CocoData
AnyData = Annotated[DataConfig, Field(discriminator="kind")]


def fit_of(data: DataConfig) -> Fit:
    """How its images become squares; drawn ones are."""
    return data.fit if isinstance(data, FileData) else "crop"
