"""Image files and segmentations as arrays of pixels."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from distill.data.readers.dicom import dicom_image, is_dicom
from distill.data.readers.tables import quote

SLACK_PX = 1.0
"""Annotation tools round; a box or polygon may leave its image by this much and is clipped."""

LARGEST_IMAGE_PX = 2**26
"""Width times height of a picture or mask: 8192 x 8192."""

_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")
"""Pillow knows more, some of which start other programs."""
FORMATS_SHOWN = f"{', '.join(_FORMATS)} and DICOM"

_LARGEST_RUN_LENGTHS_PX = 2**25
_OVERSAMPLING = 8
_CANVAS_PX = 2**26
_DRAWN_PX = 2**28
"""Pixels that the polygons of an annotation may fill before they are drawn less finely."""
_ONE_BY_ONE = 100
"""Up to so many polygons are drawn on a canvas each, more on one."""

# Larger pictures are refused with their names.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


# --- files --------------------------------------------------------------------------------------------------------


PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""Tag of a TIFF file, and its value where 0 is white. Source: TIFF 6.0."""


def open_image(data: bytes) -> Image.Image:
    """The image decoded to the end, turned as its EXIF orientation says. Raises what Pillow and pydicom raise, and
    UserError for DICOM without pydicom."""
    if is_dicom(data):
        return dicom_image(data, LARGEST_IMAGE_PX)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > LARGEST_IMAGE_PX:
        raise ValueError(f"{image.width} x {image.height} px are more than {LARGEST_IMAGE_PX}; shrink it")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its previews
        raise ValueError(f"it holds {frames} pictures; save the one that is meant as a file of its own")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def check_range(image: Image.Image) -> None:
    """Raise ValueError if the pixels are not of 8 or 16 bits."""
    if image.mode == "F":
        raise ValueError("its pixels are floating point; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its integers do not fit 16 bits; save it as 8 or 16 bit")


ONE_COLOUR = "is of one colour, as a failed save or a safety checker leaves it; take it out"


def is_one_colour(image: Image.Image) -> bool:
    ends = image.getextrema()
    return all(low == high for low, high in (ends if isinstance(ends[0], tuple) else [ends]))


def eight_bits(image: Image.Image) -> Image.Image:
    """Mode L or RGB. 16-bit gray is divided by 257, so that 65535 becomes 255; transparent pixels lie on white."""
    check_range(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        # Pillow turns a TIFF whose 0 is white only where it has 8 bits.
        values = 65535 - values if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO else values
        return Image.fromarray((values / 257.0 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def mask_of_file(path: Path) -> NDArray[np.bool_]:
    """(height, width): where a pixel is not zero, see `mask_values`; transparency does not count."""
    values = mask_values(open_image(path.read_bytes()))
    return np.asarray(values.any(axis=2) if values.ndim == 3 else values != 0)


def mask_values(image: Image.Image) -> NDArray[np.generic]:
    """Its pixels without their transparency: non-zero is inside. Of a palette image its indices; its grays where it has
    no other colours, and index 0 is not black but another is: some programs order the palette of a mask so."""
    if image.mode == "P":
        colours: NDArray[np.uint8] = np.asarray(image.convert("RGB"))
        gray, is_gray = colours[..., 0], bool((colours == colours[..., :1]).all())
        starts_black = not any((image.getpalette() or [0])[:3])
        return gray if is_gray and not starts_black and bool((gray == 0).any()) else np.asarray(image)
    return np.asarray(image.convert(image.mode[:-1]) if image.mode in ("LA", "RGBA") else image)


# --- segmentations of COCO ----------------------------------------------------------------------------------------


def check_segmentation(value: object, width: int, height: int) -> str | None:
    """The `segmentation` of a COCO annotation as JSON text, None if it is empty.

    Polygons are lists of x and y in turn, in pixels; a run-length code holds `size` [height, width] and `counts`, a
    list or COCO's compressed text. Raises ValueError with what is wrong.
    """
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if size != [height, width]:
            raise ValueError(f"segmentation.size is {quote(size)}; right is [{height}, {width}], the image's")
        if width * height > _LARGEST_RUN_LENGTHS_PX:
            raise ValueError(
                f"segmentation is run lengths of {width} x {height} px; right is a list of polygons for more than "
                f"{_LARGEST_RUN_LENGTHS_PX} px"
            )
        runs = decode_counts(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or any(type(run) is not int or run < 0 for run in runs):
            raise ValueError(f"segmentation.counts '{quote(counts)}' are not numbers of pixels of at least 0")
        if sum(runs) != width * height:
            raise ValueError(f"segmentation.counts add up to {sum(runs)} px; right is {height} x {width}")
        return json.dumps({"counts": counts})
    if not isinstance(value, list):
        raise ValueError(f"segmentation '{quote(value)}' is neither polygons nor a run-length code")
    for polygon in value:
        if not isinstance(polygon, list) or any(type(number) not in (int, float) for number in polygon):
            raise ValueError(f"segmentation '{quote(polygon)}' is not a polygon; right is a list x1, y1, x2, y2, ...")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"segmentation has a polygon of {len(polygon)} numbers; right are pairs, at least three")
        for axis, side in ((0, width), (1, height)):
            outside = [number for number in polygon[axis::2] if not -SLACK_PX <= number <= side + SLACK_PX]
            if outside:
                name = "xy"[axis]
                raise ValueError(f"segmentation has a polygon with {name} = {outside[0]}; right is 0 to {side} px")
    return json.dumps(value)


def segmentation_mask(segmentation: str, width: int, height: int, shrink: int = 1) -> NDArray[np.bool_]:
    """(height, width) of what `check_segmentation` returned. Polygons may be drawn with `shrink` pixels in one."""
    value = json.loads(segmentation)
    if isinstance(value, list):
        if shrink > 1:
            value = [[number / shrink for number in polygon] for polygon in value]
        return polygon_mask(value, math.ceil(width / shrink), math.ceil(height / shrink))
    counts = value["counts"]
    return rle_mask(decode_counts(counts) if isinstance(counts, str) else counts, width, height)


def decode_counts(text: str) -> list[int]:
    """Run lengths of COCO's compressed text. Raises ValueError for text that is none.

    Each character holds five bits of a number, lowest first, and one bit that says whether more follow; the number is
    signed, and from the fourth run on it is the difference to the run before the last. Source: cocoapi,
    common/maskApi.c, rleFrString.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"segmentation.counts has '{quote(character)}', which no run-length code has there")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"segmentation.counts '{quote(text)}' is cut off")
    return runs


def rle_mask(runs: Sequence[int], width: int, height: int) -> NDArray[np.bool_]:
    """(height, width) of runs of pixels outside and inside in turn, column by column."""
    inside = np.arange(len(runs)) % 2 == 1
    returned: NDArray[np.bool_] = np.repeat(inside, runs).reshape(width, height).T
    return returned


def polygon_mask(polygons: Sequence[Sequence[float]], width: int, height: int) -> NDArray[np.bool_]:
    """(height, width) union of polygons in pixels: where at least half of a pixel is inside.

    Pillow also fills the pixels that an edge touches, which would make small objects too large; polygons are therefore
    drawn enlarged, and shrunk. Many polygons, or large ones, are enlarged less.
    """
    mask = np.zeros((height, width), dtype=bool)
    outlines = [_Outline.of(polygon, width, height) for polygon in polygons]
    area = sum(outline.width * outline.height for outline in outlines)
    finest = min(_OVERSAMPLING, math.isqrt(int(_DRAWN_PX / max(area, 1.0))))
    for group in [outlines] if len(outlines) > _ONE_BY_ONE else [[outline] for outline in outlines]:
        left, top = (math.floor(min(min(values) for values in axis)) for axis in _axes(group))
        right, bottom = (math.ceil(max(max(values) for values in axis)) for axis in _axes(group))
        if right == left or bottom == top:
            continue
        scale = max(1, min(finest, math.isqrt(_CANVAS_PX // ((right - left) * (bottom - top)))))
        canvas = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
        draw = ImageDraw.Draw(canvas)
        for outline in group:
            if outline.width and outline.height:
                # The centre of Pillow's pixel 0 is at 0, and of an image's at 0.5.
                across = [(x - left) * scale - 0.5 for x in outline.xs]
                down = [(y - top) * scale - 0.5 for y in outline.ys]
                draw.polygon(list(zip(across, down, strict=True)), fill=255)
        mask[top:bottom, left:right] |= np.asarray(canvas.reduce(scale)) >= 128
    return mask


class _Outline(NamedTuple):
    """A polygon, clipped to the image."""

    xs: list[float]
    ys: list[float]
    width: float
    height: float

    @classmethod
    def of(cls, polygon: Sequence[float], width: int, height: int) -> _Outline:
        xs = [min(max(float(x), 0.0), float(width)) for x in polygon[::2]]
        ys = [min(max(float(y), 0.0), float(height)) for y in polygon[1::2]]
        return cls(xs, ys, max(xs) - min(xs), max(ys) - min(ys))


def _axes(outlines: Sequence[_Outline]) -> tuple[list[list[float]], list[list[float]]]:
    return [outline.xs for outline in outlines], [outline.ys for outline in outlines]
