"""What a phantom shows: pose, anatomy and findings, in units of half the image side. Drawn from (seed, split,
index)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
CaptionStyle = Literal["reports", "affirmed", "stated", "labels"]
Placement = Literal["anatomical", "balanced"]
Array = NDArray[np.floating[Any]]

SPLIT_CODES: dict[str, int] = {"train": 0, "validation": 1, "test": 2}
SCENE, TEXTURE, CAPTION = 0, 1, 2
"""What a random stream of a row is for."""
_SIZES: tuple[Size, ...] = ("small", "moderate", "large")
_ZONES: tuple[Zone, ...] = ("upper", "mid", "lower")
ZONE_Y: dict[Zone, float] = {"upper": -0.40, "mid": -0.08, "lower": 0.22}


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
    unnamed: tuple[Finding, ...] = ()
    """Findings that are drawn, and that the caption neither names nor denies."""


def draw_scene(seed: int, split: Split, index: int, placement: Placement = "anatomical") -> Scene:
    """The scene of row `index`: a pure function of its arguments. placement: see `PhantomDataset`."""
    key = (seed, SPLIT_CODES[split], index)
    rng = np.random.default_rng((*key, SCENE))

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    width = between(0.94, 1.06)
    dome = between(0.33, 0.44)
    scene = Scene(
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
        texture_seed=(*key, TEXTURE),
        findings=(),
    )
    if placement == "anatomical":
        return replace(scene, findings=_draw_findings(rng))
    # Shifted and enlarged, so that lungs do not always lie at the same pixels either.
    size = between(1.1, 1.4)
    scene = replace(scene, center=(between(-0.3, 0.3), between(-0.3, 0.3)), scale=(size, size))
    named, unnamed = _draw_balanced(rng)
    return replace(scene, findings=named, unnamed=unnamed)


def _draw_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """0-3 findings that do not share a place; a finding that finds no free place is left out."""
    count = int(rng.choice(4, p=(0.19, 0.33, 0.31, 0.17)))
    taken: set[tuple[str, str]] = set()
    findings = []
    names = [str(name) for name in rng.permutation(FINDINGS)[:count]]
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


MOVABLE = ("atelectasis", "consolidation", "lung opacity", "pneumonia")
"""Findings that can lie on either side and in any zone."""


def _draw_balanced(rng: np.random.Generator) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """One finding for the caption to name, in one of six places, each equally likely; half of the time another kind of
    finding in another place, unnamed. Nothing in 15 % of the images."""
    if rng.random() < 0.15:
        return (), ()
    names, places = rng.permutation(MOVABLE), rng.permutation(6)
    sides: tuple[Side, Side] = ("left", "right")
    drawn = [
        Finding(
            str(name),
            sides[int(place) % 2],
            _ZONES[int(place) // 2],
            _SIZES[rng.integers(3)],
            tuple(float(value) for value in rng.random(24)),
        )
        for name, place in zip(names[:2], places[:2], strict=True)
    ]
    return (drawn[0],), (drawn[1],) if rng.random() < 0.5 else ()


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
