"""Every image and mask file decoded once, before anything else, and compared with what the rows say of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm

from distill.data.readers.pixels import (
    FORMATS_SHOWN,
    ONE_COLOUR,
    SLACK_PX,
    check_range,
    is_one_colour,
    mask_values,
    open_image,
)
from distill.data.readers.tables import Box, Faults, Place, quote
from distill.errors import UserError

_SMALLEST_PX = 8
"""Side of a picture, of which a VAE makes one latent pixel."""
_LARGEST_SHRINK = 64
"""How many times larger than its file the image may be that was annotated."""


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
    """One image file. name: path relative to root. frame: (width, height) that boxes refer to and were checked against
    by the reader, None for the file's. patient: empty where unknown."""

    place: Place
    name: str
    path: Path
    frame: tuple[int, int] | None = None
    annotations: list[Annotation] = field(default_factory=list)
    patient: str = ""


@dataclass(frozen=True)
class Inspection:
    """What is known of a file once it was decoded. width, height: as displayed. extent: the box around what a mask of
    these pixels holds, None if it holds nothing."""

    width: int = 0
    height: int = 0
    sha256: str = ""
    low_range: bool = False
    extent: Box | None = None
    format: str | None = None
    fault: str | None = None
    one_colour: bool = False


def inspect_all(root: Path, records: list[ImageRecord], faults: Faults) -> dict[Path, Inspection]:
    """Decode every image and mask, and compare boxes, frames and masks with their images."""
    masks = (annotation.mask for record in records for annotation in record.annotations if annotation.mask)
    paths = list(dict.fromkeys([*(record.path for record in records), *masks]))
    inspected = _inspect_files(root, paths)
    for record in records:
        image = inspected[record.path]
        fault = image.fault or _frame_fault(record.frame, (image.width, image.height))
        fault = fault or (ONE_COLOUR if image.one_colour else None)
        if fault:
            faults.append((record.place, f"image '{quote(record.name)}' {fault}"))
        told: set[Path] = set()
        for annotation in record.annotations:
            if annotation.box and record.frame is None and not image.fault:
                try:
                    check_inside(annotation.box, record.name, (image.width, image.height), "as displayed")
                except ValueError as error:
                    faults.append((annotation.place, str(error)))
            if annotation.mask and annotation.mask not in told:
                told.add(annotation.mask)
                fault = _mask_fault(inspected[annotation.mask], image)
                if fault:
                    faults.append(
                        (annotation.place, f"mask '{quote(annotation.mask.relative_to(root).as_posix())}' {fault}")
                    )
    return inspected


def file_hashes(root: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each image file under `root`, empty for a file that cannot be read. The check of the files reuses the
    work."""
    distinct = list(dict.fromkeys(paths))
    return {path: inspection.sha256 for path, inspection in _inspect_files(root, distinct).items()}


def _inspect_files(root: Path, paths: list[Path]) -> dict[Path, Inspection]:
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(lambda path: _inspect_file(root, path), paths), total=len(paths), desc="checking images",
            unit="file", delay=1.0, dynamic_ncols=True, disable=os.environ.get("LOCAL_RANK", "0") != "0",
        )  # fmt: skip
        return dict(zip(paths, bar, strict=True))


def normalized_boxes(records: list[ImageRecord]) -> list[str]:
    """The fault of boxes that are shares of the image, all of which would be smaller than a pixel."""
    boxes = [(a.place, a.box) for record in records for a in record.annotations if a.box]
    if not boxes or not all(0 <= value <= 1 for _, box in boxes for value in box):
        return []
    place, box = boxes[0]
    return [
        f"boxes look normalized: all values of all {len(boxes)} boxes are from 0 to 1, such as "
        f"{','.join(f'{value:g}' for value in box)} ({place}); right is x,y,width,height in pixels: multiply x and "
        "width by the image's width, y and height by its height"
    ]


def check_inside(box: Box, name: str, sides: tuple[int, int], how: str) -> None:
    """Raise ValueError if the box is not within the `sides` (width, height) of image `name`, but for SLACK_PX."""
    x, y, width, height = box
    if min(x, y) < -SLACK_PX or x + width > sides[0] + SLACK_PX or y + height > sides[1] + SLACK_PX:
        shown = ",".join(f"{value:g}" for value in box)
        raise ValueError(
            f"box {shown} is outside the image '{quote(name)}' of {sides[0]} x {sides[1]} px ({how}); right is "
            "x,y,width,height within it"
        )


def _frame_fault(frame: tuple[int, int] | None, size: tuple[int, int]) -> str | None:
    if frame is None:
        return None
    if not same_aspect(frame, size):
        what = "another aspect"
    elif max(frame) > _LARGEST_SHRINK * max(size):
        what = f"more than {_LARGEST_SHRINK} times as large"
    else:
        return None
    return (
        f"has {size[0]} x {size[1]} px and its boxes and masks are of {frame[0]} x {frame[1]}, {what}; right is the "
        "image that was annotated, or that image resized"
    )


def same_aspect(frame: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether `size` is `frame` times one factor, with both sides rounded or cut to whole pixels."""
    return abs(size[0] * frame[1] - size[1] * frame[0]) <= max(frame)


def _mask_fault(mask: Inspection, image: Inspection) -> str | None:
    if mask.fault:
        return mask.fault
    if mask.format == "DICOM":
        return "is a DICOM file, whose values are windowed; save the mask as PNG"
    if mask.format in ("JPEG", "MPO"):
        return "is a JPEG, whose noise is non-zero outside the region; save it as PNG"
    if not image.fault and (mask.width, mask.height) != (image.width, image.height):
        return f"has {mask.width} x {mask.height} px and its image {image.width} x {image.height}"
    return None


def _inspect_file(root: Path, path: Path) -> Inspection:
    try:
        status = path.stat()
        if not path.resolve().is_relative_to(root):
            return Inspection(fault="is a link that leaves the data folder")
        if not path.is_file():
            return Inspection(fault="is not a file")
        return _inspect(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        return Inspection(fault=f"cannot be opened: {error.strerror}")


@cache
def _inspect(path: Path, size_bytes: int, mtime_ns: int) -> Inspection:
    """Decode the whole file. Kept by size and time of change, so that several splits decode each file once."""
    if size_bytes == 0:
        return Inspection(fault="is empty: it has 0 bytes")
    data = path.read_bytes()
    try:
        image = open_image(data)
        check_range(image)
    except UnidentifiedImageError:
        return Inspection(fault=f"is no image that can be read ({size_bytes} bytes); right are {FORMATS_SHOWN}")
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    except Exception as error:  # Pillow and pydicom raise many types on broken files
        return Inspection(fault=f"cannot be decoded: {quote(error)}")
    if min(image.size) < _SMALLEST_PX:
        return Inspection(fault=f"has {image.width} x {image.height} px; right are {_SMALLEST_PX} a side at least")
    low_range = image.mode.startswith("I") and int(np.asarray(image).max()) < 4096
    sha256 = hashlib.sha256(data).hexdigest()
    extent, same = _extent(mask_values(image)), is_one_colour(image)
    return Inspection(image.width, image.height, sha256, low_range, extent, image.format, one_colour=same)


def _extent(values: NDArray[np.generic]) -> Box | None:
    """The box (x, y, width, height) around the values that are not zero."""
    rows = np.flatnonzero(values.reshape(len(values), -1).any(axis=1))
    columns = np.flatnonzero(values.any(axis=0).reshape(values.shape[1], -1).any(axis=1))
    if not len(rows):
        return None
    x, y = float(columns[0]), float(rows[0])
    return x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y
