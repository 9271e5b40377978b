"""Generic captioned pictures: what the bundled base is pretrained on, as Stable Diffusion is on web images.

Gray pictures of shapes, textures and pictograms. The pictograms carry the finding words of the phantom outside any
chest (an "effusion" is liquid in the bottom of a jar, "atelectasis" a stack of thin plates), so that the base knows the
words and not the chest. Picture i is a function of (seed, split, i, resolution, clear) only. Clear pictures stand to
the others as the aesthetic subset of LAION, on which Stable Diffusion was trained last, to all of it: larger objects,
upright, fewer a picture, bright ones of more contrast, and less relief in the background. Clear picture i and the other
picture i have draws in common, such as the kinds of their background and first object.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import zoom

from distill.data.sample import Region, Sample

VERSION = 1
SPLITS = {"train": 11, "validation": 12, "test": 13}

# kind -> words that name it in captions
WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "ring": ("ring",),
    "cross": ("cross",),
    "star": ("star",),
    "diamond": ("diamond",),
    "bar": ("bar", "line"),
    "grid": ("grid", "mesh"),
    "arch": ("arch", "rib"),
    "moon": ("moon",),
    "zigzag": ("zigzag",),
    "atelectasis": ("atelectasis", "atelectatic plates"),
    "cardiomegaly": ("cardiomegaly", "cardiac shape"),
    "consolidation": ("consolidation", "consolidative block"),
    "edema": ("edema",),
    "lung opacity": ("opacity", "opacification"),
    "pleural effusion": ("pleural effusion", "effusion"),
    "pneumonia": ("pneumonia",),
    "pneumothorax": ("pneumothorax",),
}
KINDS = tuple(WORDS)
POSITIONS = (
    ("upper left", "top", "upper right"),
    ("left", "center", "right"),
    ("lower left", "bottom", "lower right"),
)
BACKGROUNDS = ("plain", "gradient", "cloudy", "striped", "dotted", "checked", "grainy")
# Web captions carry words that say nothing about the picture; so do these.
UNRELATED = (
    "Photo of the day.",
    "Free download.",
    "The lungs are clear.",
    "Heart size is normal.",
    "No acute findings.",
    "Frontal chest radiograph.",
    "The mediastinal contours are unremarkable.",
    "Comparison is made with the prior study.",
    "There is no evidence of acute disease.",
    "Drawn by hand in the studio.",
    "The lungs are otherwise clear.",
    "The cardiomediastinal silhouette is within normal limits.",
    "Bony structures are intact.",
    "Moderate, mild, small, large, right-sided, left-sided, bilateral, mid zone, lower zone, upper zone.",
    "Stable appearance of the lungs, with normal vascular markings.",
)


# Words of English and of radiology reports: unrelated sentences are drawn from them, so that the tokenizer keeps them
# whole and the text encoder has met them.
VOCABULARY = tuple(
    """
    a about above acute adjacent admission after again air airspace airways along also an and angle angles anterior aorta
    aortic apex apical appear appearance appears are area areas as associated at atrial available axillary back base bases
    basal basilar be been before below best better between bilateral blunting bone bones bony both bowel bronchograms but by
    calcified can cannot cardiomediastinal carina catheter central change changes chest chronic clear clinical coarse
    collapse compared comparison compatible concerning consistent contour contours correlate costophrenic cough could course
    current date day days decreased degenerative degree demonstrate demonstrates dense density diaphragm diffuse disease
    distal distribution do due early elevated elevation end endotracheal enlarged enlargement enteric evaluate evaluation
    evidence examination exclude expanded extensive extent fever field fields film findings fluid focal follow for fracture
    fractures free from frontal gastric given ground glass granuloma had has have hazy heart hemidiaphragm hernia hilar hila
    hilum history hour however image images impression in increase increased increasing indicate infection infectious
    infiltrate infiltrates inspiration interstitial interval into intact is it jugular lateral left less level likely limits
    line linear lines lobe lobes low lower lung lungs made man marked markedly markings may mediastinal mediastinum medical
    mid middle mild mildly minimal moderate moderately more most multifocal multiple near new no nodular nodule nodules non
    normal not noted now obscured obscuring observed of old on one or other otherwise over overlying pain pacemaker part
    patchy patient pattern peripheral perihilar persistent picture placement plate plates port portable position possible
    posterior postoperative predominantly present presentation previous prior process projection prominent pulmonary radiograph
    radiographs rather ray recent related remains represent representing residual respiratory reticular review right said
    scarring scattered seen sentence series severe shadow shadowing shift should show showed shows side sided sign
    significant silhouette since single site size slightly small smooth soft some spine stable standing status sternal
    stomach structures study subclavian subtle suggest suggesting suggestive superior support surgical suspected symptoms
    technique terminates than that the there these they this thoracic thorax those tip tissue to tortuous trace trachea
    tracheal tube tubes two unchanged under unremarkable up upper upright vascular vascularity vasculature vein venous
    vessels view views visible visualized volume volumes wall was well were when where which while whose widened with within
    without woman worse worsening year years yet zone zones
    """.split()
)


def _soft(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, with an edge of the given width in units of the object's radius."""
    return np.clip(0.5 - distance / softness, 0.0, 1.0)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int) -> np.ndarray:
    angle = np.arctan2(v, u)
    sector = 2 * np.pi / sides
    returned: np.ndarray = np.hypot(u, v) * np.cos((angle % sector) - sector / 2) - 0.8
    return returned


def _blobs(u: np.ndarray, v: np.ndarray, rng: np.random.Generator, count: int, radius: float) -> np.ndarray:
    alpha = np.zeros_like(u)
    for _ in range(count):
        a, r = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.7)
        d = np.hypot(u - r * np.cos(a), v - r * np.sin(a)) - radius * rng.uniform(0.6, 1.2)
        alpha = np.maximum(alpha, _soft(d, 0.25))
    return alpha


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle = np.arctan2(v, u)
    returned: np.ndarray = np.hypot(u, v) - (0.65 + 0.3 * np.cos(5 * angle))
    return returned


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    returned: np.ndarray = np.hypot(u * 0.95, v + 0.15 - 0.45 * np.sqrt(np.abs(u) + 1e-6)) - 0.85
    return returned


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


Shape = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]
# (u, v, edge, rng) -> alpha in [0, 1]; u and v run from -1 to 1 over the object
SHAPES: dict[str, Shape] = {
    "circle": lambda u, v, e, g: _soft(np.hypot(u, v) - 0.9, e),
    "square": lambda u, v, e, g: _soft(np.maximum(np.abs(u), np.abs(v)) - 0.8, e),
    "triangle": lambda u, v, e, g: _soft(_polygon(-v, u, 3) + 0.35, e),
    "ring": lambda u, v, e, g: _soft(np.abs(np.hypot(u, v) - 0.75) - 0.16, e),
    "cross": lambda u, v, e, g: _soft(np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.22, np.hypot(u, v) - 0.95), e),
    "star": lambda u, v, e, g: _soft(_star(u, v), e),
    "diamond": lambda u, v, e, g: _soft(np.abs(u) * 1.3 + np.abs(v) - 0.9, e),
    "bar": lambda u, v, e, g: _soft(np.maximum(np.abs(v) - 0.17, np.abs(u) - 0.95), e),
    "grid": lambda u, v, e, g: (
        _soft(np.minimum(np.abs(np.sin(5 * u)), np.abs(np.sin(5 * v))) - 0.35, max(e, 0.3))
        * _soft(np.maximum(np.abs(u), np.abs(v)) - 0.9, e)
    ),
    "arch": lambda u, v, e, g: (
        np.maximum.reduce([_soft(np.abs(np.hypot(u, (v - 0.6) * 0.9) - r) - 0.07, e) for r in (0.5, 0.85, 1.2)])
        * _soft(v - 0.55, e)
    ),
    "moon": lambda u, v, e, g: _soft(np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.45, v)), e),
    "zigzag": lambda u, v, e, g: (
        _soft(np.abs(v - 0.4 * (2 * np.abs(((u * 2.2) % 2) - 1) - 1)) - 0.17, e) * _soft(np.abs(u) - 0.95, e)
    ),
    "atelectasis": lambda u, v, e, g: (
        np.maximum.reduce([_soft(np.abs(v - o - 0.15 * u) - 0.085, e) for o in (-0.55, -0.1, 0.35)])
        * _soft(np.abs(u) - 0.95, e)
    ),
    "cardiomegaly": lambda u, v, e, g: _soft(_heart(u, -v), e),
    "consolidation": lambda u, v, e, g: _soft(np.maximum(_polygon(u, v, 5) - 0.05, v - 0.45), 0.06),
    "edema": lambda u, v, e, g: 0.85 * np.clip(1.5 - 2.2 * np.hypot((np.abs(u) - 0.5) * 1.6, v * 0.9), 0, 1),
    "lung opacity": lambda u, v, e, g: 0.8 * np.clip(1.25 - 1.25 * np.hypot(u, v), 0, 1),
    "pleural effusion": lambda u, v, e, g: np.maximum(
        _soft(np.maximum(0.35 * (1 - u * u) - v, np.maximum(np.abs(u) - 0.85, v - 0.9)), max(e, 0.1)),
        _soft(np.maximum(np.abs(np.abs(u) - 0.88) - 0.04, np.abs(v) - 0.9), e),
    ),
    "pneumonia": lambda u, v, e, g: 0.9 * _blobs(u, v, g, 9, 0.22),
    "pneumothorax": lambda u, v, e, g: _soft(
        np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u + 0.18, (v - 0.3) * 0.95)), e
    ),
}
DARK = {"pneumothorax"}
FIXED_ANGLE = {"pleural effusion", "edema", "cardiomegaly", "arch"}


@dataclass(frozen=True)
class _Object:
    kind: str
    x: float
    y: float
    radius: float
    angle: float
    aspect: float
    value: float
    edge: float
    seed: int


class PicturesDataset:
    """Generic captioned pictures with exact masks; see the module's text. Implements `ImageCaptionDataset`."""

    findings: tuple[str, ...] = KINDS
    query_words: Mapping[str, tuple[str, ...]] = {kind: tuple(" ".join(words).split()) for kind, words in WORDS.items()}

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        size: int,
        seed: int = 0,
        resolution: int = 128,
        clear: bool = False,
    ) -> None:
        self.split, self.size, self.seed, self.resolution, self.clear = split, size, seed, resolution, clear
        axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
        self._x, self._y = np.meshgrid(axis, axis)

    def __len__(self) -> int:
        return self.size

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return np.random.default_rng([self.seed, SPLITS[self.split], index])

    def _scene(self, rng: np.random.Generator) -> tuple[str, float, list[_Object]]:
        background = str(rng.choice(BACKGROUNDS))
        level = float(rng.uniform(0.05, 0.6 if self.clear else 0.75))
        objects: list[_Object] = []
        for _ in range(
            int(rng.choice([1, 2, 3, 4], p=[0.5, 0.35, 0.15, 0] if self.clear else [0.25, 0.35, 0.25, 0.15]))
        ):
            kind = str(rng.choice([k for k in KINDS if k not in {o.kind for o in objects}]))
            for _attempt in range(8):
                radius = float(rng.uniform(0.18, 0.36) if self.clear else rng.uniform(0.1, 0.3))
                x, y = rng.uniform(radius * 0.8, 1 - radius * 0.8, size=2)
                if all(np.hypot(x - o.x, y - o.y) > 0.8 * (radius + o.radius) for o in objects):
                    break
            else:
                continue
            gap = 0.35 if self.clear else 0.2
            low, high = (0.0, level - 0.2) if kind in DARK and level > 0.3 else (level + gap, 1.0)
            if kind not in DARK and level > 0.5 and rng.random() < 0.6 and kind in KINDS[:12]:
                low, high = 0.0, level - 0.25
            upright = self.clear or kind in FIXED_ANGLE
            angle = float(rng.normal(0, 0.15) if upright else rng.uniform(-np.pi, np.pi))
            objects.append(
                _Object(
                    kind,
                    float(x),
                    float(y),
                    radius,
                    angle,
                    float(rng.uniform(0.75, 1.3)),
                    float(rng.uniform(min(low, high), max(low, high))),
                    float(rng.choice([0.05, 0.12, 0.3])),
                    int(rng.integers(2**31)),
                )
            )
        return background, level, objects

    def _caption(self, rng: np.random.Generator, background: str, level: float, objects: list[_Object]) -> str:
        phrases = []
        for o in (objects[i] for i in rng.permutation(len(objects))):
            word = str(rng.choice(WORDS[o.kind], p=[0.75, 0.25] if len(WORDS[o.kind]) == 2 else None))
            size = (
                "small" if o.radius < 0.16 else "large" if o.radius > 0.23 else str(rng.choice(["moderate", "medium"]))
            )
            shade = "dark" if o.value < level else str(rng.choice(["bright", "white", "light"]))
            adjectives = " ".join(a for a in (size, shade) if rng.random() < 0.4)
            phrase = f"{adjectives} {word}".strip()
            if rng.random() < 0.6:
                row, column = min(int(o.y * 3), 2), min(int(o.x * 3), 2)
                place = POSITIONS[row][column]
                phrase += f" {rng.choice(['at the', 'in the', 'on the'])} {place}" + (
                    " zone" if rng.random() < 0.2 else ""
                )
            phrases.append(phrase)
        form = rng.integers(4)
        if form == 0:
            body = ", ".join(phrases)
            text = f"{rng.choice(['A picture of', 'Drawing of', 'Image:', ''])} {body}".strip() + "."
        elif form == 1:
            text = " ".join(f"There is {_a(p)}." for p in phrases)
        elif form == 2:
            text = " and ".join(map(_a, phrases))
        else:
            text = " ".join(p[0].upper() + p[1:] + "." for p in phrases)
        sentences = [text if text.endswith(".") else text + "."]
        if rng.random() < 0.35:
            sentences.append(f"{background.capitalize()} background.")
        if rng.random() < 0.2:
            absent = [k for k in KINDS if k not in {o.kind for o in objects}]
            sentences.append(f"{rng.choice(['No', 'There is no', 'Without'])} {WORDS[str(rng.choice(absent))][0]}.")
        if rng.random() < 0.35:
            words = [str(w) for w in rng.choice(VOCABULARY, size=int(rng.integers(3, 9)), replace=False)]
            sentences.append(str(rng.choice(UNRELATED)) if rng.random() < 0.5 else " ".join(words).capitalize() + ".")
        return " ".join(sentences[i] for i in rng.permutation(len(sentences)))

    def _background(self, rng: np.random.Generator, kind: str, level: float) -> np.ndarray:
        x, y = self._x, self._y
        if kind == "plain":
            return np.full_like(x, level)
        if kind == "gradient":
            a = rng.uniform(0, 2 * np.pi)
            returned: np.ndarray = level + rng.uniform(0.1, 0.4) * ((x - 0.5) * np.cos(a) + (y - 0.5) * np.sin(a))
            return returned
        if kind == "cloudy":
            field = zoom(rng.normal(0, 1, (6, 6)), self.resolution / 6, order=3, grid_mode=True, mode="nearest")
            returned = level + 0.08 * field.astype(np.float32)
            return returned
        if kind == "grainy":
            half = self.resolution // 2
            field = zoom(
                rng.normal(0, 1, (half, half)), self.resolution / half, order=1, grid_mode=True, mode="nearest"
            )
            returned = level + rng.uniform(0.01, 0.05) * field.astype(np.float32)
            return returned
        a, frequency = rng.uniform(0, np.pi), rng.uniform(3, 12)
        u, v = x * np.cos(a) + y * np.sin(a), -x * np.sin(a) + y * np.cos(a)
        amplitude = rng.uniform(0.04, 0.15)
        if kind == "striped":
            returned = level + amplitude * np.sin(2 * np.pi * frequency * u)
            return returned
        if kind == "dotted":
            returned = level + 2 * amplitude * np.clip(
                np.sin(2 * np.pi * frequency * u) * np.sin(2 * np.pi * frequency * v) - 0.3, 0, 1
            )
            return returned
        returned = level + amplitude * np.sign(np.sin(np.pi * frequency * u) * np.sin(np.pi * frequency * v))
        return returned

    def _relief(self, rng: np.random.Generator) -> np.ndarray:
        """Soft detail at several scales that no caption tells of, as in photographs: noise of octaves and a family of
        arcs."""
        field = np.zeros_like(self._x)
        amplitude = rng.uniform(0.02, 0.08)
        for cells in (4, 9, 18, 32):
            octave = zoom(
                rng.normal(0, 1, (cells, cells)), self.resolution / cells, order=3, grid_mode=True, mode="nearest"
            )
            field += (amplitude * rng.uniform(0.2, 1) * (4 / cells) ** 0.7 * octave).astype(np.float32)
        if rng.random() < 0.6:
            x, y = rng.uniform(-0.5, 1.5, size=2)
            distance = np.hypot((self._x - x) * rng.uniform(0.5, 1.5), self._y - y)
            wave = np.sin(2 * np.pi * rng.uniform(6, 16) * distance)
            field += rng.uniform(0.02, 0.1) * np.clip(wave * rng.uniform(0.8, 3), -1, 1)
        return field

    def caption(self, index: int) -> str:
        rng = self._rng(index)
        return self._caption(rng, *self._scene(rng))

    def labels(self, index: int) -> tuple[str, ...]:
        return tuple(o.kind for o in self._scene(self._rng(index))[2])

    def fingerprint(self, index: int) -> str:
        key = f"pictures {VERSION} {self.seed} {self.split} {index} {self.resolution}{' clear' * self.clear}"
        return hashlib.sha256(key.encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        rng = self._rng(index)
        background, level, objects = self._scene(rng)
        caption = self._caption(rng, background, level, objects)
        image = self._background(rng, background, level).astype(np.float32)
        if rng.random() < (0.3 if self.clear else 0.7):
            image += self._relief(rng)
        regions = []
        for o in objects:
            reach = o.radius * 1.5
            rows = slice(*(np.clip([o.y - reach, o.y + reach], 0, 1) * self.resolution).astype(int))
            columns = slice(*(np.clip([o.x - reach, o.x + reach], 0, 1) * self.resolution).astype(int))
            x, y = (self._x[rows, columns] - o.x) / o.radius, (self._y[rows, columns] - o.y) / o.radius
            u = (x * np.cos(o.angle) + y * np.sin(o.angle)) * o.aspect
            v = (-x * np.sin(o.angle) + y * np.cos(o.angle)) / o.aspect
            alpha = SHAPES[o.kind](u, v, o.edge, np.random.default_rng(o.seed)).astype(np.float32)
            image[rows, columns] += alpha * (o.value - image[rows, columns])
            mask = np.zeros(image.shape, dtype=bool)
            mask[rows, columns] = alpha > 0.4
            regions.append((o.kind, mask))
        image += rng.normal(0, 0.008, image.shape).astype(np.float32)
        pixels = torch.from_numpy(np.clip(image, 0, 1)) * 2 - 1
        return Sample(
            id=f"pictures{'-clear' * self.clear}-{self.split}-{index}",
            pixel_values=pixels.expand(3, -1, -1).clone(),
            caption=caption,
            regions=tuple(Region(kind, torch.from_numpy(mask)) for kind, mask in regions if mask.any()),
            labels=tuple(o.kind for o in objects),
            original_size=(self.resolution, self.resolution),
        )
