"""What the readers of image files share: every file checked, centre square, regions, captions; one Sample for each.

A reader turns its format into ImageRecords and SampleRecords. They are kept in a `datasets.Dataset` each, in Arrow
memory that data loader processes share; several samples of one image share its record. Nothing is written.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from distill.data.readers.pixels import SLACK_PX, eight_bits, mask_of_file, open_image, segmentation_mask
from distill.data.readers.tables import Box, Faults, Place, did_you_mean, key, quote
from distill.data.sample import Region, Sample
from distill.data_config import FileData
from distill.errors import UserError, raise_all
from distill.tokens import find_words

CROP_RULE = "centre square of the short side, Lanczos, v1"
"""Part of every fingerprint: change it whenever the pixels of a row change."""

VALIDATION_SPLITS = ("validation", "val", "valid")

_FINDINGS_SHOWN = 8

_IMAGE_FEATURES = Features(
    {
        "name": Value("string"),
        "width": Value("int64"),
        "height": Value("int64"),
        "frame": [Value("int64")],
        "sha256": Value("string"),
        "findings": [Value("string")],
        "boxes": [[Value("float64")]],
        "masks": [Value("string")],
        "segmentations": [Value("large_string")],
        "phrases": [Value("string")],
    }
)
_SAMPLE_FEATURES = Features(
    {
        "id": Value("string"),
        "image": Value("int64"),
        "caption": Value("string"),
        "labels": [Value("string")],
        "regions": [Value("int64")],
    }
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Annotation:
    """One box, mask file or segmentation (JSON text, see pixels.check_segmentation) of a finding."""

    place: Place
    finding: str
    box: Box | None = None
    mask: Path | None = None
    segmentation: str | None = None
    phrase: str | None = None


@dataclass(slots=True)
class ImageRecord:
    """One image file. name: path relative to root. frame: (width, height) that boxes refer to and were checked against by
    the reader, None for the file's."""

    place: Place
    name: str
    path: Path
    frame: tuple[int, int] | None = None
    annotations: list[Annotation] = field(default_factory=list)


@dataclass(slots=True)
class SampleRecord:
    """One caption of one image. regions: positions in image.annotations of those that are its ground truth."""

    id: str
    image: ImageRecord
    caption: str
    labels: Sequence[str]
    regions: Sequence[int]


class RecordDataset:
    """ImageCaptionDataset of image files. All files are checked when it is made.

    Boxes and masks are those of the image as displayed, that is with its EXIF orientation applied. The centre square is
    cut out and resized to config.resolution; a box that the cut goes through is clipped, a region of which nothing is
    left is dropped.

    findings: names that regions may have.
    query_words: the words that name each finding in a caption.
    dropped_regions: regions of this split of which the cut or the resize left no pixel; segmentations count by their
    boxes.
    cut_captions: samples of this split whose caption is cut, known after check_captions.

    Raises UserError that lists `general`, `faults` and all faults of the files of `images` at once.
    """

    findings: tuple[str, ...]
    query_words: dict[str, tuple[str, ...]]
    dropped_regions: int
    cut_captions: int = 0

    def __init__(
        self,
        config: FileData,
        *,
        findings: Sequence[str],
        query_words: Mapping[str, tuple[str, ...]],
        images: Iterable[ImageRecord],
        samples: Sequence[SampleRecord],
        general: list[str],
        faults: Faults,
        about: str,
    ) -> None:
        self.config, self.root, self._about = config, data_root(config), about
        self.findings, self.query_words = tuple(findings), dict(query_words)
        images = list(images)
        inspected = _inspect_all(self.root.resolve(), images, faults)
        general = general + _normalized_boxes(images)
        listed = [f"{place}: {message}" for place, message in sorted(faults, key=lambda fault: fault[0])]
        raise_all(f"the data in '{config.root}' has faults", general + listed)
        if not samples:
            raise UserError(f"the data in '{config.root}' has no sample of this split")
        _warn_of_dark_images(inspected)

        canonical = {key(name): name for name in self.findings}
        for annotation in (annotation for record in images for annotation in record.annotations):
            annotation.finding = canonical.get(key(annotation.finding), annotation.finding)
        used = {id(sample.image): sample.image for sample in samples}
        places = {identity: place for place, identity in enumerate(used)}
        self._images = _image_table(list(used.values()), inspected)
        self._samples = _table(
            {
                "id": [sample.id for sample in samples],
                "image": [places[id(sample.image)] for sample in samples],
                "caption": [sample.caption for sample in samples],
                "labels": [list(dict.fromkeys(sample.labels)) for sample in samples],
                "regions": [list(sample.regions) for sample in samples],
            },
            _SAMPLE_FEATURES,
        )
        chosen: dict[int, set[int]] = {}
        for sample in (sample for sample in samples if sample.regions):
            chosen.setdefault(places[id(sample.image)], set()).update(sample.regions)

        def count(place: int) -> tuple[set[str], int]:
            row = self._images[place]
            left = self._regions(row, chosen[place], outlines=False)
            return {row["findings"][region] for region in chosen[place]}, len(left)

        with ThreadPoolExecutor() as pool:
            counted = list(pool.map(count, chosen))
        self._images_with = Counter(name for names, _ in counted for name in names)
        self.dropped_regions = self._images_with.total() - sum(left for _, left in counted)
        if self.dropped_regions:
            logger.warning(
                "%d of %d regions lie outside the centre square or are smaller than a pixel at %d px, and are dropped",
                self.dropped_regions,
                self._images_with.total(),
                config.resolution,
            )

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def summary(self) -> str:
        """One line: what was read, how the splits came about, and what is cut."""
        cut = [f"{self.cut_captions} of {len(self)} captions are cut"] if self.cut_captions else []
        more = len(self.findings) - _FINDINGS_SHOWN
        shown = ", ".join(self.findings[:_FINDINGS_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return "; ".join([self._about, *cut, f"findings: {shown or 'none'}"])

    def caption(self, index: int) -> str:
        returned: str = self._samples[index]["caption"]
        return returned

    def labels(self, index: int) -> tuple[str, ...]:
        return tuple(self._samples[index]["labels"])

    def image_key(self, index: int) -> str:
        """The image's path: what the samples of one image share."""
        returned: str = self._images[self._samples[index]["image"]]["name"]
        return returned

    def fingerprint(self, index: int) -> str:
        """Hash of the file's bytes as they were at the check, of the resolution and of the crop rule."""
        parts = (self._images[self._samples[index]["image"]]["sha256"], str(self.config.resolution), CROP_RULE)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def regions(self, index: int) -> tuple[Region, ...]:
        """Those of the sample; no image is decoded."""
        sample = self._samples[index]
        return self._regions(self._images[sample["image"]], sample["regions"])

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        row = self._images[sample["image"]]
        resolution = self.config.resolution
        path = self.root / row["name"]
        try:
            image = eight_bits(open_image(path.read_bytes()))
        except Exception as error:  # Pillow raises many types
            raise UserError(f"'{path}' could be read when the data was checked, and no longer: {error}") from error
        left, top, side = _centre_square(*image.size)
        square = image.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        pixels = torch.from_numpy(np.array(square, dtype=np.float32) / 127.5 - 1.0)
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
        scale = resolution / side
        return Sample(
            id=sample["id"],
            pixel_values=pixels.contiguous(),
            caption=sample["caption"],
            regions=self._regions(row, sample["regions"]),
            labels=tuple(sample["labels"]),
            original_size=(row["height"], row["width"]),
            crop_top_left=(round(top * scale), round(left * scale)),
        )

    def _regions(self, row: dict[str, Any], chosen: Collection[int], *, outlines: bool = True) -> tuple[Region, ...]:
        """One region a finding, in the order of `findings`; an annotation counts by its mask or segmentation, else by its
        box. Without `outlines` segmentations count by their boxes."""
        resolution = self.config.resolution
        left, top, side = _centre_square(row["width"], row["height"])
        scale = resolution / side
        frame_width, frame_height = row["frame"]
        # Pixels of the file in a pixel of the frame.
        across, down = row["width"] / frame_width, row["height"] / frame_height
        there = {row["findings"][place] for place in chosen}
        regions = []
        for finding in (name for name in self.findings if name in there):
            mask = np.zeros((resolution, resolution), dtype=bool)
            whole: NDArray[np.bool_] | None = None
            boxes: list[Box] = []
            phrases: dict[str, None] = {}
            drawn: set[str] = set()
            for place in (place for place in chosen if row["findings"][place] == finding):
                box, mask_name, outline = (row[column][place] for column in ("boxes", "masks", "segmentations"))
                if row["phrases"][place]:
                    phrases[row["phrases"][place]] = None
                inside = np.zeros_like(mask)
                if box:
                    x, y, width, height = box
                    corners = (
                        x * across - left,
                        y * down - top,
                        (x + width) * across - left,
                        (y + height) * down - top,
                    )
                    x0, y0, x1, y1 = (min(max(value * scale, 0.0), float(resolution)) for value in corners)
                    # A pixel is inside if its centre is.
                    inside[math.ceil(y0 - 0.5) : math.ceil(y1 - 0.5), math.ceil(x0 - 0.5) : math.ceil(x1 - 0.5)] = True
                    if inside.any():
                        boxes.append((x0, y0, x1 - x0, y1 - y0))
                if mask_name is not None:
                    if mask_name not in drawn:
                        drawn.add(mask_name)
                        mask |= _cut(mask_of_file(Path(mask_name)), (left, top, left + side, top + side), resolution)
                elif outline is not None and outlines:
                    # Instances that touch share pixels at their border: they are united before the resize.
                    part = segmentation_mask(outline, frame_width, frame_height)
                    whole = part if whole is None else whole | part
                else:
                    mask |= inside
            if whole is not None:
                corners = (left / across, top / down, (left + side) / across, (top + side) / down)
                mask |= _cut(whole, corners, resolution)
            if mask.any():
                regions.append(Region(finding, torch.from_numpy(mask), tuple(boxes), ". ".join(phrases) or None))
        return tuple(regions)

    def check_captions(self, tokenizers: Sequence[PreTrainedTokenizerBase], max_length: int) -> None:
        """Raise UserError if a caption of this split has more than max_length tokens (BOS and EOS included) by any of
        `tokenizers`, unless config.truncate_captions."""
        captions = self._captions()
        lengths = [0] * len(captions)
        for tokenizer in tokenizers:
            encoded = tokenizer(captions, verbose=False)["input_ids"]
            lengths = [max(length, len(ids)) for length, ids in zip(lengths, encoded, strict=True)]
        too_long = sum(length > max_length for length in lengths)
        if self.config.truncate_captions:
            cut = {caption for caption, length in zip(captions, lengths, strict=True) if length > max_length}
            self.cut_captions = sum(caption in cut for caption in self._samples.data.column("caption").to_pylist())
        elif too_long:
            longest = max(range(len(captions)), key=lengths.__getitem__)
            raise UserError(
                f"{too_long} of {len(captions)} captions in '{self.config.root}' have more tokens than the text "
                f"encoder takes, {max_length}; the longest has {lengths[longest]}:\n  {captions[longest]}\n"
                "Shorten them, or set data.truncate_captions true to cut them"
            )

    def check_queries(self) -> None:
        """Raise UserError if a finding that has regions in this split is named by no caption of it: its word map would
        be of nothing."""
        captions = self._captions()
        faults = []
        for finding in (name for name in self.findings if self._images_with[name]):
            words = self.query_words[finding]
            if not any(find_words(caption, words) for caption in captions):
                faults.append(
                    f"'{finding}' ({self._images_with[finding]} images): no caption has any of {', '.join(words)}; "
                    f"a caption is '{quote(captions[0])}'"
                )
        raise_all(
            "findings that no caption names; set data.query_words to the words that do, or leave them out of "
            "data.findings",
            faults,
        )

    def _captions(self) -> list[str]:
        """Distinct captions, in order."""
        return list(dict.fromkeys(self._samples.data.column("caption").to_pylist()))


def _table(columns: dict[str, list[Any]], features: Features) -> Dataset:
    # Dataset.from_dict looks at every value in Python, which takes longer than all else that is done to a row.
    return Dataset(InMemoryTable.from_pydict(columns, schema=features.arrow_schema))


def data_root(config: FileData) -> Path:
    """The folder that config.root names. Raises UserError if there is none."""
    if config.root is None:
        raise UserError(f"data.root is missing; data.kind {config.kind} needs the folder that holds the data")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root '{config.root}' is not a folder")
    return root


def choose_findings(
    config: FileData, default: Iterable[str], known: Iterable[str], where: str
) -> tuple[tuple[str, ...], list[str]]:
    """config.findings, or `default`; and the faults of config.findings and config.query_words.

    known: every name that config.findings may hold. where: the place that has them, for the message.
    """
    there = {key(name): name for name in known}
    faults = [
        f"data.findings '{name}' is in no {where}{did_you_mean(name, there.values())}; there are: "
        f"{', '.join(sorted(there.values())) or 'none'}"
        for name in config.findings
        if key(name) not in there
    ]
    findings = config.findings or tuple(default)
    possible = {**there, **{key(name): name for name in findings}}
    for name, words in config.query_words.items():
        if key(name) not in possible:
            faults.append(f"data.query_words '{name}' is not a finding{did_you_mean(name, possible.values())}")
        elif not any(word.strip() for word in words):
            faults.append(f"data.query_words '{name}' has no words")
    return findings, faults


def path_under(name: str, column: str, *, folder: str = "") -> str:
    """`folder`/`name` without `.` and `..`, with `/`; both are relative to root. Links are looked at with the file.

    Raises ValueError if it leaves root.
    """
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or path.split(os.sep)[0] == ".." or path == ".":
        raise ValueError(f"{column} '{quote(name)}' leaves the data folder; right is a path relative to it")
    return path.replace(os.sep, "/")


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inspection:
    """What is known of an image file once it was decoded; width and height as displayed."""

    width: int = 0
    height: int = 0
    sha256: str = ""
    low_range: bool = False
    fault: str | None = None


def _inspect_all(root: Path, records: list[ImageRecord], faults: Faults) -> dict[Path, _Inspection]:
    """Decode every image and mask, and compare boxes, frames and masks with their images."""
    masks = (annotation.mask for record in records for annotation in record.annotations if annotation.mask)
    paths = list(dict.fromkeys([*(record.path for record in records), *masks]))
    inspected = _inspect_files(root, paths)
    for record in records:
        image = inspected[record.path]
        if image.fault:
            faults.append((record.place, f"image '{record.name}' {image.fault}"))
        elif record.frame is not None and not _same_aspect(record.frame, (image.width, image.height)):
            faults.append(
                (
                    record.place,
                    f"image '{record.name}' has {image.width} x {image.height} px and its boxes and masks are of "
                    f"{record.frame[0]} x {record.frame[1]}, another aspect; right is the image that was annotated, or "
                    "that image resized",
                )
            )
        told: set[Path] = set()
        for annotation in record.annotations:
            if annotation.box and record.frame is None and not image.fault:
                try:
                    check_inside(annotation.box, record.name, (image.width, image.height), "as displayed")
                except ValueError as error:
                    faults.append((annotation.place, str(error)))
            if annotation.mask and annotation.mask not in told:
                told.add(annotation.mask)
                fault = _mask_fault(annotation.mask, inspected[annotation.mask], image)
                if fault:
                    faults.append((annotation.place, f"mask '{annotation.mask.relative_to(root).as_posix()}' {fault}"))
    return inspected


def file_hashes(root: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each image file under `root`, empty for a file that cannot be read. The check of the files reuses the work."""
    distinct = list(dict.fromkeys(paths))
    return {path: inspection.sha256 for path, inspection in _inspect_files(root, distinct).items()}


def _inspect_files(root: Path, paths: list[Path]) -> dict[Path, _Inspection]:
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(lambda path: _inspect_file(root, path), paths), total=len(paths), desc="checking images",
            unit="file", delay=1.0, dynamic_ncols=True, disable=os.environ.get("LOCAL_RANK", "0") != "0",
        )  # fmt: skip
        return dict(zip(paths, bar, strict=True))


def _normalized_boxes(records: list[ImageRecord]) -> list[str]:
    """The fault of boxes that are shares of the image, all of which would be smaller than a pixel."""
    boxes = [(a.place, a.box) for record in records for a in record.annotations if a.box]
    if not boxes or not all(0 <= value <= 1 for _, box in boxes for value in box):
        return []
    place, box = boxes[0]
    return [
        f"boxes look normalized: all values of all {len(boxes)} boxes are from 0 to 1, such as "
        f"{','.join(f'{value:g}' for value in box)} ({place}); right is x,y,width,height in pixels: multiply x and width by "
        "the image's width, y and height by its height"
    ]


def check_inside(box: Box, name: str, sides: tuple[int, int], how: str) -> None:
    """Raise ValueError if the box is not within the `sides` (width, height) of image `name`, but for SLACK_PX."""
    x, y, width, height = box
    if min(x, y) < -SLACK_PX or x + width > sides[0] + SLACK_PX or y + height > sides[1] + SLACK_PX:
        shown = ",".join(f"{value:g}" for value in box)
        raise ValueError(
            f"box {shown} is outside the image '{name}' of {sides[0]} x {sides[1]} px ({how}); right is "
            "x,y,width,height within it"
        )


def _same_aspect(frame: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether `size` is `frame` times one factor, with both sides rounded or cut to whole pixels."""
    return abs(size[0] * frame[1] - size[1] * frame[0]) <= max(frame)


def _mask_fault(path: Path, mask: _Inspection, image: _Inspection) -> str | None:
    if mask.fault:
        return mask.fault
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return "is a JPEG, whose noise is non-zero outside the region; save it as PNG"
    if not image.fault and (mask.width, mask.height) != (image.width, image.height):
        return f"has {mask.width} x {mask.height} px and its image {image.width} x {image.height}"
    return None


def _inspect_file(root: Path, path: Path) -> _Inspection:
    try:
        status = path.stat()
        if not path.resolve().is_relative_to(root):
            return _Inspection(fault="is a link that leaves the data folder")
        if not path.is_file():
            return _Inspection(fault="is not a file")
        return _inspect(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        return _Inspection(fault=f"cannot be opened: {error.strerror}")


@cache
def _inspect(path: Path, size_bytes: int, mtime_ns: int) -> _Inspection:
    """Decode the whole file. Kept by size and time of change, so that several splits decode each file once."""
    data = path.read_bytes()
    try:
        image = open_image(data)
        low_range = image.mode.startswith("I") and int(np.asarray(image).max()) < 4096
        eight_bits(image)
    except UnidentifiedImageError:
        return _Inspection(fault=f"is no image that can be read ({size_bytes} bytes)")
    except Exception as error:  # Pillow raises many types on broken files
        return _Inspection(fault=f"cannot be decoded: {error}")
    return _Inspection(image.width, image.height, hashlib.sha256(data).hexdigest(), low_range)


def _warn_of_dark_images(inspected: dict[Path, _Inspection]) -> None:
    dark = [path.name for path, image in inspected.items() if image.low_range]
    if dark:
        logger.warning(
            "%d 16-bit images have no value above 4095 of 65535 and will be almost black (such as '%s'): "
            "stretch them to 16 bits",
            len(dark),
            dark[0],
        )


def _image_table(records: list[ImageRecord], inspected: Mapping[Path, _Inspection]) -> Dataset:
    images = [inspected[record.path] for record in records]
    frames = [record.frame or (image.width, image.height) for record, image in zip(records, images, strict=True)]
    columns: dict[str, list[Any]] = {
        "name": [record.name for record in records],
        "width": [image.width for image in images],
        "height": [image.height for image in images],
        "frame": frames,
        "sha256": [image.sha256 for image in images],
        "boxes": [
            [_clip_box(a.box, *frame) if a.box else [] for a in record.annotations]
            for record, frame in zip(records, frames, strict=True)
        ],
        "masks": [[str(a.mask) if a.mask else None for a in record.annotations] for record in records],
    }
    for name, attribute in (("findings", "finding"), ("segmentations", "segmentation"), ("phrases", "phrase")):
        columns[name] = [[getattr(a, attribute) for a in record.annotations] for record in records]
    return _table(columns, _IMAGE_FEATURES)


# --- geometry -----------------------------------------------------------------------------------------------------


def _centre_square(width: int, height: int) -> tuple[float, float, int]:
    """Left, top and side of the square that is kept, in pixels of the image."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side


def _cut(mask: NDArray[np.bool_], corners: tuple[float, ...], resolution: int) -> NDArray[np.bool_]:
    """(resolution, resolution) of `mask` from left, top to right, bottom: where at least half of a pixel is inside."""
    whole = Image.fromarray(mask.astype(np.uint8) * 255)
    left, top, right, bottom = corners
    box = (left, top, min(right, whole.width), min(bottom, whole.height))  # a quotient may round up
    return np.asarray(whole.resize((resolution, resolution), Image.Resampling.BOX, box=box)) >= 128


def _clip_box(box: Box, width: int, height: int) -> Box:
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return x0, y0, x1 - x0, y1 - y0
