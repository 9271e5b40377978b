"""Procedural chest radiographs with findings, exact masks and radiology-like captions. No patient, no file, no limit.

A row is drawn in two steps: a `Scene` (pose, anatomy, findings; microseconds) from which the caption follows, and its
pixels. The scene lives in units of half the image side, so a resolution changes the sampling and not the layout.
Radiological convention: the patient's right is on the image's left; captions use the patient's side.

Picture sheet: python -m distill.data.phantom --output sheet.png --rows 4 --columns 6 --seed 0 --outlines
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from distill.data.captions import MS_CXR_QUERY_WORDS
from distill.data.sample import Region, Sample
from distill.errors import UserError, raise_all

GENERATOR_VERSION = 1
"""Part of every fingerprint: raise it whenever pixels, masks or captions of a row change."""

FINDINGS = (
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "lung opacity",
    "pleural effusion",
    "pneumonia",
    "pneumothorax",
)

Split = Literal["train", "validation", "test"]
Side = Literal["left", "right", "bilateral"]
Zone = Literal["upper", "mid", "lower"]
Size = Literal["small", "moderate", "large"]
CaptionStyle = Literal["reports", "affirmed", "stated"]
Array = NDArray[np.floating[Any]]

_SPLIT_CODES: dict[str, int] = {"train": 0, "validation": 1, "test": 2}
_SCENE, _TEXTURE, _CAPTION = 0, 1, 2
_SIZES: tuple[Size, ...] = ("small", "moderate", "large")
_ZONES: tuple[Zone, ...] = ("upper", "mid", "lower")
_ZONE_Y: dict[Zone, float] = {"upper": -0.40, "mid": -0.08, "lower": 0.22}
_MASK_THRESHOLD = 0.3


@dataclass(frozen=True)
class Finding:
    """One finding of a scene.

    side is the patient's; variation holds numbers in [0, 1) that shape the drawing, 12 for each side.
    """

    name: str
    side: Side
    zone: Zone
    size: Size
    variation: tuple[float, ...]


@dataclass(frozen=True)
class Scene:
    """All that decides a picture, apart from the resolution. Lengths are in units of half the image side."""

    center: tuple[float, float]
    scale: tuple[float, float]
    lean: float
    lung_apex: float
    lung_width: tuple[float, float]
    dome: tuple[float, float]
    heart_scale: float
    heart_lean: float
    mediastinum: float
    rib_spacing: float
    rib_phase: float
    rib_slope: float
    rib_strength: float
    clavicle: float
    shoulder: float
    flank: float
    bubble: tuple[float, float, float]
    breast: float
    lung_level: float
    tissue_level: float
    gamma: float
    black: float
    white: float
    texture_seed: tuple[int, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Drawing:
    """image: (height, width) float32 in [0, 1]; pieces: for each finding its (height, width) bool masks, one a side."""

    image: Array
    pieces: Mapping[str, tuple[NDArray[np.bool_], ...]]


# --------------------------------------------------------------------------------------------------------- scene


def draw_scene(seed: int, split: Split, index: int, companions: float = 0.0) -> Scene:
    """The scene of row `index`: a pure function of its arguments. companions: see `PhantomDataset`."""
    key = (seed, _SPLIT_CODES[split], index)
    rng = np.random.default_rng((*key, _SCENE))

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    width = between(0.94, 1.06)
    dome = between(0.33, 0.44)
    return Scene(
        center=(between(-0.04, 0.04), between(-0.03, 0.06)),
        scale=(between(1.0, 1.18), between(1.02, 1.16)),
        lean=between(-0.05, 0.05),
        lung_apex=between(-0.76, -0.68),
        lung_width=(0.74 * width, 0.72 * width * between(0.96, 1.0)),
        dome=(dome, dome + between(0.03, 0.08)),
        heart_scale=between(0.86, 1.06),
        heart_lean=between(0.4, 0.75),
        mediastinum=between(0.09, 0.12),
        rib_spacing=between(0.135, 0.165),
        rib_phase=between(0.0, 1.0),
        rib_slope=between(0.75, 1.15),
        rib_strength=between(0.08, 0.13),
        clavicle=between(-0.56, -0.48),
        shoulder=between(-0.92, -0.82),
        flank=between(0.88, 1.02),
        bubble=(between(0.28, 0.4), between(0.09, 0.13), between(0.0, 1.0)),
        breast=between(0.03, 0.08) * float(rng.random() < 0.35),
        lung_level=between(0.16, 0.27),
        tissue_level=between(0.44, 0.55),
        gamma=between(0.8, 1.3),
        black=between(0.0, 0.12),
        white=between(0.88, 1.0),
        texture_seed=(*key, _TEXTURE),
        findings=_draw_findings(rng, companions),
    )


_PAIRS = (
    ("cardiomegaly", "edema"), ("pleural effusion", "atelectasis"), ("pneumonia", "consolidation"),
    ("pneumothorax", "lung opacity"),
)  # fmt: skip
_COMPANIONS = {name: other for pair in _PAIRS for name, other in (pair, pair[::-1])}


def _draw_findings(rng: np.random.Generator, companions: float) -> tuple[Finding, ...]:
    """0-3 findings that do not share a place; a finding that finds no free place is left out."""
    count = int(rng.choice(4, p=(0.19, 0.33, 0.31, 0.17)))
    taken: set[tuple[str, str]] = set()
    findings = []
    names = [str(name) for name in rng.permutation(FINDINGS)[:count]]
    if companions:
        paired = [(name, *[_COMPANIONS[name]] * (rng.random() < companions)) for name in names]
        names = list(dict.fromkeys(name for pair in paired for name in pair))[:3]
    for name in names:
        size = _SIZES[rng.integers(3)]
        options = _places(name, size)
        free = [option for option in options if not taken & set(option[2])]
        if not free:
            continue
        side, zone, slots = free[rng.integers(len(free))]
        taken |= set(slots)
        findings.append(Finding(name, side, zone, size, tuple(float(value) for value in rng.random(24))))
    return tuple(sorted(findings, key=lambda finding: FINDINGS.index(finding.name)))


@cache
def _places(name: str, size: Size) -> tuple[tuple[Side, Zone, tuple[tuple[str, str], ...]], ...]:
    """Where a finding may lie: (side, zone, slots that it takes)."""
    sides: tuple[Side, Side] = ("left", "right")
    both: Side = "bilateral"
    lower: Zone = "lower"
    if name == "cardiomegaly":
        # The enlarged heart covers most of the left base.
        return ((both, lower, (("left", lower),)),)
    if name == "edema":
        return ((both, "mid", tuple((side, "mid") for side in sides)),)
    if name == "pneumothorax":
        reach = _ZONES[:1] if size == "small" else _ZONES
        return tuple((side, "upper", tuple((side, zone) for zone in reach)) for side in sides)
    if name == "pleural effusion":
        reach = _ZONES[1:] if size == "large" else _ZONES[2:]
        one_side = tuple((side, lower, tuple((side, zone) for zone in reach)) for side in sides)
        return (*one_side, (both, lower, tuple((side, zone) for side in sides for zone in reach)))
    zones = _ZONES[1:] if name == "atelectasis" else _ZONES
    one_zone = tuple((side, zone, ((str(side), str(zone)),)) for side in sides for zone in zones)
    if name == "lung opacity":
        return (*one_zone, *((both, zone, tuple((side, zone) for side in sides)) for zone in zones))
    return one_zone


# -------------------------------------------------------------------------------------------------------- pixels


@lru_cache(maxsize=8)
def _grid(resolution: int) -> tuple[Array, Array]:
    """Pixel centres: (1, resolution) horizontal and (resolution, 1) vertical, in [-1, 1]."""
    axis = ((np.arange(resolution) + 0.5) * 2 / resolution - 1).astype(np.float32)
    return axis[None, :], axis[:, None]


@lru_cache(maxsize=32)
def _noise_basis(resolution: int, knots: int) -> Array:
    """(resolution, knots) Gaussian bumps, scaled so that white noise on the knots gives about unit variance."""
    axis, centers = _grid(resolution)[1], np.linspace(-1.1, 1.1, knots, dtype=np.float32)[None, :]
    basis = np.exp(-0.5 * ((axis - centers) / (2.2 / (knots - 1) * 0.75)) ** 2)
    return (basis / np.sqrt((basis**2).sum(1, keepdims=True))).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, resolution: int, knots: int) -> Array:
    """(resolution, resolution) smooth noise of about unit variance; the same field at any resolution."""
    basis = _noise_basis(resolution, knots)
    return basis @ rng.standard_normal((knots, knots), dtype=np.float32) @ basis.T


def _step(distance: Array, width: float) -> Array:
    """Smooth step from 0 to 1 as distance goes from -width to width."""
    t = np.clip(distance * (0.5 / width) + 0.5, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _ridge(distance: Array, width: float) -> Array:
    """1 where distance is 0, falling smoothly to 0 at +-width."""
    t = np.clip(1.0 - np.abs(distance) / width, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _ellipse(x: Array, y: Array, center: tuple[float, float], radii: tuple[float, float], tilt: float = 0.0) -> Array:
    """Roughly the distance to an ellipse's edge, positive inside."""
    dx, dy = x - center[0], y - center[1]
    cos, sin = math.cos(tilt), math.sin(tilt)
    radius = np.sqrt(((cos * dx + sin * dy) / radii[0]) ** 2 + ((cos * dy - sin * dx) / radii[1]) ** 2)
    return (1.0 - radius) * min(radii)


def _join(first: Array, second: Array, blend: float) -> Array:
    """Union of two shapes given by distances, positive inside; the notch between them is filled smoothly."""
    overlap = np.clip(0.5 + 0.5 * (first - second) / blend, 0.0, 1.0)
    return second + overlap * (first - second) + blend * overlap * (1.0 - overlap)


@dataclass(frozen=True)
class _Lung:
    """One lung in coordinates where `across` grows from the midline to the patient's flank."""

    across: Array
    y: Array
    apex: float
    width: float
    dome: float

    def edge(self, apex_drop: float = 0.0, inset: float = 0.0) -> Array:
        """Lateral edge for each row; apex_drop and inset make the collapsed lung of a pneumothorax."""
        t = np.clip((self.y - self.apex - apex_drop) / (0.55 - self.apex - apex_drop), 0.0, 1.0)
        return 0.29 + (self.width - inset - 0.29) * np.sqrt(1.0 - (1.0 - t) ** 2.6)

    def diaphragm(self) -> Array:
        flank = np.clip(self.across - self.width + 0.15, 0.0, None)
        return self.dome + 1.1 * (self.across - 0.34) ** 2 + 5.0 * flank**2

    def shape(self, apex_drop: float = 0.0, inset: float = 0.0, raised: float = 0.0) -> Array:
        """Soft outline in [0, 1]."""
        apex = self.apex + apex_drop
        medial = 0.29 - 0.2 * np.sqrt(np.clip((self.y - apex) * 3.0, 0.0, 1.0))
        return (
            _step(self.edge(apex_drop, inset) - self.across, 0.03)
            * _step(self.across - medial, 0.03)
            * _step(self.y - apex, 0.03)
            * _step(self.diaphragm() - raised - self.y, 0.025)
        )


def _place(scene: Scene, resolution: int) -> tuple[Array, Array, dict[str, _Lung]]:
    """The patient's coordinates of all pixels, x (resolution, resolution) and y (resolution, 1), and both lungs."""
    u, v = _grid(resolution)
    y = (v - scene.center[1]) / scene.scale[1]
    x = (u - scene.center[0] - scene.lean * v) / scene.scale[0]
    lungs = {
        side: _Lung(direction * x, y, scene.lung_apex, scene.lung_width[k], scene.dome[k])
        for k, (side, direction) in enumerate((("right", -1.0), ("left", 1.0)))
    }
    return x, y, lungs


def draw(scene: Scene, resolution: int) -> Drawing:
    """Pixels and masks of a scene. The same scene without a finding differs only by what that finding does."""
    u, v = _grid(resolution)
    x, y, lungs = _place(scene, resolution)
    ax = np.abs(x)
    rng = np.random.default_rng(scene.texture_seed)
    outline = {side: lung.shape() for side, lung in lungs.items()}
    diaphragm = np.where(x < 0, lungs["right"].diaphragm(), lungs["left"].diaphragm())
    chest_edge = np.where(x < 0, lungs["right"].edge(), lungs["left"].edge())

    # Body: neck, sloping shoulders, flanks; denser below the diaphragm and towards the midline.
    shoulder = scene.shoulder + 0.16 * (ax - 0.3) + 1.6 * np.clip(ax - 0.8, 0.0, None) ** 2
    shoulder = shoulder - 4.0 * np.clip(0.4 - ax, 0.0, None) ** 1.5
    flank = scene.flank + 0.8 * np.clip(-0.2 - y, 0.0, None) + 0.02 * np.cos(5.0 * y)
    body = _step(y - shoulder, 0.06) * _step(flank - ax, 0.06)
    coarse = _smooth_noise(rng, resolution, 5)
    tissue = scene.tissue_level + 0.08 * np.clip(0.6 - ax, -0.4, 0.6) + 0.014 * coarse
    in_chest = _step(chest_edge + 0.02 - ax, 0.1)
    abdomen = in_chest * _step(y - diaphragm, 0.04) + (1.0 - in_chest) * _step(y - 0.62, 0.3)
    tissue = (
        tissue
        + abdomen * (0.17 - 0.12 * np.clip(y - 0.5, 0.0, None))
        + 0.05 * _step(-0.35 - y, 0.3) * _step(0.4 - ax, 0.3)
    )
    bubble_x, bubble_size, bubble_on = scene.bubble
    if bubble_on > 0.35:
        center = (bubble_x, scene.dome[1] + 0.06 + bubble_size)
        tissue = tissue - 0.2 * _step(_ellipse(x, y, center, (1.35 * bubble_size, bubble_size), 0.15), 0.04)

    # Mediastinum with aortic knob and pulmonary trunk, heart, spine and airway.
    middle = scene.mediastinum + 0.03 * _step(y + 0.1, 0.3) + 0.03 * _step(-0.5 - y, 0.2)
    vessels_of_heart = _join(
        _ellipse(x, y, (0.08, -0.27), (0.115, 0.13)), _ellipse(x, y, (0.09, -0.02), (0.125, 0.22), -0.15), 0.06
    )
    present = {finding.name: finding for finding in scene.findings}
    enlargement = _enlargement(present["cardiomegaly"]) if "cardiomegaly" in present else 0.0
    heart = _heart(x, y, scene, enlargement)
    on_diaphragm = _step(diaphragm + 0.1 - y, 0.14)
    silhouette = _step(_join(_join(middle - ax, vessels_of_heart, 0.05), heart, 0.12), 0.035) * (
        _step(0.1 - ax, 0.1) * (1.0 - on_diaphragm) + on_diaphragm
    )

    # Lungs, with vessels that fan out of the hila.
    fine = _smooth_noise(rng, resolution, 22)
    air = outline["right"] + outline["left"]
    hilum = np.exp(-(((ax - 0.21) / 0.1) ** 2) - ((y + 0.03) / 0.17) ** 2)
    vessels = _vessels(ax, y, x, rng)
    rim = _step(ax - chest_edge + 0.09, 0.12)
    lung_level = scene.lung_level + 0.06 * y + 0.08 * hilum + 0.11 * vessels + 0.02 * fine + 0.014 * coarse + 0.05 * rim
    image = tissue + air * (lung_level - tissue) * 0.95
    dense = scene.tissue_level + 0.2 + 0.04 * _step(y, 0.5) + 0.012 * coarse
    image = image + silhouette * (dense - image) * 0.92
    vertebrae = 0.5 + 0.5 * np.cos(2 * math.pi * (y + 0.02) / 0.15)
    image = image + _step(0.085 - ax, 0.025) * (0.03 + 0.025 * vertebrae) * _step(y + 0.9, 0.1)
    image = image - 0.1 * _step(0.042 - np.abs(x + 0.008), 0.025) * _step(-0.2 - y, 0.08) * _step(y + 1.05, 0.1)
    if scene.breast > 0:
        crescent = _ellipse(ax, y, (0.48, 0.16), (0.34, 0.3), -0.3)
        image = image + scene.breast * _step(crescent, 0.16) * _step(y - 0.05, 0.3)

    image, bone, pieces = _add_findings(scene, lungs, outline, silhouette, image)
    if "cardiomegaly" in present:
        pieces["cardiomegaly"] = ((heart > 0) & (y < diaphragm + 0.02),)
    image = image + bone * _bones(scene, x, ax, y, chest_edge, silhouette)
    image = body * image * (1.0 - 0.06 * (u * u + v * v))
    image = ndimage.gaussian_filter(image, 0.45 * resolution / 128, mode="nearest")
    # The grain is smooth, so that an autoencoder that reduces by 8 can follow it.
    image = image + 0.007 * _smooth_noise(rng, resolution, 40)
    toned = np.clip(1.12 * np.clip(image, 0.0, 1.0) ** scene.gamma, 0.0, 1.0)
    return Drawing((scene.black + (scene.white - scene.black) * toned).astype(np.float32), pieces)


def _add_findings(
    scene: Scene, lungs: Mapping[str, _Lung], outline: Mapping[str, Array], silhouette: Array, image: Array
) -> tuple[Array, Array, dict[str, tuple[NDArray[np.bool_], ...]]]:
    """Compose the findings of the lungs; returns the image, how far bones still show, and the masks."""
    pieces: dict[str, tuple[NDArray[np.bool_], ...]] = {}
    bone = np.ones_like(image)
    for finding in scene.findings:
        if finding.name not in _PATCHES:
            continue
        masks = []
        for k, side in enumerate(("right", "left") if finding.side == "bilateral" else (finding.side,)):
            variation = np.asarray(finding.variation[12 * k : 12 * k + 12], dtype=np.float32)
            patch = _PATCHES[finding.name](finding, variation, lungs[side])
            visible = outline[side] * (1.0 - 0.96 * silhouette)
            change = patch.level - image
            if finding.name == "pneumothorax":
                seen = patch.alpha * visible
            else:
                # What is as bright as heart and diaphragm hides their edges: no dark seam may stay between them.
                seen = patch.alpha * np.clip(2.0 * outline[side], 0.0, 1.0)
                change = np.maximum(change, 0.0)
            image = image + seen * change
            bone = bone * (1.0 - patch.hidden_bone * seen)
            masks.append(patch.alpha * visible > _MASK_THRESHOLD)
        pieces[finding.name] = tuple(masks)
    return image, bone, pieces


def _enlargement(finding: Finding) -> float:
    return {"small": 0.38, "moderate": 0.52, "large": 0.66}[finding.size] + 0.06 * finding.variation[0]


def _heart(x: Array, y: Array, scene: Scene, enlargement: float) -> Array:
    """Distance, positive inside. Ventricle to the patient's left, atrium to the right; more widened than heightened."""
    wide = scene.heart_scale * (1.0 + enlargement)
    high = scene.heart_scale * (1.0 + 0.4 * enlargement)
    ventricle = _ellipse(x, y, (0.115 * wide, 0.27), (0.34 * wide, 0.23 * high), scene.heart_lean)
    atrium = _ellipse(x, y, (-0.06 * wide, 0.23), (0.17 * wide, 0.24 * high))
    return _join(ventricle, atrium, 0.05)


def _vessels(ax: Array, y: Array, x: Array, rng: np.random.Generator) -> Array:
    """Branching streaks around each hilum, fading towards the chest wall."""
    dx, dy = ax - 0.12, y + 0.05
    radius = np.sqrt(dx * dx + dy * dy)
    angle = np.arctan2(dy, dx)
    phase = [float(value) for value in rng.uniform(0.0, 2 * math.pi, 4)]
    bend = np.sin(6.0 * radius + phase[0]) + np.where(x < 0, phase[1], phase[2])
    # The number of streaks doubles on the way out, as vessels branch.
    trunks = _step(np.cos(7.0 * angle + bend) - 0.45, 0.55) * _step(0.34 - radius, 0.14)
    twigs = _step(np.cos(14.0 * angle + 2.0 * bend + phase[3]) - 0.4, 0.6) * _step(radius - 0.22, 0.1)
    return (trunks + 0.75 * twigs) * np.exp(-((radius / 0.48) ** 2)) * _step(radius - 0.08, 0.08)


def _bones(scene: Scene, x: Array, ax: Array, y: Array, chest_edge: Array, silhouette: Array) -> Array:
    """Added brightness of ribs (posterior and, fainter, anterior), clavicles and shoulder blades."""
    cage = _step(chest_edge + 0.07 - ax, 0.05) * _step(y - scene.lung_apex + 0.03, 0.06) * _step(0.55 - y, 0.2)
    posterior = y - scene.rib_slope * (ax - 0.2) ** 2 - 0.1 * ax
    wave = np.cos(2 * math.pi * (posterior / scene.rib_spacing + scene.rib_phase))
    # A rib is denser at its edges than in its middle.
    ribs = (_step(wave - 0.15, 0.4) - 0.25 * _step(wave - 0.75, 0.3)) * _step(ax - 0.06, 0.04)
    anterior = y + 0.75 * ax - 0.55 * ax * ax
    wave = np.cos(2 * math.pi * (anterior / (1.25 * scene.rib_spacing) + 0.5 * scene.rib_phase))
    ribs = ribs + 0.45 * _step(wave - 0.3, 0.6) * _step(ax - 0.3, 0.12)
    bones = scene.rib_strength * ribs * cage * (1.0 - 0.75 * silhouette)
    clavicle = scene.clavicle - 0.16 * np.sin(1.9 * (ax - 0.08)) + 0.05 * np.sin(6.0 * (ax - 0.08))
    bones = bones + 0.12 * _step(0.034 - np.abs(y - clavicle), 0.022) * _step(ax - 0.1, 0.04) * _step(0.82 - ax, 0.06)
    blade = _ridge(ax - 0.76 - 0.14 * np.clip(y + 0.2, -1.0, 1.0), 0.045)
    bones = bones + 0.06 * blade * _step(y + 0.62, 0.1) * _step(-0.02 - y, 0.2)
    humerus = _step(_ellipse(ax, y, (0.97, scene.clavicle - 0.04), (0.11, 0.12)), 0.03)
    shaft = _step(0.075 - np.abs(ax - 1.0 - 0.2 * (y - scene.clavicle)), 0.03) * _step(y - scene.clavicle, 0.05)
    return bones + 0.08 * np.maximum(humerus, shaft)


class _Patch(NamedTuple):
    """What a finding does in one lung: the picture moves to `level` by `alpha`, bones fade by `hidden_bone`."""

    alpha: Array
    level: Array | float
    hidden_bone: float


def _center(finding: Finding, variation: Array, lung: _Lung) -> tuple[Array, Array]:
    """Offsets (across, y) from a point inside the finding's zone."""
    across = 0.42 + 0.1 * (variation[0] - 0.5) + {"upper": -0.03, "mid": 0.03, "lower": 0.08}[finding.zone]
    y = _ZONE_Y[finding.zone] + 0.08 * (variation[1] - 0.5)
    return lung.across - across, lung.y - y


def _opacity(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """One soft round cloud; the ribs shine through."""
    dx, dy = _center(finding, variation, lung)
    radius = {"small": 0.2, "moderate": 0.245, "large": 0.29}[finding.size]
    distance = (dx / radius) ** 2 + (dy / (radius * (0.9 + 0.3 * variation[2]))) ** 2
    return _Patch(0.88 * np.exp(-0.8 * distance**1.5), 0.63, 0.3)


def _consolidation(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """A white lobe that ends sharply at a straight fissure and softly elsewhere; the costophrenic angle stays free."""
    height = {"small": 0.27, "moderate": 0.35, "large": 0.43}[finding.size]
    middle = _ZONE_Y[finding.zone] + 0.05 * (variation[1] - 0.5)
    y = lung.y + (0.15 + 0.25 * variation[0]) * (lung.across - 0.4) * (-1.0 if finding.zone == "lower" else 1.0)
    if finding.zone == "upper":
        lobe = _step(middle + 0.5 * height - y, 0.018)
    else:
        lobe = _step(y - middle + 0.5 * height, 0.018) * _step(middle + 0.5 * height - y, 0.1)
        lobe = lobe * _step(lung.diaphragm() - 0.07 - lung.y, 0.04)
    if finding.size == "small" and finding.zone != "lower":
        lobe = lobe * _step(lung.width - 0.14 - lung.across, 0.1)
    return _Patch(0.96 * lobe, 0.72, 0.8)


def _atelectasis(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """Parallel bright plates over a faint haze."""
    dx, dy = _center(finding, variation, lung)
    half_length = {"small": 0.24, "moderate": 0.28, "large": 0.32}[finding.size]
    half_height = {"small": 0.14, "moderate": 0.165, "large": 0.2}[finding.size]
    across = dy - (0.6 * variation[2] - 0.2) * dx + (0.5 * variation[3]) * dx * dx
    envelope = _step(half_length - np.abs(dx), 0.09) * _step(half_height - np.abs(across), 0.03)
    plates = _step(np.cos(2 * math.pi * across / 0.12) - 0.35, 0.5)
    return _Patch((0.38 + 0.55 * plates) * envelope, 0.7, 0.7)


def _pneumonia(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """Cluster of blotches with dark airways that branch from the hilum."""
    dx, dy = _center(finding, variation, lung)
    spread = {"small": 0.14, "moderate": 0.175, "large": 0.21}[finding.size]
    thin = np.ones_like(dx + dy)
    for k in range(7):
        bearing = 2 * math.pi * (float(variation[2]) + k / 7 * 2.6)
        distance = spread * (0.35 + 0.13 * k)
        radius = 0.07 + 0.04 * variation[3 + k]
        blotch = ((dx - distance * math.cos(bearing)) ** 2 + (dy - distance * math.sin(bearing)) ** 2) / radius**2
        thin = thin * (1.0 - 0.85 * np.exp(-0.6 * blotch**1.5))
    trunk = dy + 0.25 * dx - 0.03 * np.sin(14.0 * dx)
    airway = np.maximum(_ridge(trunk, 0.032), _ridge(trunk - 0.8 * np.clip(dx + 0.05, 0.0, None), 0.032))
    airway = np.maximum(airway, _ridge(trunk + 0.8 * np.clip(dx + 0.02, 0.0, None), 0.03))
    return _Patch(0.95 * (1.0 - thin) * (1.0 - 0.45 * airway), 0.7, 0.6)


def _edema(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """One wing of the perihilar haze."""
    size = {"small": 0.9, "moderate": 1.05, "large": 1.2}[finding.size]
    dx, dy = lung.across - 0.22, lung.y + 0.02
    distance = (dx / (0.36 * size)) ** 2 + ((dy - 0.25 * dx) / (0.33 * size)) ** 2
    streaks = np.cos(2 * math.pi * (dy - 0.6 * dx) / 0.13 + 6.0 * variation[0])
    return _Patch(np.exp(-0.7 * distance**2) * (0.76 + 0.08 * streaks), 0.62, 0.4)


def _effusion(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """Fluid over the base that climbs at the chest wall."""
    height = {"small": 0.22, "moderate": 0.38, "large": 0.55}[finding.size] + 0.04 * variation[0]
    wall = np.clip((lung.across - 0.25) / (lung.width - 0.25), 0.0, 1.0)
    surface = lung.dome + 0.12 - height - (0.15 + 0.25 * height) * wall**2.5
    return _Patch(0.97 * _step(lung.y - surface, 0.04), 0.73, 0.8)


def _pneumothorax(finding: Finding, variation: Array, lung: _Lung) -> _Patch:
    """Dark rim without vessels between the chest wall and the thin bright line of the collapsed lung."""
    inset = {"small": 0.1, "moderate": 0.16, "large": 0.23}[finding.size] + 0.02 * variation[0]
    drop = {"small": 0.19, "moderate": 0.23, "large": 0.29}[finding.size] + 0.03 * variation[1]
    if finding.size == "small":
        inset = inset * _step(0.1 - lung.y, 0.35)
    collapsed = lung.shape(apex_drop=drop, inset=inset, raised=-0.15)
    line = 4.0 * collapsed * (1.0 - collapsed)
    return _Patch(np.maximum(1.0 - collapsed, 0.75 * line), 0.06 + 0.4 * line, 0.5)


_PATCHES: dict[str, Callable[[Finding, Array, _Lung], _Patch]] = {
    "atelectasis": _atelectasis,
    "consolidation": _consolidation,
    "edema": _edema,
    "lung opacity": _opacity,
    "pleural effusion": _effusion,
    "pneumonia": _pneumonia,
    "pneumothorax": _pneumothorax,
}


# ------------------------------------------------------------------------------------------------------- caption

# Phrases that name a finding. A leading "a" is an article, left out or kept as the sentence needs.
_PHRASES: dict[str, tuple[str, ...]] = {
    "atelectasis": (
        "plate-like atelectasis in the {place}",
        "linear atelectasis in the {place}",
        "atelectatic bands in the {place}",
        "{place} atelectasis",
        "{extent} atelectasis of the {place}",
    ),
    "cardiomegaly": (
        "{degree} cardiomegaly",
        "cardiomegaly",
        "cardiomegaly of {degree} degree",
        "a enlarged cardiac silhouette",
        "{degree} enlargement of the cardiac silhouette",
    ),
    "consolidation": (
        "a {size} consolidation in the {place}",
        "dense consolidation of the {place}",
        "{place} consolidation",
        "consolidative change in the {place}",
        "a {size} area of consolidation in the {place}",
    ),
    "edema": (
        "{degree} pulmonary edema",
        "{degree} perihilar edema",
        "{degree} bilateral edema",
        "interstitial edema in both lungs",
        "vascular congestion with {degree} edema",
    ),
    "lung opacity": (
        "a {size} hazy opacity in the {place}",
        "a {place} opacity",
        "a focal lung opacity in the {place}",
        "hazy opacification of the {place}",
        "a {size} opacity projecting over the {place}",
    ),
    "pleural effusion": (
        "a {size} {side} pleural effusion",
        "a {side}-sided pleural effusion of {size} size",
        "a {size} effusion at the {side} lung base",
        "a {size} {side} effusion",
        "{extent} pleural fluid at the {side} base",
    ),
    "pneumonia": (
        "patchy pneumonia in the {place}",
        "{place} pneumonia",
        "a {size} area of pneumonia in the {place}",
        "pneumonia with air bronchograms in the {place}",
        "{extent} pneumonia of the {place}",
    ),
    "pneumothorax": (
        "a {size} {side} pneumothorax",
        "a {size} {side}-sided pneumothorax",
        "a {side} apical pneumothorax",
        "a {size} pneumothorax at the {side} apex",
        "a pneumothorax on the {side}",
    ),
}
_BILATERAL_PHRASES: dict[str, tuple[str, ...]] = {
    "lung opacity": (
        "hazy opacities in both {zone} zones",
        "bilateral {zone} zone opacities",
        "{size} bilateral lung opacities",
        "opacification of both {zone} zones",
    ),
    "pleural effusion": (
        "{size} bilateral pleural effusions",
        "bilateral effusions of {size} size",
        "{size} effusions at both lung bases",
        "pleural effusions on both sides",
    ),
}
_PLURAL = re.compile(r"\b(bands|opacities|effusions)\b")
_DEGREES: dict[Size, tuple[str, ...]] = {
    "small": ("mild", "slight"),
    "moderate": ("moderate",),
    "large": ("severe", "marked"),
}
_EXTENTS: dict[Size, tuple[str, ...]] = {
    "small": ("limited", "minor"),
    "moderate": ("moderate",),
    "large": ("extensive",),
}
# {0} has its article, {bare} has none; {are} agrees with the first phrase.
_POSITIVE = (
    "{bare}.",
    "There {are} {0}.",
    "{0} {are} seen.",
    "{0} {are} present.",
    "{0} {are} noted on this view.",
    "The radiograph shows {0}.",
    "The image demonstrates {0}.",
    "On this view there {are} {0}.",
    "In this patient {0} {are} found.",
    "Appearances suggest {0}.",
)
_POSITIVE_PAIR = (
    "{bare} and {1}.",
    "{bare} with {1}.",
    "There {are} {0} and {1}.",
    "{0} and {1} are seen.",
    "The radiograph shows {0} as well as {1}.",
    "On this view {0} and {1} are present.",
)
_NEGATIVE = (
    "No {0}.",
    "There is no {0}.",
    "No evidence of {0}.",
    "No {0} is seen.",
    "Negative for {0}.",
    "The radiograph shows no {0}.",
    "On this view there is no {0}.",
)
_NEGATIVE_NOUNS: dict[str, tuple[str, ...]] = {
    "atelectasis": ("atelectasis",),
    "cardiomegaly": ("cardiomegaly",),
    "consolidation": ("consolidation", "focal consolidation"),
    "edema": ("edema", "pulmonary edema"),
    "lung opacity": ("opacity", "lung opacity", "focal opacity"),
    "pleural effusion": ("effusion", "pleural effusion"),
    "pneumonia": ("pneumonia",),
    "pneumothorax": ("pneumothorax",),
}
_NORMAL = (
    ("The mediastinal contours are normal.", "Mediastinum is unremarkable.", "Normal mediastinum."),
    ("No acute bony abnormality.", "The bones are intact.", "The visualized ribs are unremarkable."),
    ("The trachea is midline.", "Midline trachea."),
    ("Frontal chest radiograph.", "Single frontal view of the chest.", "Portable chest radiograph."),
)
_NORMAL_HEART = (
    "Heart size is normal.",
    "The heart is normal in size.",
    "Normal heart size.",
    "The heart is not enlarged.",
)
_MAX_WORDS = 44


def write_caption(
    scene: Scene, rng: np.random.Generator, style: CaptionStyle = "reports"
) -> tuple[str, dict[str, str]]:
    """A caption of 1-4 sentences and at most 44 words, and the phrase that names each finding in it.

    Findings are named in positive sentences only; negated ones name findings that the scene does not have. Sentences
    come in any order, so that the place of a word does not tell the finding. style: see `PhantomDataset`.
    """

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    present = [scene.findings[k] for k in rng.permutation(len(scene.findings))]
    names = {finding.name for finding in present}
    phrases = {finding.name: _phrase(finding, pick) for finding in present}
    queue = list(phrases.values())
    stated = []
    while queue:
        if len(queue) > 1 and rng.random() < 0.35:
            first, second = queue.pop(), queue.pop()
            stated.append(_render(pick(_POSITIVE_PAIR), first, second))
        else:
            stated.append(_render(pick(_POSITIVE), queue.pop()))

    absent = [name for name in rng.permutation(FINDINGS) if name not in names]
    negated = []
    for _ in range(2):
        count = int(rng.integers(1, 4))
        nouns = [pick(_NEGATIVE_NOUNS[name]) for name in absent[:count]]
        absent = absent[count:]
        listed = nouns[0] if count == 1 else f"{', '.join(nouns[:-1])} or {nouns[-1]}"
        negated.append(_render(pick(_NEGATIVE), listed))
    optional = (negated if style == "reports" else []) + [pick(options) for options in _NORMAL]
    if "cardiomegaly" not in names:
        optional.append(pick(_NORMAL_HEART))
    in_lungs = [finding for finding in present if finding.name != "cardiomegaly"]
    sides = {finding.side for finding in in_lungs}
    if not in_lungs:
        optional.append(pick(("The lungs are clear.", "Clear lungs.", "Both lungs are well aerated.")))
    elif len(sides) == 1 and "bilateral" not in sides:
        other = "right" if sides == {"left"} else "left"
        optional.append(pick((f"The {other} lung is clear.", f"Clear {other} lung.")))
    if "pleural effusion" not in names:
        optional.append(pick(("The costophrenic angles are sharp.", "Sharp costophrenic angles.")))

    extra = int(rng.integers(0, 5 - len(stated))) if stated else int(rng.integers(1, 5))
    if style == "stated":
        extra = 0 if stated else 1
    # Negated findings are as frequent in reports as stated ones, hence the greater weight.
    weights = np.array([3.0 if sentence in negated else 1.0 for sentence in optional])
    chosen = rng.choice(len(optional), size=extra, replace=False, p=weights / weights.sum())
    added = [optional[k] for k in chosen]
    while sum(len(sentence.split()) for sentence in stated + added) > _MAX_WORDS:
        added.pop()
    sentences = stated + added
    may_add = style != "stated" and in_lungs and "edema" not in names and len(sentences) < 4
    if may_add and rng.random() < 0.2:
        order = [sentences[k] for k in rng.permutation(len(sentences))]
        return " ".join([*order, "The lungs are otherwise clear."]), phrases
    return " ".join(sentences[k] for k in rng.permutation(len(sentences))), phrases


def _phrase(finding: Finding, pick: Callable[[Sequence[str]], str]) -> str:
    options = _BILATERAL_PHRASES if finding.side == "bilateral" and finding.name in _BILATERAL_PHRASES else _PHRASES
    places = ["{side} {zone} zone", "{side} {zone} lung", "{side} {zone} lung zone", "{side} lung"]
    if finding.zone != "mid":
        places.append("{side} {zone} lobe")
    if finding.zone == "lower":
        places.append("{side} lung base")
    words = {"side": finding.side, "zone": finding.zone, "size": finding.size}
    return pick(options[finding.name]).format(
        **words,
        place=pick(places).format(**words),
        degree=pick(_DEGREES[finding.size]),
        extent=pick(_EXTENTS[finding.size]),
    )


def _render(template: str, *phrases: str) -> str:
    def with_article(phrase: str) -> str:
        return f"an {phrase[2:]}" if re.match(r"a [aeiou]", phrase) else phrase

    bare = phrases[0].removeprefix("a ")
    verb = "are" if _PLURAL.search(phrases[0]) else "is"
    text = template.format(*(with_article(phrase) for phrase in phrases), bare=bare, are=verb)
    return text[0].upper() + text[1:]


# ------------------------------------------------------------------------------------------------------- dataset


class PhantomDataset:
    """Infinite procedural data behind a finite length; implements `distill.data.sample.ImageCaptionDataset`.

    Row i is a pure function of (seed, split, i, resolution), whatever the size; no two splits share a row.

    split: train, validation or test. size: number of rows. seed: 0 to 2**32 - 1. resolution: side in pixels, 64 to 512.
    captions: reports (findings, negated findings, normal sentences), affirmed (no negated findings), or stated (the findings
    alone, or one normal sentence where there is none). companions: probability, 0 to 1, that a finding brings the one that it
    is paired with (heart and edema, effusion and atelectasis, and so on); at 0 findings are independent.
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
        companions: float = 0.0,
    ) -> None:
        faults = []
        if split not in _SPLIT_CODES:
            faults.append(f"no split '{split}'; available: {', '.join(_SPLIT_CODES)}")
        if size < 1:
            faults.append(f"size is {size}; it must be at least 1")
        if not 0 <= seed < 2**32:
            faults.append(f"seed is {seed}; it must be in 0 .. 2**32 - 1")
        if not 64 <= resolution <= 512:
            faults.append(f"resolution is {resolution}; phantoms are drawn at 64 to 512 pixels")
        if not 0 <= companions <= 1:
            faults.append(f"companions is {companions}; it must be in 0 .. 1")
        raise_all("phantom data", faults)
        self.split: Split = split
        self.size, self.seed, self.resolution = size, seed, resolution
        self.captions: CaptionStyle = captions
        self.companions = companions

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        caption, phrases = self._text(scene, index)
        drawing = draw(scene, self.resolution)
        gray = torch.from_numpy(drawing.image * 2.0 - 1.0)
        labels = tuple(finding.name for finding in scene.findings)
        regions = tuple(
            Region(
                finding=name,
                mask=torch.from_numpy(np.logical_or.reduce(drawing.pieces[name])),
                boxes=tuple(_box(piece) for piece in drawing.pieces[name]),
                phrase=phrases[name].removeprefix("a "),
            )
            for name in labels
        )
        return Sample(
            id=f"phantom-{self.seed}-{self.split}-{index}",
            pixel_values=gray.expand(3, -1, -1).contiguous(),
            caption=caption,
            regions=regions,
            labels=labels,
            original_size=(self.resolution, self.resolution),
            meta={finding.name: f"{finding.size} {finding.side} {finding.zone}" for finding in scene.findings},
        )

    def scene(self, index: int) -> Scene:
        """What row `index` shows; costs microseconds. Raises IndexError outside the data set."""
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of a phantom data set with {self.size} rows")
        return draw_scene(self.seed, self.split, int(index), self.companions)

    def _text(self, scene: Scene, index: int) -> tuple[str, dict[str, str]]:
        rng = np.random.default_rng((self.seed, _SPLIT_CODES[self.split], int(index), _CAPTION))
        return write_caption(scene, rng, self.captions)

    def caption(self, index: int) -> str:
        """Caption of a row, without drawing it."""
        return self._text(self.scene(index), index)[0]

    def labels(self, index: int) -> tuple[str, ...]:
        """Findings of a row, without drawing it."""
        return tuple(finding.name for finding in self.scene(index).findings)

    def fingerprint(self, index: int) -> str:
        """Hash of all that decides a row."""
        key = f"phantom {GENERATOR_VERSION} {self.seed} {self.split} {index} {self.resolution}"
        if self.captions != "reports" or self.companions:
            key += f" {self.captions} {self.companions}"
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
    parser.add_argument("--split", choices=tuple(_SPLIT_CODES), default="train")
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
