"""Each named feature of an image moves with what its name says, and with nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from distill.data.phantom.dataset import PhantomDataset
from distill.metrics.image_features import FEATURES, image_features

NAMES = [feature.name for feature in FEATURES]
BRIGHTNESS = {"mean brightness"}
CONTRAST = {"contrast", "brightness range"}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Phantoms with tones from .25 to .75, so that brightness and contrast can move without clipping."""
    phantoms = PhantomDataset("test", 6, 3, 64)
    return torch.stack([phantoms[i].pixel_values for i in range(6)]).double() / 2


def moved(before: torch.Tensor, after: torch.Tensor, tolerance: float = 1e-6) -> set[str]:
    """Names of the features that differ in any image."""
    first, second = image_features(before), image_features(after)
    same = torch.isclose(first, second, rtol=0, atol=tolerance, equal_nan=True).all(dim=0)
    return {name for name, is_same in zip(NAMES, same, strict=True) if not is_same}


def change(before: torch.Tensor, after: torch.Tensor, name: str) -> torch.Tensor:
    """Of one feature, by image."""
    place = NAMES.index(name)
    return image_features(after)[:, place] - image_features(before)[:, place]


def blurred(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 1, 1), mode="reflect"))


def test_names_are_told_apart_and_explained() -> None:
    assert len(set(NAMES)) == len(NAMES) and 28 <= len(NAMES) <= 36
    assert all(feature.unit and feature.meaning.endswith(".") for feature in FEATURES)


@settings(max_examples=12)
@given(st.floats(-0.4, 0.4), st.integers(0, 5))
def test_a_shift_of_brightness_moves_brightness_alone(images: torch.Tensor, shift: float, place: int) -> None:
    image = images[place : place + 1] * 0.9
    assert moved(image, image + shift) <= BRIGHTNESS
    assert change(image, image + shift, "mean brightness").item() == pytest.approx(shift / 2)


@settings(max_examples=12)
@given(st.floats(0.2, 1.9), st.integers(0, 5))
def test_a_change_of_contrast_moves_contrast_alone(images: torch.Tensor, factor: float, place: int) -> None:
    image = images[place : place + 1] * 0.5
    mean = image.mean()
    after = mean + factor * (image - mean)
    assert moved(image, after) <= CONTRAST
    before = image_features(image)[0, NAMES.index("contrast")]
    assert image_features(after)[0, NAMES.index("contrast")].item() == pytest.approx(factor * before.item())


def test_a_mirrored_image_differs_in_its_side_alone(images: torch.Tensor) -> None:
    assert moved(images, images.flip(-1)) == {"mass to the right"}
    place = NAMES.index("mass to the right")
    assert torch.allclose(image_features(images.flip(-1))[:, place], -image_features(images)[:, place])


def test_blur_lowers_sharpness_and_fine_detail(images: torch.Tensor) -> None:
    for name in ("edge sharpness", "strongest edges", "Laplacian variance", "noise", "fine detail", "finest detail",
                 "spectrum slope", "texture contrast"):  # fmt: skip
        assert (change(images, blurred(images), name) < 0).all(), name
    for name in ("mean brightness", "mass to the right", "mass to the bottom"):
        assert change(images, blurred(images), name).abs().max() < 0.02, name


def with_noise(images: torch.Tensor) -> torch.Tensor:
    noise = 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=images.dtype)
    return images + noise[:, :1]


def as_jpeg(images: torch.Tensor) -> torch.Tensor:
    found = []
    for image in images:
        buffer = io.BytesIO()
        array = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=10)
        found.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).double() / 127.5 - 1)
    return torch.stack(found)


def with_grid(images: torch.Tensor) -> torch.Tensor:
    """A grid of four pixels, as an upsampling leaves it."""
    wave = torch.arange(images.shape[-1]).double() * torch.pi / 2
    return images + 0.03 * (wave.cos() + wave.cos()[:, None])


def in_colour(images: torch.Tensor) -> torch.Tensor:
    return images + torch.tensor([0.1, 0.0, -0.1]).double()[:, None, None]


def clipped(images: torch.Tensor) -> torch.Tensor:
    return (images * 4).clamp(-1, 1)


def framed(images: torch.Tensor) -> torch.Tensor:
    found = images.clone()
    for side in (slice(0, 4), slice(-4, None)):
        found[..., side, :] = found[..., side] = 1
    return found


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (with_noise, ["noise", "finest detail", "Laplacian variance"]),
        (as_jpeg, ["blockiness"]),
        (with_grid, ["spectrum bumps"]),
        (in_colour, ["colour saturation"]),
        (clipped, ["clipped share"]),
        (framed, ["border brightness"]),
    ],
)
def test_a_fault_raises_the_feature_of_its_name(
    images: torch.Tensor, fault: Callable[[torch.Tensor], torch.Tensor], names: Collection[str]
) -> None:
    for name in names:
        assert (change(images, fault(images), name) > 0).all(), name
    if fault is in_colour:
        assert moved(images, in_colour(images)) == {"colour saturation"}


def chest(heart: int) -> torch.Tensor:
    """Two dark lungs on gray, of 20 px each, with a bright heart of `heart` px between and before them."""
    image = torch.full((1, 3, 100, 100), 0.3)
    image[..., 20:80, 15:45] = image[..., 20:80, 55:85] = -0.6
    image[..., 40:80, 50 - heart // 2 : 50 + heart // 2] = 0.4
    return image


@pytest.mark.parametrize("heart", [10, 20, 36])
def test_the_width_of_the_heart_and_the_area_of_the_lungs_are_measured(heart: int) -> None:
    row = dict(zip(NAMES, image_features(chest(heart))[0].tolist(), strict=True))
    assert row["bright width between dark areas"] == pytest.approx(heart / 70)
    lungs = 60 * 50 - 40 * (heart - 10)
    assert row["dark area in the centre"] == pytest.approx(lungs / 3600)


def test_without_lungs_the_width_of_the_heart_is_unknown_and_all_else_is_finite() -> None:
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    image[..., :20] = -image[..., :20] - 1  # dark on one side alone
    for images in (image.clamp(-1, 1) * 0 + 0.2, image.clamp(-1, 1)):
        row = dict(zip(NAMES, image_features(images)[0].tolist(), strict=True))
        del row["bright width between dark areas"]
        assert np.isfinite(list(row.values())).all()
    one_side = chest(10)
    one_side[..., 15:45] = 0.3
    assert image_features(one_side)[0, NAMES.index("bright width between dark areas")].isnan()


def test_a_row_does_not_depend_on_the_other_images(images: torch.Tensor) -> None:
    alone = torch.cat([image_features(image[None]) for image in images])
    assert torch.allclose(alone, image_features(images), equal_nan=True)


@pytest.mark.parametrize(
    ("images_", "message"),
    [
        (torch.zeros(1, 1, 64, 64), "got .1, 1, 64, 64."),
        (torch.zeros(1, 3, 64, 31), "at least 32 px"),
        (torch.zeros(1, 3, 31, 64), "at least 32 px"),
        (torch.full((1, 3, 64, 64), float("nan")), "in .-1, 1."),
        (torch.full((1, 3, 64, 64), 1.5), "in .-1, 1."),
    ],
)
def test_what_is_no_image_is_refused(images_: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_features(images_)


def by_loops(image: np.ndarray) -> list[float]:
    """Every feature of one (3, height, width) image in [-1, 1] again, pixel by pixel, as FEATURES says."""
    pixels = (image.astype(np.float64) + 1) / 2
    gray = pixels.mean(axis=0)
    height, width = gray.shape
    deviation = gray.std()
    z = (gray - gray.mean()) / deviation
    levels = [np.clip(np.floor((z + 3) / 6 * count), 0, count - 1).astype(int) for count in (64, 16)]
    clipped_share = np.mean([v <= 0.5 / 255 or v >= 254.5 / 255 for v in gray.ravel()])
    found = [gray.mean(), clipped_share, deviation, np.quantile(gray, 0.99) - np.quantile(gray, 0.01)]
    found += [*np.quantile(z, [0.1, 0.5, 0.9]), np.mean(z**3), bits(levels[0].ravel())]
    found += spectrum(z * np.outer(np.hanning(height), np.hanning(width)))

    gradient, laplacian, grain, patterns = [], [], [], []
    around = [(0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1)]
    for i in range(1, height - 1):
        for j in range(1, width - 1):
            gradient.append(np.hypot(z[i, j + 1] - z[i, j - 1], z[i + 1, j] - z[i - 1, j]) / 2)
            laplacian.append(z[i, j + 1] + z[i, j - 1] + z[i + 1, j] + z[i - 1, j] - 4 * z[i, j])
            grain.append(abs(np.sum(z[i - 1 : i + 2, j - 1 : j + 2] * np.outer([1, -2, 1], [1, -2, 1]))))
            patterns.append(tuple(z[i + a, j + b] > z[i, j] + 1e-9 for a, b in around))
    median = sorted(grain)[(len(grain) - 1) // 2]
    found += [np.mean(gradient), np.quantile(gradient, 0.99), np.var(laplacian), 1.4826 * median / 6]

    side = min(height, width) // 8
    squares = [
        z[i * side : (i + 1) * side, j * side : (j + 1) * side]
        for i in range(height // side)
        for j in range(width // side)
    ]
    steps = [*np.diff(levels[1], axis=0).ravel(), *np.diff(levels[1], axis=1).ravel()]
    found += [
        np.mean([part.std() for part in squares]),
        np.mean(np.square(steps)),
        np.mean([1 / (1 + s * s) for s in steps]),
    ]
    found.append(bits([sum(2**k for k, bit in enumerate(one) if bit) for one in patterns]))

    weight = np.maximum(0, z - np.quantile(z, 0.01))
    frame = min(height, width) // 16
    edge = [z[i, j] for i in range(height) for j in range(width)
            if min(i, height - 1 - i) < frame or min(j, width - 1 - j) < frame]  # fmt: skip
    dark = z < otsu(levels[0].ravel())
    found += [np.mean(z * z[:, ::-1]), np.sum(weight * np.linspace(-1, 1, width)) / weight.sum()]
    found += [np.sum(weight * np.linspace(-1, 1, height)[:, None]) / weight.sum(), np.mean(edge)]
    found += [
        np.mean(box(dark, 0.2, 0.8, 0.2)),
        bright_width(box(dark, 0.5, 0.7, 0.1)),
        np.mean(box(z, 0.5, 0.7, 0.35)),
    ]
    found.append(np.mean(pixels.max(axis=0) - pixels.min(axis=0)) / deviation)
    ratios = []
    for jumps in (np.abs(np.diff(z, axis=1)).mean(axis=0), np.abs(np.diff(z, axis=0)).mean(axis=1)):
        at = [v for k, v in enumerate(jumps) if k % 8 == 7]
        ratios.append(np.mean(at) / np.mean([v for k, v in enumerate(jumps) if k % 8 != 7]))
    return [float(value) for value in [*found, np.mean(ratios)]]


def bits(values: Collection[int] | np.ndarray) -> float:
    shares = np.unique(np.asarray(values), return_counts=True)[1] / len(values)
    return float(-np.sum(shares * np.log2(shares)))


def spectrum(windowed: np.ndarray) -> list[float]:
    height, width = windowed.shape
    power = np.abs(np.fft.fft2(windowed)) ** 2
    power[0, 0] = 0
    bands, rings = np.zeros(4), [[] for _ in range(17)]  # type: ignore[var-annotated]
    for i in range(height):
        for j in range(width):
            frequency = 2 * np.hypot(min(i, height - i) / height, min(j, width - j) / width)
            bands[sum(frequency >= end for end in (0.125, 0.25, 0.5))] += power[i, j]
            if 1 <= (ring := int(np.round(frequency * 16))) <= 16:
                rings[ring].append(power[i, j])
    energy = np.log10([np.mean(ring) for ring in rings[1:]])
    place = np.log10(np.arange(1, 17))
    slope, start = np.polyfit(place, energy, 1)
    return [*(bands / power.sum()), slope, np.sqrt(np.mean((energy - start - slope * place) ** 2))]


def otsu(levels: np.ndarray) -> float:
    """The end of the level that parts dark from bright best."""
    centres = (levels + 0.5) / 64 * 6 - 3

    def between(level: int) -> float:
        dark, bright = centres[levels <= level], centres[levels > level]
        return float(len(dark) * len(bright) * (dark.mean() - bright.mean()) ** 2) if len(dark) and len(bright) else 0.0

    return float((max(range(63), key=between) + 1) / 64 * 6 - 3)


def box(values: np.ndarray, top: float, bottom: float, margin: float) -> np.ndarray:
    height, width = values.shape
    left = int(margin * width)
    return values[int(top * height) : int(np.ceil(bottom * height)), left : width - left]


def bright_width(dark: np.ndarray) -> float:
    shares, half = [], dark.shape[1] // 2
    for row in dark:
        places = np.flatnonzero(row)
        if row[:half].any() and row[-half:].any():
            shares.append(1 - len(places) / (places[-1] - places[0] + 1))
    return sorted(shares)[(len(shares) - 1) // 2] if len(shares) > len(dark) / 2 else float("nan")


@pytest.mark.parametrize(("height", "width", "gain"), [(48, 65, 0.5), (57, 40, 3.0)])
def test_every_feature_is_that_of_loops_over_pixels(height: int, width: int, gain: float) -> None:
    """Grains of several sizes in colour, part of them clipped."""
    rng = np.random.default_rng(height)
    noise = sum(ndimage.gaussian_filter(rng.normal(size=(3, height, width)), (0, s, s)) * s for s in (0.5, 2, 5))
    image = np.clip(gain * noise + 0.1, -1, 1)
    expected = by_loops(image)
    row = image_features(torch.from_numpy(image)[None])[0].tolist()
    for name, ours, theirs in zip(NAMES, row, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True), name
