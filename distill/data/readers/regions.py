"""Boxes, masks and segmentations of an image as regions of the training square."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distill.data.readers.pixels import mask_of_file, segmentation_mask
from distill.data.readers.tables import Box
from distill.data.sample import Region
from distill.data_config import Fit

_GRID_PX = 2048
"""Polygons of a larger frame are drawn on a smaller grid: the training square has fewer pixels."""


class Placement(NamedTuple):
    """How an image lies on the training square. kept: left, top, right and bottom of the part that is shown, in pixels
    of the image. left, top, width, height: where it is shown, in pixels of the square."""

    kept: Box
    left: int
    top: int
    width: int
    height: int


def placed(width: int, height: int, resolution: int, fit: Fit) -> Placement:
    """The placement of an image of `width` x `height` px; letterbox rounds its sides to whole pixels of the square."""
    if fit == "letterbox":
        longest = max(width, height)
        across, down = (max(1, round(side * resolution / longest)) for side in (width, height))
        whole = (0.0, 0.0, float(width), float(height))
        return Placement(whole, (resolution - across) // 2, (resolution - down) // 2, across, down)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Placement((left, top, left + side, top + side), 0, 0, resolution, resolution)


def clip_box(box: Box, width: int, height: int) -> Box:
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return x0, y0, x1 - x0, y1 - y0


def regions_of(
    row: dict[str, Any],
    chosen: Collection[int],
    findings: Sequence[str],
    resolution: int,
    fit: Fit,
    *,
    outlines: bool = True,
) -> tuple[Region, ...]:
    """One region a finding, in the order of `findings`; an annotation counts by its mask or segmentation, else by its
    box.

    row: a row of the table of images (see records.py). chosen: positions of its annotations. Without `outlines`
    segmentations count by their boxes.
    """
    places: dict[str, list[int]] = {}
    for place in chosen:
        places.setdefault(row["findings"][place], []).append(place)
    square = Square.of(row, resolution, fit)
    found = (_region(row, places[name], name, square, outlines) for name in findings if name in places)
    return tuple(region for region in found if region is not None)


@dataclass(frozen=True)
class Square:
    """The training square of an image. across, down: pixels of the file in a pixel of the frame."""

    resolution: int
    shown: Placement
    frame: tuple[int, int]
    across: float
    down: float

    @classmethod
    def of(cls, row: dict[str, Any], resolution: int, fit: Fit) -> Square:
        width, height = row["frame"]
        shown = placed(row["width"], row["height"], resolution, fit)
        return cls(resolution, shown, (width, height), row["width"] / width, row["height"] / height)

    def edges(self, box: Box) -> Box:
        """x0, y0, x1, y1 of a box (x, y, width, height) of the frame, in pixels of the square, which it may leave."""
        x, y, width, height = box
        left, top, right, bottom = self.shown.kept
        across, down = self.shown.width / (right - left), self.shown.height / (bottom - top)
        return (
            (x * self.across - left) * across + self.shown.left,
            (y * self.down - top) * down + self.shown.top,
            ((x + width) * self.across - left) * across + self.shown.left,
            ((y + height) * self.down - top) * down + self.shown.top,
        )

    def place(self, box: Box) -> Box:
        """`edges`, clipped to where the image is shown."""
        left, top, across, down = map(float, self.shown[1:])
        x0, y0, x1, y1 = self.edges(box)
        x0, x1 = (min(max(value, left), left + across) for value in (x0, x1))
        y0, y1 = (min(max(value, top), top + down) for value in (y0, y1))
        return x0, y0, x1, y1

    def cuts(self, box: Box) -> bool:
        """Whether a box of the frame leaves the square by more than a pixel of it."""
        return min(self.edges(box)) < -1 or max(self.edges(box)) > self.resolution + 1

    def cut(self, mask: NDArray[np.bool_], across: float = 1.0, down: float = 1.0) -> NDArray[np.bool_]:
        """(resolution, resolution): where at least half of a pixel is inside. across, down: pixels of the file in one
        of `mask`."""
        whole = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
        left, top, right, bottom = self.shown.kept
        # A quotient may round up.
        box = (left / across, top / down, min(right / across, whole.width), min(bottom / down, whole.height))
        resized = whole.resize((self.shown.width, self.shown.height), Image.Resampling.BOX, box=box)
        square = Image.new("L", (self.resolution, self.resolution))
        square.paste(resized, (self.shown.left, self.shown.top))
        return np.asarray(square) >= 128


def _region(row: dict[str, Any], places: Sequence[int], finding: str, square: Square, outlines: bool) -> Region | None:
    """The union of the annotations at `places`, None if no pixel is left of it."""
    mask = np.zeros((square.resolution, square.resolution), dtype=bool)
    boxes: list[Box] = []
    files: dict[str, None] = {}
    drawn: list[str] = []
    for place in places:
        box, mask_name, outline = (row[column][place] for column in ("boxes", "masks", "segmentations"))
        if mask_name is not None:
            files[mask_name] = None
        elif outline is not None and outlines:
            drawn.append(outline)
        if not box:
            continue
        x0, y0, x1, y1 = square.place(box)
        # A pixel is inside if its centre is.
        inside = slice(math.ceil(y0 - 0.5), math.ceil(y1 - 0.5)), slice(math.ceil(x0 - 0.5), math.ceil(x1 - 0.5))
        if mask[inside].size:
            boxes.append((x0, y0, x1 - x0, y1 - y0))
            if mask_name is None and (outline is None or not outlines):
                mask[inside] = True
    for name in files:
        mask |= square.cut(mask_of_file(Path(name)))
    for shrink, whole in _united(drawn, *square.frame, square.resolution).items():
        mask |= square.cut(whole, square.across * shrink, square.down * shrink)
    if not mask.any():
        return None
    phrases = dict.fromkeys(row["phrases"][place] for place in places if row["phrases"][place])
    return Region(finding, torch.from_numpy(mask), tuple(boxes), ". ".join(phrases) or None)


def _united(segmentations: Sequence[str], width: int, height: int, resolution: int) -> dict[int, NDArray[np.bool_]]:
    """Pixels of the frame in a pixel of the grid -> union on that grid.

    Instances that touch share pixels at their border: they are united before the resize.
    """
    coarse = math.ceil(max(width, height) / max(_GRID_PX, 4 * resolution))
    united: dict[int, NDArray[np.bool_]] = {}
    for text in segmentations:
        # Polygons are JSON lists; run lengths count the pixels of the frame.
        shrink = coarse if text.startswith("[") else 1
        part = segmentation_mask(text, width, height, shrink)
        united[shrink] = united[shrink] | part if shrink in united else part
    return united
