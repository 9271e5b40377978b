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
