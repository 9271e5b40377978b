"""A phantom's scene -> its pixels and the exact masks of its findings, at any resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from distill.data.phantom.scene import ZONE_Y, Array, Finding, Scene

MASK_THRESHOLD = 0.3


@dataclass(frozen=True)
class Drawing:
    """image: (height, width) float32 in [0, 1]; pieces: for each finding its (height, width) bool masks, one a side."""

    image: Array
    pieces: Mapping[str, tuple[NDArray[np.bool_], ...]]


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
    returned: Array = (basis / np.sqrt((basis**2).sum(1, keepdims=True))).astype(np.float32)
    returned[returned < 1e-30] = 0.0  # products of such numbers are denormal, which takes a CPU ten times as long
    return returned


def _smooth_noise(rng: np.random.Generator, resolution: int, knots: int) -> Array:
    """(resolution, resolution) smooth noise of about unit variance; the same field at any resolution."""
    basis = _noise_basis(resolution, knots)
    returned: Array = basis @ rng.standard_normal((knots, knots), dtype=np.float32) @ basis.T
    return returned


def _step(distance: Array, width: float) -> Array:
    """Smooth step from 0 to 1 as distance goes from -width to width."""
    t = np.clip(distance * (0.5 / width) + 0.5, 0.0, 1.0)
    returned: Array = t * t * (3.0 - 2.0 * t)
    return returned


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
        returned: Array = 0.29 + (self.width - inset - 0.29) * np.sqrt(1.0 - (1.0 - t) ** 2.6)
        return returned

    def diaphragm(self) -> Array:
        flank = np.clip(self.across - self.width + 0.15, 0.0, None)
        returned: Array = self.dome + 1.1 * (self.across - 0.34) ** 2 + 5.0 * flank**2
        return returned

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


class _Anatomy(NamedTuple):
    """What findings are drawn into. x, ax, y: the patient's coordinates. All but y are (resolution, resolution)."""

    x: Array
    ax: Array
    y: Array
    lungs: Mapping[str, _Lung]
    outline: Mapping[str, Array]
    diaphragm: Array
    heart: Array
    silhouette: Array


def _anatomy(scene: Scene, resolution: int) -> _Anatomy:
    """Lungs, and the silhouette of mediastinum, aortic knob, pulmonary trunk and heart."""
    x, y, lungs = _place(scene, resolution)
    ax = np.abs(x)
    diaphragm = np.where(x < 0, lungs["right"].diaphragm(), lungs["left"].diaphragm())
    middle = scene.mediastinum + 0.03 * _step(y + 0.1, 0.3) + 0.03 * _step(-0.5 - y, 0.2)
    vessels_of_heart = _join(
        _ellipse(x, y, (0.08, -0.27), (0.115, 0.13)), _ellipse(x, y, (0.09, -0.02), (0.125, 0.22), -0.15), 0.06
    )
    enlarged = [finding for finding in scene.findings if finding.name == "cardiomegaly"]
    heart = _heart(x, y, scene, _enlargement(enlarged[0]) if enlarged else 0.0)
    on_diaphragm = _step(diaphragm + 0.1 - y, 0.14)
    silhouette = _step(_join(_join(middle - ax, vessels_of_heart, 0.05), heart, 0.12), 0.035) * (
        _step(0.1 - ax, 0.1) * (1.0 - on_diaphragm) + on_diaphragm
    )
    return _Anatomy(x, ax, y, lungs, {s: lung.shape() for s, lung in lungs.items()}, diaphragm, heart, silhouette)


def masks(scene: Scene, resolution: int) -> Mapping[str, tuple[NDArray[np.bool_], ...]]:
    """The pieces of `draw`, without the picture: a third of the time."""
    body = _anatomy(scene, resolution)
    found = {
        finding.name: tuple(piece.mask for piece in _pieces(finding, body))
        for finding in scene.findings
        if finding.name in _PATCHES
    }
    return found | _heart_mask(scene, body)


def draw(scene: Scene, resolution: int) -> Drawing:
    """Pixels and masks of a scene. The same scene without a finding differs only by what that finding does."""
    u, v = _grid(resolution)
    anatomy = _anatomy(scene, resolution)
    x, ax, y, lungs, outline, diaphragm, _, silhouette = anatomy
    rng = np.random.default_rng(scene.texture_seed)
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

    image, bone, pieces = _add_findings(scene, anatomy, image)
    image = image + bone * _bones(scene, x, ax, y, chest_edge, silhouette)
    image = body * image * (1.0 - 0.06 * (u * u + v * v))
    image = ndimage.gaussian_filter(image, 0.45 * resolution / 128, mode="nearest")
    # The grain is smooth, so that an autoencoder that reduces by 8 can follow it.
    image = image + 0.007 * _smooth_noise(rng, resolution, 40)
    toned = np.clip(1.12 * np.clip(image, 0.0, 1.0) ** scene.gamma, 0.0, 1.0)
    picture = (scene.black + (scene.white - scene.black) * toned).astype(np.float32)
    return Drawing(picture, pieces | _heart_mask(scene, anatomy))


class _Piece(NamedTuple):
    """A finding in one lung. outline, alpha and mask: (resolution, resolution)."""

    patch: _Patch
    outline: Array
    visible: Array
    mask: NDArray[np.bool_]


def _pieces(finding: Finding, anatomy: _Anatomy) -> Iterator[_Piece]:
    """The right one first."""
    for k, side in enumerate(("right", "left") if finding.side == "bilateral" else (finding.side,)):
        variation = np.asarray(finding.variation[12 * k : 12 * k + 12], dtype=np.float32)
        patch = _PATCHES[finding.name](finding, variation, anatomy.lungs[side])
        visible = anatomy.outline[side] * (1.0 - 0.96 * anatomy.silhouette)
        yield _Piece(patch, anatomy.outline[side], visible, patch.alpha * visible > MASK_THRESHOLD)


def _heart_mask(scene: Scene, anatomy: _Anatomy) -> dict[str, tuple[NDArray[np.bool_], ...]]:
    """That of cardiomegaly, where there is one."""
    if all(finding.name != "cardiomegaly" for finding in scene.findings):
        return {}
    return {"cardiomegaly": ((anatomy.heart > 0) & (anatomy.y < anatomy.diaphragm + 0.02),)}


def _add_findings(
    scene: Scene, anatomy: _Anatomy, image: Array
) -> tuple[Array, Array, dict[str, tuple[NDArray[np.bool_], ...]]]:
    """Compose the findings of the lungs; returns the image, how far bones still show, and the masks."""
    found: dict[str, tuple[NDArray[np.bool_], ...]] = {}
    bone = np.ones_like(image)
    for finding in (*scene.findings, *scene.unnamed):
        if finding.name not in _PATCHES:
            continue
        pieces = list(_pieces(finding, anatomy))
        for patch, outline, visible, _ in pieces:
            change = patch.level - image
            if finding.name == "pneumothorax":
                seen = patch.alpha * visible
            else:
                # What is as bright as heart and diaphragm hides their edges: no dark seam may stay between them.
                seen = patch.alpha * np.clip(2.0 * outline, 0.0, 1.0)
                change = np.maximum(change, 0.0)
            image = image + seen * change
            bone = bone * (1.0 - patch.hidden_bone * seen)
        found[finding.name] = tuple(piece.mask for piece in pieces)
    return image, bone, found


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
    returned: Array = (trunks + 0.75 * twigs) * np.exp(-((radius / 0.48) ** 2)) * _step(radius - 0.08, 0.08)
    return returned


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
    y = ZONE_Y[finding.zone] + 0.08 * (variation[1] - 0.5)
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
    middle = ZONE_Y[finding.zone] + 0.05 * (variation[1] - 0.5)
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
