"""What the readers of image files share: every file checked, centre square, regions, captions; one Sample for each.

A reader turns its format into ImageRecords and SampleRecords. They are kept in an Arrow table each, in
memory that data loader processes share; several samples of one image share its record. Nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image

from distill.data.readers.inspection import ImageRecord, Inspection, inspect_all, normalized_boxes
from distill.data.readers.pixels import eight_bits, open_image
from distill.data.readers.regions import Square, clip_box, placed, regions_of
from distill.data.readers.splits import Member, Split
from distill.data.readers.tables import Box, Faults, did_you_mean, key, quote
from distill.data.sample import Region, Sample
from distill.data_config import FileData, Fit
from distill.errors import UserError, raise_all
from distill.tokens import ReadsText, find_words

FIT_RULES: dict[Fit, str] = {
    "crop": "centre square of the short side, Lanczos, v1",
    "letterbox": "whole image on black, Lanczos, v1",
}
"""Part of every fingerprint: change it whenever the pixels of a row change."""

_SHOWN = 8

_TEXT, _WHOLE = pyarrow.string(), pyarrow.int64()
_IMAGE_SCHEMA = pyarrow.schema(
    {
        "place": _TEXT,
        "name": _TEXT,
        "width": _WHOLE,
        "height": _WHOLE,
        "frame": pyarrow.list_(_WHOLE),
        "sha256": _TEXT,
        "findings": pyarrow.list_(_TEXT),
        "boxes": pyarrow.list_(pyarrow.list_(pyarrow.float64())),
        "masks": pyarrow.list_(_TEXT),
        "segmentations": pyarrow.list_(pyarrow.large_string()),
        "phrases": pyarrow.list_(_TEXT),
        "patient": _TEXT,
    }
)
_SAMPLE_SCHEMA = pyarrow.schema(
    {
        "id": _TEXT,
        "image": _WHOLE,
        "caption": _TEXT,
        "labels": pyarrow.list_(_TEXT),
        "regions": pyarrow.list_(_WHOLE),
    }
)

logger = logging.getLogger(__name__)


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

    Boxes and masks are those of the image as displayed, that is with its EXIF orientation applied. The square that
    config.fit makes of it is resized to config.resolution; a box that a cut goes through is clipped, a region of which
    nothing is left is dropped.

    findings: names that regions may have.
    query_words: the words that name each finding in a caption.
    split: which split of the files this is. Held-out images are in the order of the hashes of their files.
    no_regions: what gives the images boxes or masks, where they have none.
    dropped_regions: regions of this split of which the cut or the resize left no pixel; segmentations count by their
    boxes.

    Raises UserError that lists `general`, `faults` and all faults of the files of `images` at once.
    """

    findings: tuple[str, ...]
    query_words: dict[str, tuple[str, ...]]
    dropped_regions: int
    _cut: str = ""

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
        split: Split,
        no_regions: str,
    ) -> None:
        self.config, self.root, self.split, self._about = config, data_root(config), split, about
        self.findings, self.query_words, self.no_regions = tuple(findings), dict(query_words), no_regions
        images = list(images)
        inspected = inspect_all(self.root.resolve(), images, faults)
        general = general + normalized_boxes(images)
        listed = [f"{place}: {message}" for place, message in sorted(faults, key=lambda fault: fault[0])]
        raise_all(f"the data in '{config.root}' has faults", general + listed)
        if not samples:
            raise UserError(f"the data in '{config.root}' has no sample of this split")
        if split != "train":
            # Files are often sorted by source or finding, and the first images of a split stand for all of it.
            samples = sorted(samples, key=lambda sample: inspected[sample.image.path].sha256)

        canonical = {key(name): name for name in self.findings}
        for annotation in (annotation for record in images for annotation in record.annotations):
            annotation.finding = canonical.get(key(annotation.finding), annotation.finding)
        used = {id(sample.image): sample.image for sample in samples}
        _warn_of_dark_images([record for record in used.values() if inspected[record.path].low_range])
        _leave_out_empty_masks(list(used.values()), samples, inspected)
        places = {identity: place for place, identity in enumerate(used)}
        self._images = _image_table(list(used.values()), inspected)
        self._samples = _Rows(
            {
                "id": [sample.id for sample in samples],
                "image": [places[id(sample.image)] for sample in samples],
                "caption": [sample.caption for sample in samples],
                "labels": [
                    list(dict.fromkeys(canonical.get(key(name), name) for name in sample.labels)) for sample in samples
                ],
                "regions": [list(sample.regions) for sample in samples],
            },
            _SAMPLE_SCHEMA,
        )
        chosen: dict[int, set[int]] = {}
        for sample in (sample for sample in samples if sample.regions):
            chosen.setdefault(places[id(sample.image)], set()).update(sample.regions)
        masks = {a.mask for image in used.values() for a in image.annotations if a.mask}
        extents = {str(mask): found for mask in masks if (found := inspected[mask].extent)}
        self._count_regions(chosen, extents)

    def _count_regions(self, chosen: Mapping[int, set[int]], extents: Mapping[str, Box]) -> None:
        """Count the regions of each finding, and warn of those that are cut, or of which no pixel is left.

        chosen: image -> annotations. extents: file of a mask -> the box around it.
        """
        resolution, fit = self.config.resolution, self.config.fit

        def count(place: int) -> tuple[Counter[str], list[str], list[str]]:
            row = self._images[place]
            left = regions_of(row, chosen[place], self.findings, resolution, fit, outlines=False)
            square = Square.of(row, resolution, fit)
            kinds = Counter(kind for i in chosen[place] for kind in ("boxes", "masks", "segmentations") if row[kind][i])
            around = (extents.get(row["masks"][i]) or row["boxes"][i] for i in chosen[place])
            kinds["cut"] = sum(square.cuts(box) for box in around if box)
            names = list(dict.fromkeys(row["findings"][i] for i in chosen[place]))
            there = {region.finding for region in left}
            return kinds, names, [f"'{quote(name)}' in '{quote(row['name'])}'" for name in names if name not in there]

        with ThreadPoolExecutor() as pool:
            counted = list(pool.map(count, chosen))
        self._kinds = sum((kinds for kinds, _, _ in counted), Counter())
        self._images_with = Counter(name for _, names, _ in counted for name in names)
        dropped = [name for _, _, names in counted for name in names]
        self.dropped_regions = len(dropped)
        cut = self._kinds.pop("cut", 0)
        if cut:
            logger.warning(
                "%s: the centre crop cuts off %d of %d boxes and masks, in part or whole; data.fit letterbox keeps "
                "them",
                self.split,
                cut,
                sum(map(len, chosen.values())),
            )
        if dropped:
            logger.warning(
                "%d of %d regions %s smaller than a pixel at %d px, and are dropped: %s",
                len(dropped),
                self._images_with.total(),
                "lie outside the centre square or are" if fit == "crop" else "are",
                resolution,
                _some(dropped),
            )

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def summary(self) -> str:
        """One line: what was read, how the splits came about, the findings, and `counts`."""
        return f"{self._about}; findings: {_some(self.findings) or 'none'}; {self.counts}"

    @property
    def counts(self) -> str:
        """What this split holds, and, after check_captions, how many captions are cut."""
        kinds = [
            f"{self._kinds[kind]:,} {name}"
            for kind, name in (("boxes", "boxes"), ("masks", "masks"), ("segmentations", "outlines"))
            if self._kinds[kind]
        ]
        regions = ", ".join(kinds) or f"no boxes or masks ({self.no_regions})"
        parts = [f"{self.split}: {len(self):,} captions of {len(self._images):,} images", regions, self._cut]
        return ", ".join(part for part in parts if part)

    def members(self) -> list[Member]:
        """The images as the check of splits sees them; their patients are not known here."""
        columns = (self._images.table.column(name).to_pylist() for name in ("place", "name", "sha256"))
        return [Member(place, name, self.split, "", sha256) for place, name, sha256 in zip(*columns, strict=True)]

    def caption(self, index: int) -> str:
        returned: str = self._samples[index]["caption"]
        return returned

    def labels(self, index: int) -> tuple[str, ...]:
        return tuple(self._samples[index]["labels"])

    def image_key(self, index: int) -> str:
        """The image's path: what the samples of one image share."""
        returned: str = self._images[self._samples[index]["image"]]["name"]
        return returned

    def patient(self, index: int) -> str:
        """Whose image it is, empty where the files do not say."""
        returned: str = self._images[self._samples[index]["image"]]["patient"]
        return returned

    def fingerprint(self, index: int) -> str:
        """Hash of the file's bytes as they were at the check, of the resolution and of the rule of config.fit."""
        rule = FIT_RULES[self.config.fit]
        parts = (self._images[self._samples[index]["image"]]["sha256"], str(self.config.resolution), rule)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def region_fingerprint(self, index: int) -> str:
        """Hash of the sample's boxes, phrases and outlines, and of the bytes of its mask files."""
        sample = self._samples[index]
        row = self._images[sample["image"]]
        columns = ("findings", "boxes", "segmentations", "phrases")
        parts = [[row[column][place] for column in columns] for place in sample["regions"]]
        masks = [row["masks"][place] for place in sample["regions"]]
        hashes = [hashlib.sha256(Path(name).read_bytes()).hexdigest() if name else None for name in masks]
        return hashlib.sha256(json.dumps([self.fingerprint(index), row["frame"], parts, hashes]).encode()).hexdigest()

    def regions(self, index: int) -> tuple[Region, ...]:
        """Those of the sample; no image is decoded."""
        sample = self._samples[index]
        row = self._images[sample["image"]]
        return regions_of(row, sample["regions"], self.findings, self.config.resolution, self.config.fit)

    def size_ids(self, index: int) -> tuple[int, ...]:
        """Those of the sample; no image is decoded."""
        row = self._images[self._samples[index]["image"]]
        return (
            row["height"],
            row["width"],
            *self._crop_corner(row["width"], row["height"]),
            *(self.config.resolution,) * 2,
        )

    def _crop_corner(self, width: int, height: int) -> tuple[int, int]:
        """(top, left) of the crop in the resized image; nothing of a letterboxed one is cropped."""
        left, top, right, _ = placed(width, height, self.config.resolution, self.config.fit).kept
        scale = self.config.resolution / (right - left)
        return round(top * scale), round(left * scale)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        row = self._images[sample["image"]]
        resolution = self.config.resolution
        path = self.root / row["name"]
        try:
            image = eight_bits(open_image(path.read_bytes()))
        except Exception as error:  # Pillow raises many types
            raise UserError(f"'{path}' could be read when the data was checked, and no longer: {error}") from error
        return Sample(
            id=sample["id"],
            pixel_values=square_pixels(image, resolution, self.config.fit),
            caption=sample["caption"],
            regions=regions_of(row, sample["regions"], self.findings, resolution, self.config.fit),
            labels=tuple(sample["labels"]),
            original_size=(row["height"], row["width"]),
            crop_top_left=self._crop_corner(*image.size),
            square_px=(max if self.config.fit == "letterbox" else min)(image.size),
        )

    def check_captions(self, model: ReadsText) -> None:
        """Raise UserError if a caption of this split is longer than `model` reads, unless config.truncate_captions."""
        captions, max_length = self._captions(), model.longest_caption
        lengths = model.caption_lengths(captions)
        long = {caption for caption, length in zip(captions, lengths, strict=True) if length > max_length}
        if not long:
            return
        if not self.config.truncate_captions:
            longest = max(range(len(captions)), key=lengths.__getitem__)
            raise UserError(
                f"{len(long)} of {len(captions)} captions in '{self.config.root}' have more tokens than the text "
                f"encoder takes, {max_length}; the longest has {lengths[longest]}:\n  {quote(captions[longest])}\n"
                "Shorten them, raise base.caption_chunks, or set data.truncate_captions true to cut them"
            )
        cut = sum(caption in long for caption in self._samples.table.column("caption").to_pylist())
        self._cut = (
            f"{cut:,} of {len(self):,} captions are cut at the {max_length} tokens that the text encoder reads (the "
            f"longest has {max(lengths)}; base.caption_chunks reads more)"
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
            "findings that no caption names; set data.query_words to the words that do, leave them out of "
            "data.findings, or set evaluation.localization_text phrase, which records the maps for a box's phrase, "
            "else its finding's name",
            faults,
        )

    def _captions(self) -> list[str]:
        """Distinct captions, in order."""
        return list(dict.fromkeys(self._samples.table.column("caption").to_pylist()))


def square_pixels(image: Image.Image, resolution: int, fit: Fit) -> torch.Tensor:
    """The square of an image of mode L or RGB, (3, resolution, resolution) float32 in [-1, 1]; bars of a letterbox are
    -1."""
    shown = placed(*image.size, resolution, fit)
    square = Image.new(image.mode, (resolution, resolution))
    resized = image.resize((shown.width, shown.height), Image.Resampling.LANCZOS, box=shown.kept)
    square.paste(resized, (shown.left, shown.top))
    pixels = torch.from_numpy(np.array(square, dtype=np.float32) / 127.5 - 1.0)
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
    return pixels.contiguous()


class _Rows:
    """Rows of an Arrow table."""

    def __init__(self, columns: dict[str, list[object]], schema: pyarrow.Schema) -> None:
        self.table = pyarrow.Table.from_pydict(columns, schema=schema)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(index, 1).to_pylist()[0]
        return row


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
    for name in config.query_words:
        if key(name) not in possible:
            faults.append(f"data.query_words '{name}' is not a finding{did_you_mean(name, possible.values())}")
    return findings, faults


def path_under(name: str, column: str, *, folder: str = "") -> str:
    """`folder`/`name` without `.` and `..`, with `/`; both are relative to root. Links are looked at with the file.

    Raises ValueError if it leaves root.
    """
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or path.split(os.sep)[0] == ".." or path == ".":
        raise ValueError(f"{column} '{quote(name)}' leaves the data folder; right is a path relative to it")
    return path.replace(os.sep, "/")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(map(quote, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _warn_of_dark_images(dark: Sequence[ImageRecord]) -> None:
    if dark:
        logger.warning(
            "%d 16-bit images have no value above 4095 of 65535 and will be almost black (such as '%s'): "
            "stretch them to 16 bits",
            len(dark),
            quote(dark[0].name),
        )


def _leave_out_empty_masks(
    images: Sequence[ImageRecord], samples: Sequence[SampleRecord], inspected: Mapping[Path, Inspection]
) -> None:
    """Take boxes in place of masks that hold nothing, and leave out regions that have no box."""
    emptied: list[str] = []
    for annotation in (annotation for image in images for annotation in image.annotations):
        if annotation.mask and not inspected[annotation.mask].extent:
            left = "its box counts" if annotation.box else "its region is left out"
            emptied.append(f"'{quote(annotation.mask.name)}' ({annotation.place}, {left})")
            annotation.mask = None
    if not emptied:
        return
    logger.warning("%d masks hold nothing, all their pixels are 0: %s", len(emptied), _some(emptied))
    for sample in samples:
        annotations = sample.image.annotations
        sample.regions = [
            n for n in sample.regions if annotations[n].box or annotations[n].mask or annotations[n].segmentation
        ]


def _image_table(records: list[ImageRecord], inspected: Mapping[Path, Inspection]) -> _Rows:
    images = [inspected[record.path] for record in records]
    frames = [record.frame or (image.width, image.height) for record, image in zip(records, images, strict=True)]
    columns: dict[str, list[Any]] = {
        "place": [str(record.place) for record in records],
        "name": [record.name for record in records],
        "patient": [record.patient for record in records],
        "width": [image.width for image in images],
        "height": [image.height for image in images],
        "frame": frames,
        "sha256": [image.sha256 for image in images],
        "boxes": [
            [clip_box(a.box, *frame) if a.box else [] for a in record.annotations]
            for record, frame in zip(records, frames, strict=True)
        ],
        "masks": [[str(a.mask) if a.mask else None for a in record.annotations] for record in records],
    }
    for name, attribute in (("findings", "finding"), ("segmentations", "segmentation"), ("phrases", "phrase")):
        columns[name] = [[getattr(a, attribute) for a in record.annotations] for record in records]
    return _Rows(columns, _IMAGE_SCHEMA)
