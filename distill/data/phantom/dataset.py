"""Procedural chest radiographs with findings, exact masks and radiology-like captions. No patient, no file, no limit.

A row is drawn in two steps: a `Scene` (scene.py; microseconds) from which the caption follows (captions.py), and its
pixels (pixels.py). The scene lives in units of half the image side, so a resolution changes the sampling and not the
layout. Radiological convention: the patient's right is on the image's left; captions use the patient's side.

Picture sheet: python -m distill.data.phantom --output sheet.png --rows 4 --columns 6 --seed 0 --outlines
"""

from __future__ import annotations

import argparse
import hashlib
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from distill.data.captions import MS_CXR_QUERY_WORDS
from distill.data.phantom.captions import write_caption
from distill.data.phantom.pixels import draw, masks
from distill.data.phantom.scene import (
    CAPTION,
    FINDINGS,
    GENERATOR_VERSION,
    MOVABLE,
    SPLIT_CODES,
    CaptionStyle,
    Placement,
    Scene,
    Split,
    draw_scene,
)
from distill.data.sample import Region, Sample
from distill.errors import UserError, raise_all

KEPT_ROWS = 16_384
"""Scenes and captions that stay in memory, about 4 kB each: a run asks for labels and captions many times."""

_scene = lru_cache(maxsize=KEPT_ROWS)(draw_scene)


@lru_cache(maxsize=KEPT_ROWS)
def _text(
    seed: int, split: Split, index: int, placement: Placement, captions: CaptionStyle
) -> tuple[str, Mapping[str, str]]:
    """Caption of a row, and the phrase of each finding in it."""
    rng = np.random.default_rng((seed, SPLIT_CODES[split], index, CAPTION))
    return write_caption(_scene(seed, split, index, placement), rng, captions)


class PhantomDataset:
    """Infinite procedural data behind a finite length; implements `distill.data.sample.ImageCaptionDataset`.

    Row i is a pure function of (seed, split, i, resolution), whatever the size; no two splits share a row.

    split: train, validation or test. size: number of rows. seed: 0 to 2**32 - 1. resolution: side in pixels, 64 to 512.
    captions: reports (findings, negated findings, normal sentences), affirmed (no negated findings), stated (the
    findings alone, or one normal sentence where there is none), or labels (their names). placement: anatomical (each
    finding where it usually lies), or balanced (one of four findings on either side and in any zone, all equally often,
    half of them beside another finding that the caption leaves out; the patient is shifted and enlarged), so that a
    place tells less: the mean mask of a finding has AUC .73 there, .89 in the anatomical placement.
    Raises UserError for values outside these.
    """

    findings: tuple[str, ...] = FINDINGS
    query_words: Mapping[str, tuple[str, ...]] = MS_CXR_QUERY_WORDS

    def __init__(
        self,
        split: Split,
        size: int,
        seed: int = 0,
        resolution: int = 128,
        captions: CaptionStyle = "reports",
        placement: Placement = "anatomical",
    ) -> None:
        faults = []
        if split not in SPLIT_CODES:
            faults.append(f"no split '{split}'; available: {', '.join(SPLIT_CODES)}")
        if size < 1:
            faults.append(f"size is {size}; it must be at least 1")
        if not 0 <= seed < 2**32:
            faults.append(f"seed is {seed}; it must be in 0 .. 2**32 - 1")
        if not 64 <= resolution <= 512:
            faults.append(f"resolution is {resolution}; phantoms are drawn at 64 to 512 pixels")
        raise_all("phantom data", faults)
        self.split: Split = split
        self.size, self.seed, self.resolution = size, seed, resolution
        self.captions: CaptionStyle = captions
        self.placement: Placement = placement
        if placement == "balanced":
            self.findings = MOVABLE

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        drawing = draw(scene, self.resolution)
        gray = torch.from_numpy(drawing.image * 2.0 - 1.0)
        return Sample(
            id=f"phantom-{self.seed}-{self.split}-{index}",
            pixel_values=gray.expand(3, -1, -1).contiguous(),
            caption=self._text(index)[0],
            regions=self._regions(index, drawing.pieces),
            labels=self.labels(index),
            original_size=(self.resolution, self.resolution),
            meta={finding.name: f"{finding.size} {finding.side} {finding.zone}" for finding in scene.findings},
        )

    def regions(self, index: int) -> tuple[Region, ...]:
        """Those of the sample, whose picture is not drawn."""
        return self._regions(index, masks(self.scene(index), self.resolution))

    def _regions(self, index: int, pieces: Mapping[str, tuple[NDArray[np.bool_], ...]]) -> tuple[Region, ...]:
        phrases = self._text(index)[1]
        return tuple(
            Region(
                finding=name,
                mask=torch.from_numpy(np.logical_or.reduce(pieces[name])),
                boxes=tuple(_box(piece) for piece in pieces[name]),
                phrase=phrases[name].removeprefix("a "),
            )
            for name in self.labels(index)
        )

    def size_ids(self, index: int) -> tuple[int, ...]:
        """Those of the sample, which is not drawn."""
        return (self.resolution, self.resolution, 0, 0, self.resolution, self.resolution)

    def scene(self, index: int) -> Scene:
        """What row `index` shows; costs microseconds. Raises IndexError outside the data set."""
        return _scene(*self._row(index), self.placement)

    def _text(self, index: int) -> tuple[str, Mapping[str, str]]:
        return _text(*self._row(index), self.placement, self.captions)

    def _row(self, index: int) -> tuple[int, Split, int]:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a phantom data set with {self.size} rows")
        return self.seed, self.split, int(index)

    def caption(self, index: int) -> str:
        """Caption of a row, without drawing it."""
        return self._text(index)[0]

    def labels(self, index: int) -> tuple[str, ...]:
        """Findings of a row, without drawing it."""
        return tuple(finding.name for finding in self.scene(index).findings)

    def fingerprint(self, index: int) -> str:
        """Hash of all that decides a row."""
        key = f"phantom {GENERATOR_VERSION} {self.seed} {self.split} {index} {self.resolution}"
        if self.captions != "reports":
            key += f" {self.captions}"
        if self.placement != "anatomical":
            key += f" {self.placement}"
        return hashlib.sha256(key.encode()).hexdigest()


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Tight (x, y, width, height) of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)


# ----------------------------------------------------------------------------------------------------------- sheet

_OUTLINE_COLORS = {
    "atelectasis": (255, 170, 60),
    "cardiomegaly": (255, 90, 90),
    "consolidation": (120, 220, 90),
    "edema": (90, 200, 255),
    "lung opacity": (250, 240, 90),
    "pleural effusion": (90, 130, 255),
    "pneumonia": (240, 110, 240),
    "pneumothorax": (80, 240, 210),
}


def picture_sheet(dataset: PhantomDataset, columns: int, outlines: bool = False) -> Image.Image:
    """All rows of a data set on one page with their captions; outlines adds the border of every mask."""
    scale = max(1, 256 // dataset.resolution)
    side, text_height = scale * dataset.resolution, 108
    rows = -(-len(dataset) // columns)
    page = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    pen = ImageDraw.Draw(page)
    for index in range(len(dataset)):
        sample = dataset[index]
        gray = ((sample.pixel_values.permute(1, 2, 0) + 1.0) * 127.5).round().to(torch.uint8).numpy()
        picture = np.asarray(Image.fromarray(gray).resize((side, side), Image.Resampling.BICUBIC)).copy()
        for region in sample.regions if outlines else ():
            mask = region.mask.numpy().repeat(scale, 0).repeat(scale, 1)
            picture[mask & ~ndimage.binary_erosion(mask)] = _OUTLINE_COLORS[region.finding]
        left, top = index % columns * (side + 8) + 4, index // columns * (side + text_height) + 4
        page.paste(Image.fromarray(picture), (left, top))
        pen.text((left, top + side + 2), textwrap.fill(sample.caption, side // 6), fill="black")
    return page


def _main() -> None:
    parser = argparse.ArgumentParser(description="Draw a sheet of phantoms with their captions.")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=tuple(SPLIT_CODES), default="train")
    parser.add_argument("--resolution", type=int, default=128, help="side of a phantom in pixels")
    parser.add_argument("--outlines", action="store_true", help="draw the border of every mask")
    options = parser.parse_args()
    try:
        dataset = PhantomDataset(options.split, options.rows * options.columns, options.seed, options.resolution)
    except UserError as error:
        parser.error(str(error))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture_sheet(dataset, options.columns, options.outlines).save(options.output)
    print(options.output)


if __name__ == "__main__":
    _main()
